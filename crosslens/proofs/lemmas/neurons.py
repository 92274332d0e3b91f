"""How far a nonlinearity's value moves when its argument does."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.errors import UsageError
from crosslens.proofs.rounding import (
    SLACK,
    TINY,
    Ball,
    dot_up,
    exact,
    matmul,
    norm_up,
    product_up,
    spectral_up,
    up,
)

Kind = Literal["relu", "gelu", "gelu_tanh", "silu"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SLOPE: dict[Kind, float] = {"relu": 1.0, "gelu": 1.1290, "gelu_tanh": 1.1292, "silu": 1.0999}
"""At least sup |φ′| (1.12890, 1.12912 and 1.09984, attained near √2, √2 and 2.3994)."""

GAP: dict[Kind, float] = {"relu": 0.0, "gelu": 0.1700, "gelu_tanh": 0.1701, "silu": 0.2785}
"""At least sup (relu − φ) (.16997, .17004 and .27846)."""

_FAR = 1.3
"""Beyond it relu(z) − φ(z) falls as |z| rises: the peaks are at .7518, .7525 and 1.2785."""


def require(kind: str) -> None:
    """Refuse a nonlinearity for which nothing is proved here."""
    if kind not in KINDS:
        raise UsageError(
            f"No bound is proved for the nonlinearity {kind!r}; there are {', '.join(KINDS)}."
        )


def gap_up(kind: Kind, z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """At least h(z) = relu(z) − φ(z), for the float z.

    h is even: |z| Φ(−|z|) for GELU, |z| σ(−|z|) for SiLU, |z| σ(−2 √(2/π) (|z| + .044715 |z|³)) for
    GELU by tanh, 0 for ReLU. Proof for SiLU: relu(z) − z σ(z) is z σ(−z) for z ≥ 0 and −z σ(z)
    for z < 0, which is |z| σ(−|z|); the others likewise with Φ, and ½(1 + tanh t) = σ(2t).
    Rounding: the tails err relatively, by their argument's own error times its size; 64 SLACK
    (1 + z²) covers cubes, products and the function itself. h ≤ GAP everywhere.
    """
    size = z.abs()
    match kind:
        case "gelu":
            tail = 0.5 * torch.erfc(size / math.sqrt(2))
        case "gelu_tanh":
            cubic = size + 0.044715 * size**3
            tail = torch.sigmoid(-2 * math.sqrt(2 / math.pi) * cubic)
        case "silu":
            tail = torch.sigmoid(-size)
        case _:
            return torch.zeros_like(z)
    relative = 64 * SLACK * (1 + size + size * size + (size**3 if kind == "gelu_tanh" else 0))
    return up(up(size * tail) * (1 + relative) + TINY).clamp_max(GAP[kind])


def neuron_moves(
    kind: Kind, pre: Float[Tensor, "*s"], reach: Float[Tensor, "*s"]
) -> Float[Tensor, "*s"]:
    """At least max |φ(y + e) − φ(y)| over |e| ≤ reach: only neurons that are not off for the whole
    interval pay.

    ReLU: it rises with slope at most 1, so for y ≥ 0 the most is `reach` (upwards), and for y < 0
    it is relu(y + reach): together min(reach, relu(y + reach)), attained.
    Smooth φ = relu − h: by the mean value theorem at most `SLOPE · reach`; by |Δφ| ≤ |Δrelu| +
    |Δh| with 0 ≤ h ≤ GAP, at most the ReLU's plus GAP; and where y + reach ≤ −1.3, both values lie
    in [−h(y + reach), 0], since there φ = −h and h falls with |z|.
    """
    require(kind)
    most = torch.minimum(reach, up(pre + reach).clamp_min(0))
    if kind == "relu":
        return most
    smooth = torch.minimum(up(reach * SLOPE[kind]), up(most + GAP[kind]))
    end = up(pre + reach)
    off = gap_up(kind, end)
    return torch.where(end <= -_FAR, torch.minimum(off, smooth), smooth)


def mlp_moves(
    kind: Kind,
    pre: Float[Tensor, "*s N"],
    W_in_DN: Float[Tensor, "D N"],
    W_out_ND: Float[Tensor, "N D"],
    eps: Float[Tensor, "*s"],
) -> Float[Tensor, "*s"]:
    """At least ‖f(x) − f(x̂)‖ for f(x) = W_outᵀ φ(W_inᵀ x + b), given W_inᵀ x̂ + b = `pre` and
    ‖x − x̂‖ ≤ eps.

    Proof. Neuron n's argument moves by at most ‖W_in,n‖ eps (Cauchy–Schwarz), hence its value by
    `neuron_moves`; by the triangle inequality the output moves by at most Σ_n ‖w_out,n‖ · that,
    and at most ‖W_out‖₂ times the norm of those moves.
    """
    reach = product_up(eps[..., None], norm_up(W_in_DN.double(), 0))
    moves = neuron_moves(kind, pre, reach)
    return written_up(moves, W_out_ND)


def written_up(
    error_N: Float[Tensor, "*s N"], W_out_ND: Float[Tensor, "N D"]
) -> Float[Tensor, "*s"]:
    """At least ‖W_outᵀ e‖ for every |e| ≤ `error_N`: min(Σ ‖w_out,n‖ e_n, ‖W_out‖₂ ‖e‖)."""
    W = W_out_ND.double()
    apart = dot_up(error_N, norm_up(W).expand_as(error_N))
    together = product_up(spectral_up(W), norm_up(error_N))
    return torch.where(
        error_N.amax(-1) == 0, torch.zeros_like(apart), torch.minimum(apart, together)
    )


def stable_mlp_moves(
    pre: Float[Tensor, N],
    W_in_DN: Float[Tensor, "D N"],
    W_out_ND: Float[Tensor, "N D"],
    eps: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """As `mlp_moves` for ReLU at one x̂, where neurons on for the whole ball pay together.

    Proof. A neuron with y_n ≥ ‖W_in,n‖ eps is linear on the ball; their joint map is
    W_in,on W_out,on, so they move the output by at most its spectral norm times eps. The others
    move it by at most Σ ‖w_out,n‖ · `neuron_moves`. The smaller of this and `mlp_moves` is taken.
    """
    reach = product_up(eps, norm_up(W_in_DN.double(), 0))
    on = pre >= reach
    joint: Ball = matmul(exact(W_in_DN[:, on]), exact(W_out_ND[on]))
    # ‖M + R‖₂ ≤ ‖M‖₂ + ‖R‖_F for the rounding radius R.
    norm = up(spectral_up(joint.mid) + norm_up(joint.rad.flatten()))
    rest = torch.where(on, 0.0, neuron_moves("relu", pre, reach))
    apart = dot_up(rest, norm_up(W_out_ND.double()))
    split = up(product_up(norm, eps) + torch.where(rest.amax() == 0, 0.0, apart))
    return torch.minimum(split, mlp_moves("relu", pre, W_in_DN, W_out_ND, eps))


def gated_moves(
    kind: Kind, gate: Float[Tensor, "*s"], value: Float[Tensor, "*s"], reach: tuple[Tensor, Tensor]
) -> Float[Tensor, "*s"]:
    """At least |u′ φ(g′) − u φ(g)| for |g′ − g| ≤ reach[0], |u′ − u| ≤ reach[1].

    Proof. u′φ(g′) − uφ(g) = u′(φ(g′) − φ(g)) + (u′ − u) φ(g); |u′| ≤ |u| + reach[1], and
    |φ(g)| ≤ |g|.
    """
    moved = neuron_moves(kind, gate, reach[0])
    value_size = up(value.abs() + reach[1])
    return up(product_up(value_size, moved) + product_up(reach[1], gate.abs()))

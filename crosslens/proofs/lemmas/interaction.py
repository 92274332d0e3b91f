"""How far a neuron is from treating its contributions y_i one by one.

P and Q are the sums of the positive and of the negative parts' sizes; a bias is one more
contribution. All bounds are on | Σ φ(y_i) − φ(Σ y_i) | or on its norm once written by W_out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.proofs.lemmas.neurons import SLOPE, Kind, gap_up, require
from crosslens.proofs.rounding import (
    TINY,
    dot_up,
    gamma,
    norm_up,
    product_up,
    sqrt_up,
    sum_up,
    up,
    widen,
)


def additive_up(kind: Kind, y: Float[Tensor, "*s k"]) -> Float[Tensor, "*s"]:
    """At least | Σ φ(y_i) − φ(Σ y_i) |: for ReLU exactly min(P, Q) (I1).

    Proof. relu(P − Q) = P − min(P, Q), and Σ relu(y_i) = P. With φ = relu − h, h ≥ 0, the
    difference is min(P, Q) − Σ h(y_i) + h(Σ y_i) (I4), which lies between −Σ h(y_i) and
    min(P, Q) + h(P − Q).
    """
    require(kind)
    plus, minus = sum_up(y.clamp_min(0)), sum_up((-y).clamp_min(0))
    least = torch.minimum(plus, minus)
    if kind == "relu":
        return least
    # h is 1-Lipschitz up to its slope, at most SLOPE: the sum's rounding moves it by that much.
    total = y.sum(-1)
    off = up(y.abs().sum(-1) * (2 * SLOPE[kind] * gamma(y.shape[-1] + 1)))
    return torch.maximum(up(least + up(gap_up(kind, total) + off)), sum_up(gap_up(kind, y)))


def dominance_up(y: Float[Tensor, "*s k"]) -> Float[Tensor, "*s"]:
    """At least | relu(Σ y_i) − relu(y_largest) |, the post's strict dominance: Σ|y| − max|y|.

    Proof. ReLU is 1-Lipschitz, and the other contributions sum to at most that in size.
    """
    rest = y.abs().sort(-1).values[..., :-1]
    return sum_up(rest) if rest.shape[-1] else torch.zeros_like(y[..., 0])


def coupled_up(y: Float[Tensor, "*s k"]) -> Float[Tensor, "*s"]:
    """At least min(P, Q), from pairs of opposite sign: Σ min(|y_i|, |y_j|) (I2).

    Proof. Move mass min(P, Q) from the positive contributions to the negative ones; the mass
    between i and j is at most min(|y_i|, |y_j|), and what moves is its sum.
    """
    plus, minus = y.clamp_min(0), (-y).clamp_min(0)
    return sum_up(torch.minimum(plus[..., :, None], minus[..., None, :]).flatten(-2))


def gated_up(
    kind: Kind, value: Float[Tensor, "*s k"], gate: Float[Tensor, "*s k"]
) -> Float[Tensor, "*s"]:
    """At least | (Σ u_i) φ(Σ g_i) − Σ u_i φ(g_i) |: SLOPE Σ_i |u_i| Σ_{j≠i} |g_j|.

    Proof. The difference is Σ u_i (φ(Σ g) − φ(g_i)), and φ is SLOPE-Lipschitz.
    """
    require(kind)
    size = gate.abs()
    k = size.shape[-1]
    others = widen(size[..., None, :].mul(1 - torch.eye(k, dtype=size.dtype)).sum(-1), k)
    return up(dot_up(value.abs(), others) * SLOPE[kind])


def pair_table(W_eff_FN: Float[Tensor, "F N"], out_N: Float[Tensor, N]) -> Float[Tensor, "F F"]:
    """H_ij ≥ Σ_n out_n √|W_in W_jn| over the neurons where features i and j have opposite signs.

    Two products: √(out W⁺) √(out W⁻)ᵀ and its transpose, each rounded up.
    """
    plus = sqrt_up(product_up(W_eff_FN.clamp_min(0), out_N))
    minus = sqrt_up(product_up((-W_eff_FN).clamp_min(0), out_N))
    n = W_eff_FN.shape[1]
    one_way = widen(plus @ minus.T, n + 1) + 2 * n * TINY
    return up(one_way + one_way.T)


def pairs_up(
    strength_K: Float[Tensor, "*s K"], table_KK: Float[Tensor, "*s K K"]
) -> Float[Tensor, "*s"]:
    """At least Σ_n out_n min(P_n, Q_n) for y_in = a_i W_in: Σ_{i<j} √(a_i a_j) H_ij.

    Proof. `coupled_up`, min(s, t) ≤ √(s t), and a_i a_j comes out of the root.
    """
    root = sqrt_up(strength_K)
    each = product_up(product_up(root[..., :, None], root[..., None, :]), table_KK)
    return up(sum_up(each.triu(1).flatten(-2)))


def spread_up(error_N: Float[Tensor, "*s N"], size_N: Float[Tensor, N]) -> Float[Tensor, "*s"]:
    """At least |Σ_n e_n g_n| for |e| ≤ `error_N`, |g| ≤ size: min of Σ and Cauchy–Schwarz."""
    apart = dot_up(error_N, size_N.expand_as(error_N))
    return torch.minimum(apart, product_up(norm_up(error_N), norm_up(size_N)))

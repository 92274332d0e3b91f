"""How far an MLP at x̂ is from a surrogate that treats latents one by one, and from itself at x.

Per neuron the surrogate is a sum over latents, so that W_outᵀ of it is c + Σ g_i(a_i):

    additive     Σ h_i, each latent's own effect, the biases being one more latent
    given bias   h_b + Σ (h_{b+i} − h_b), each latent's effect beside the biases alone
    linear       c_n + p_n u + q_n g, for any numbers c, p, q (a hint)
    dominance    h of the largest contribution alone: the post's strict dominance
    nothing      0

What a surrogate misses is bounded by

    exact        the error of every neuron, written by W_out
    neurons      the error of every neuron, then Σ ‖w_out,n‖ |e_n| or ‖W_out‖₂ ‖e‖
    sizes        the sizes of the contributions alone (`sizes_up`), then the same
    pairs        a table of pairs of latents (`pair_bound`)
    cap          the weights alone
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.proofs.lemmas.local_parts import (
    Block,
    Branch,
    Codes,
    Inputs,
    multiply,
    neuron,
    product,
    total,
)
from crosslens.proofs.lemmas.neurons import SLOPE, Kind, gated_moves, neuron_moves
from crosslens.proofs.lemmas.normalisation import layer_moves, rms_moves
from crosslens.proofs.rounding import (
    SLACK,
    Ball,
    add,
    ball_norm_up,
    dot_up,
    down,
    exact,
    norm_up,
    product_up,
    spectral_up,
    sqrt_up,
    subtract,
    sum_up,
    up,
)


@dataclass(frozen=True)
class Written:
    """W_out, and how far neurons' errors reach through it."""

    out_ND: Tensor
    norm_N: Tensor
    spectral: Tensor


def written(block: Block) -> Written:
    """‖w_out,n‖ of every neuron, and ‖W_out‖₂."""
    return Written(block.out_ND, norm_up(block.out_ND), spectral_up(block.out_ND))


def spread_up(error: Float[Tensor, "*r n"], out: Written) -> Float[Tensor, "*r"]:
    """At least ‖W_outᵀ e‖ for |e| ≤ error: min(Σ ‖w_out,n‖ e_n, ‖W_out‖₂ ‖e‖)."""
    apart = dot_up(error, out.norm_N.expand_as(error))
    return torch.minimum(apart, product_up(out.spectral, norm_up(error)))


def exact_up(error: Ball, out: Written) -> Float[Tensor, "*r"]:
    """At least ‖W_outᵀ e‖, by the product itself."""
    return ball_norm_up(product(error, exact(out.out_ND)))


def missed(
    kind: Kind, sums: Inputs, parts: Inputs | None, surrogate: str, affine_3N: Tensor
) -> Ball:
    """h(Σ) less the surrogate, neuron by neuron [R, N]; only "linear" and "nothing" go without
    `parts`, the single contributions."""
    whole = neuron(kind, sums.gate, sums.value)
    if parts is None:
        return subtract(whole, affine(sums, affine_3N)) if surrogate == "linear" else whole
    match surrogate:
        case "additive":
            alone = total(neuron(kind, parts.gate, parts.value), 1)
        case "given bias":
            alone = _given_bias(kind, parts)
        case _:
            at = largest(parts)
            alone = neuron(kind, _one(parts.gate, at), _maybe(parts.value, at))
    return subtract(whole, alone)


def summed(parts: Inputs) -> Inputs:
    """Contributions → totals."""
    value = parts.value
    return Inputs(total(parts.gate, 1), None if value is None else total(value, 1))


def largest(parts: Inputs) -> Tensor:
    """Which contribution is largest by |u g|, without a gate by |g| [R, N]; any choice is sound."""
    size = parts.gate.mid.abs()
    return (size if parts.value is None else size * parts.value.mid.abs()).argmax(1)


def _one(x: Ball, at: Tensor) -> Ball:
    index = at[:, None]
    return Ball(x.mid.gather(1, index)[:, 0], x.rad.gather(1, index)[:, 0])


def _maybe(x: Ball | None, at: Tensor) -> Ball | None:
    return None if x is None else _one(x, at)


def _given_bias(kind: Kind, parts: Inputs) -> Ball:
    def last(x: Ball) -> Ball:
        return Ball(x.mid[:, -1:], x.rad[:, -1:])

    def beside(x: Ball) -> Ball:
        return add(Ball(x.mid[:, :-1], x.rad[:, :-1]), last(x))

    value = parts.value
    alone = neuron(kind, last(parts.gate), None if value is None else last(value))
    both = neuron(kind, beside(parts.gate), None if value is None else beside(value))
    return add(Ball(alone.mid[:, 0], alone.rad[:, 0]), total(subtract(both, alone), 1))


def affine(sums: Inputs, affine_3N: Tensor) -> Ball:
    """The linear surrogate of every neuron [R, N]."""
    constant, of_value, of_gate = (exact(row) for row in affine_3N)
    found = add(constant, multiply(of_gate, sums.gate))
    return found if sums.value is None else add(found, multiply(of_value, sums.value))


def sizes_up(kind: Kind, parts: Inputs, surrogate: str) -> Float[Tensor, "r n"]:
    """At least |h(Σ) − surrogate|, from |u_i| and |g_i| alone; "additive" and "dominance".

    Additive, gated: Σ u_i (φ(Σ g) − φ(g_i)), so at most SLOPE Σ_i |u_i| Σ_{j≠i} |g_j|.
    Additive, ungated: adding y to a sum s changes φ(s) by φ(y) up to ∫ (φ′(s + t) − φ′(t)) dt over
    t from 0 to y, or the same with s and y exchanged; φ′ lies in [1 − SLOPE, SLOPE], because
    φ′(z) + φ′(−z) = 1. So each step errs by (2 SLOPE − 1) min(|s|, |y|) ≤ (2 SLOPE − 1) Σ_j
    min(|y_j|, |y|): the post's ratios, pair by pair. For ReLU the factor is 1.
    Dominance: |φ(Σ g)| ≤ Σ |g|, and φ is SLOPE-Lipschitz.
    """
    gate = parts.gate.size
    slope = SLOPE[kind]
    if surrogate == "dominance":
        return _dominance_up(parts, slope)
    if parts.value is None:
        ordered = gate.sort(1, descending=True).values
        rank = torch.arange(gate.shape[1], dtype=gate.dtype)[:, None]
        return up(sum_up(up(ordered * rank), 1) * up(torch.tensor(2 * slope - 1).double()))
    others = up(sum_up(gate, 1)[:, None] - _least(parts.gate))
    return up(sum_up(product_up(parts.value.size, others), 1) * slope)


def _least(x: Ball) -> Tensor:
    """At most |x|."""
    return down(x.mid.abs() - x.rad).clamp_min(0)


def _dominance_up(parts: Inputs, slope: float) -> Tensor:
    at = largest(parts)
    all_gates, gate = sum_up(parts.gate.size, 1), _one(parts.gate, at)
    rest = up(up(all_gates - _least(gate)) * slope)
    if parts.value is None:
        return rest
    value = _one(parts.value, at)
    other_values = up(sum_up(parts.value.size, 1) - _least(value))
    return up(product_up(other_values, all_gates) + product_up(value.size, rest))


@dataclass(frozen=True)
class PairTable:
    """Bounds for pairs of latents (then the decoder's bias, then what r does not multiply)."""

    table: Tensor
    directed: bool
    """Gated: (value, gate), for strengths. Else for roots of strengths, either way round."""


def pair_table(kind: Kind, gate: Branch, value: Branch | None, out: Written) -> PairTable:
    """H_ij such that Σ_n ‖w_out,n‖ |additive error| ≤ Σ s_i s_j H_ij (gated), ≤ Σ √(s_i s_j) H_ij.

    Gated: SLOPE Σ_n ‖w_out,n‖ |U_in| |G_jn|, one product. Ungated: (2 SLOPE − 1) Σ_n ‖w_out,n‖
    √(|E_in| |E_jn|), because min(s, t) ≤ √(s t); for ReLU (I2) over neurons where the signs may
    differ, two products.
    """
    rows = _with_fixed(gate)
    if value is not None:
        sizes = product_up(_with_fixed(value).size, out.norm_N)
        return PairTable(up(_dot(sizes, rows.size) * SLOPE[kind]), directed=True)
    if kind == "relu":
        plus = sqrt_up(product_up(up(rows.mid + rows.rad).clamp_min(0), out.norm_N))
        minus = sqrt_up(product_up(up(rows.rad - rows.mid).clamp_min(0), out.norm_N))
        one_way = _dot(plus, minus)
        return PairTable(up(one_way + one_way.T), directed=False)
    root = sqrt_up(product_up(rows.size, out.norm_N))
    factor = up(torch.tensor(2 * SLOPE[kind] - 1).double())
    return PairTable(up(_dot(root, root) * factor), directed=False)


def _with_fixed(into: Branch) -> Ball:
    moving, fixed = into.moving_FN, into.fixed_N
    return Ball(torch.cat([moving.mid, fixed.mid[None]]), torch.cat([moving.rad, fixed.rad[None]]))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """At least a bᵀ, for numbers ≥ 0: |fl − real| ≤ γ ‖a‖ ‖b‖, which is a few SLACK of it."""
    return product(exact(a), exact(b.T)).upper.clamp_min(0)


def pair_bound(pairs: PairTable, codes: Codes, scalar_R: Ball) -> Float[Tensor, " r"]:
    """At least Σ_n ‖w_out,n‖ |additive error| for each row: k² lookups.

    The biases are two contributions here, r E_b and the fixed part. Where the table bounds pairs
    of one contribution of the additive surrogate (gated), this pair is left out; for ReLU splitting
    a contribution can only raise min(P, Q), so it stays; for other φ it does no harm.
    """
    n = len(pairs.table)
    index, most = codes.index_RK, scalar_R.upper[:, None]
    own = torch.tensor([n - 2, n - 1]).expand(len(index), 2)
    index = torch.cat([index, own], 1)
    strength = product_up(codes.strength_RK.abs(), most)
    strength = torch.cat([strength, most, torch.ones_like(most)], 1)
    among = pairs.table[index[:, :, None], index[:, None, :]]
    k = index.shape[1]
    if pairs.directed:
        mask = 1 - torch.eye(k, dtype=torch.float64)
        mask[-2:, -2:] = 0
    else:
        strength, mask = sqrt_up(strength), torch.ones(k, k, dtype=torch.float64).triu(1)
    each = product_up(product_up(strength[:, :, None], strength[:, None, :]), among)
    return sum_up((each * mask).flatten(1))


def cap_up(block: Block, gate: Branch, value: Branch | None, out: Written) -> Tensor:
    """At least ‖f(x) − b_out‖ for every x, from the weights: ‖n(x) before the gain‖ ≤ √D, so that
    |g_n| ≤ reach_n √D + |fixed_n|, and |φ(g)| ≤ |g|. Infinite without a norm."""
    if block.norm == "none":
        return torch.tensor(math.inf, dtype=torch.float64)
    root = up(torch.tensor(math.sqrt(len(block.gain_D)), dtype=torch.float64) * (1 + SLACK))

    def most(into: Branch) -> Tensor:
        return up(product_up(into.reach_N, root) + into.fixed_N.size)

    hidden = most(gate) if value is None else product_up(most(gate), most(value))
    return spread_up(hidden, out)


@dataclass(frozen=True)
class Near:
    """Where rows may be: within `eps` of x̂, which is a ball itself."""

    decoded: Ball
    eps: Tensor


def near(x_RD: Tensor, decoded: Ball) -> Near:
    """How far the rows x are from the middles of x̂."""
    return Near(decoded, ball_norm_up(subtract(exact(x_RD), exact(decoded.mid))))


def site_error_up(at: Near) -> Float[Tensor, " r"]:
    """At least ‖x − x̂‖."""
    return up(at.eps + norm_up(at.decoded.rad))


def transition_up(
    block: Block, at: Near, into: tuple[Branch, Branch | None], sums: Inputs, out: Written
) -> Float[Tensor, " r"]:
    """At least ‖f(x) − f(x̂)‖, given what reaches the neurons at x̂.

    Proof. n before the gain moves by at most η (`rms_moves`), once from x̂'s middle to x and once to
    x̂ itself; a neuron's argument by η · reach_n, and by its radius; its value by `gated_moves` or
    `neuron_moves`; then `spread_up`.
    """
    kind, gate, value = block.kind, sums.gate, sums.value
    eta = _norm_moves(block, at.decoded.mid, at.eps)
    eta = up(eta + _norm_moves(block, at.decoded.mid, norm_up(at.decoded.rad)))
    reach = up(product_up(eta[:, None], into[0].reach_N) + up(gate.rad * 2))
    if value is None or into[1] is None:
        moved = up(neuron_moves(kind, gate.mid, reach) + up(gate.rad * SLOPE[kind]))
        return spread_up(moved, out)
    reach_value = up(product_up(eta[:, None], into[1].reach_N) + up(value.rad * 2))
    moved = gated_moves(kind, gate.mid, value.mid, (reach, reach_value))
    own = gated_moves(kind, gate.mid, value.mid, (gate.rad, value.rad))
    return spread_up(up(moved + own), out)


def _norm_moves(block: Block, x_RD: Tensor, eps_R: Tensor) -> Tensor:
    if block.norm == "none":
        return eps_R
    moves = rms_moves if block.norm == "rms" else layer_moves
    return moves(x_RD, eps_R, None, block.floor)

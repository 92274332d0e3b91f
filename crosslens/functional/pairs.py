"""How two contributions to a neuron interact: the equations, each a pure function on tensors.

A neuron is φ(Σ y), or where it is gated (Σ u)·φ(Σ g), over its members: the active latents, the
always-on part, the error. `w_N` is ‖w_out‖ of each neuron. Derivations: docs/interactions_pairs.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslens.functional.blocks import upcast
from crosslens.functional.interactions import Kind, activation


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What no mixed difference of a nonlinearity exceeds, whatever the context."""

    product: float
    """|Δ| ≤ product·|y_i y_j|: the largest |φ''|; infinite at a kink."""
    smaller: float
    """|Δ| ≤ smaller·min(|y_i|, |y_j|): how far φ' ranges."""


LIMITS: dict[Kind, Limit] = {
    "relu": Limit(product=math.inf, smaller=1.0),
    "gelu": Limit(product=0.7979, smaller=1.2580),
    "gelu_tanh": Limit(product=0.7979, smaller=1.2581),
    "silu": Limit(product=0.5, smaller=1.1997),
    "relu2": Limit(product=2.0, smaller=math.inf),
}
"""Rounded up. By the mean value theorem: Δ is ∫∫φ'' over a rectangle of sides y_i and y_j, and
∫(φ'(x + y_j) − φ'(x)) over an interval of length |y_i|."""


def mixed_difference(
    kind: Kind,
    context: Float[Tensor, "*b"],
    first: Float[Tensor, "*b"],
    second: Float[Tensor, "*b"],
) -> Float[Tensor, "*b"]:
    """Δ_ij = φ(c + y_i + y_j) − φ(c + y_i) − φ(c + y_j) + φ(c): what the two do together beyond
    what each does alone, when c is there already."""
    phi = activation(kind)
    with_first = context + first
    both = phi(with_first + second) - phi(with_first)
    return both.sub_(phi(context + second)).add_(phi(context))


@dataclass(frozen=True)
class Gated:
    """A contribution to a gated neuron, or the sum of some."""

    value: Tensor
    """u: to what is multiplied."""
    gate: Tensor
    """g: to what the nonlinearity acts on."""

    def __add__(self, other: Gated) -> Gated:
        return Gated(self.value + other.value, self.gate + other.gate)


@dataclass(frozen=True)
class Directional:
    """The mixed difference of a gated neuron, in three parts that sum to it."""

    first_by_second: Tensor
    """The first's value through what the second does to the gate: u_i·(φ(c + g_i + g_j) − φ(c +
    g_i))."""
    second_by_first: Tensor
    """The other way."""
    gate: Tensor
    """The context's value through the mixed difference of the gate: c_u·Δφ."""

    @property
    def total(self) -> Tensor:
        return (self.first_by_second + self.second_by_first).add_(self.gate)


def gated_mixed_difference(kind: Kind, context: Gated, first: Gated, second: Gated) -> Directional:
    """Δ_ij of h = u·φ(g): Σ over coalitions S of {i, j} of (−1)^(2−|S|) h(c + Σ_S), taken apart by
    which value meets which gate. Shapes of all parts are alike."""
    phi, c = activation(kind), context.gate
    with_first = c + first.gate
    one, other, none = phi(with_first), phi(c + second.gate), phi(c)
    by_second = phi(with_first + second.gate) - one
    by_first = by_second + (one - other)
    return Directional(
        first_by_second=first.value * by_second,
        second_by_first=second.value * by_first,
        gate=(by_second - other).add_(none) * context.value,
    )


def mixed_limit(
    kind: Kind, first: Float[Tensor, "*b"], second: Float[Tensor, "*b"]
) -> Float[Tensor, "*b"]:
    """The sound bound on |Δ_ij| that holds in every context; see `LIMITS`."""
    limit = LIMITS[kind]
    smaller = torch.minimum(first.abs(), second.abs())
    bound = (
        smaller * limit.smaller if math.isfinite(limit.smaller) else smaller.new_tensor(math.inf)
    )
    if math.isfinite(limit.product):
        bound = torch.minimum(bound, limit.product * (first * second).abs())
    return bound


def random_coalition(
    counts_I: Tensor, generator: torch.Generator
) -> tuple[Bool[Tensor, " e"], Bool[Tensor, " i"]]:
    """A coalition of each item's members, and whether the item's extra member (its error) is in.

    Members come in independently with a probability drawn uniformly for the item. Of the others
    than i and j, a coalition of each size is then as likely as of any other (∫ C(m, s) p^s
    (1 − p)^(m − s) dp = 1/(m + 1)), and all of one size alike: the weights of the Shapley
    interaction index (Grabisch & Roubens 1999), so the mean of Δ_ij over draws is unbiased for all
    pairs at once (Owen 1972's multilinear form).
    """
    odds_I = torch.rand(len(counts_I), generator=generator)
    odds_E = odds_I.repeat_interleave(counts_I.cpu())
    inside_E = torch.rand(len(odds_E), generator=generator) < odds_E
    return inside_E, torch.rand(len(odds_I), generator=generator) < odds_I


def coupling(
    kind: Kind, y_BKN: Float[Tensor, "b k n"], w_N: Float[Tensor, " n"]
) -> Float[Tensor, "b k k"]:
    """Σ_n w min(|y_i|, |y_j|)·[y_i y_j < 0], for all pairs of a row's members.

    Its sum over pairs is never below Σ_n w min(P, Q), P and Q the sums of positive and of negative
    parts: the mass min(P, Q) can be carried from the one to the other between pairs. Twice the
    smaller of two opposite numbers is |y_i| + |y_j| − |y_i + y_j|, so this is a distance.

    For squared ReLU 2·Σ_n w (p_i p_j + p_i q_j + q_i p_j), whose sum bounds |Σφ(y) − φ(Σy)|. The
    diagonal means nothing.
    """
    if kind == "relu2":
        q_BKN = torch.relu(-y_BKN)
        return 2 * (_gram(y_BKN.abs(), y_BKN.abs(), w_N) - _gram(q_BKN, q_BKN, w_N))
    z_BKN = y_BKN * w_N
    size_BK, twice_BKK = z_BKN.abs().sum(-1), z_BKN.new_zeros(*z_BKN.shape[:2], z_BKN.shape[1])
    for i in range(z_BKN.shape[1] - 1):  # five times as fast as torch.cdist on a processor
        together_BK = (z_BKN[:, i + 1 :] + z_BKN[:, i, None]).abs_().sum(-1)
        twice_BKK[:, i, i + 1 :] = size_BK[:, i, None] + size_BK[:, i + 1 :] - together_BK
    above_BKK = twice_BKK.clamp_min_(0) / 2
    return above_BKK + above_BKK.mT


def reach(
    first_QN: Float[Tensor, "q n"], second_QN: Float[Tensor, "q n"], w_N: Float[Tensor, " n"]
) -> Float[Tensor, " q"]:
    """Σ_n w min(|y_i|, |y_j|), whatever the signs: times `LIMITS[kind].smaller`, what Σ_n w|Δ_ij|
    cannot exceed in any context."""
    return torch.minimum(first_QN.abs(), second_QN.abs()) @ w_N


def shared(
    kind: Kind, y_BKN: Float[Tensor, "b k n"], w_N: Float[Tensor, " n"]
) -> Float[Tensor, "b k k"]:
    """Each pair's part of the interaction of a row, given all of its members.

    Σ_n w (p_i q_j + q_i p_j) / max(P, Q): never above the coupling, and over all pairs the sum is
    Σ_n w min(P, Q) itself, since Σ p_i q_j / max(P, Q) = PQ / max(P, Q). For squared ReLU, φ(Σy) =
    Σ_ij y_i y_j [Σy > 0], so a pair's part is 2·Σ_n w |y_i y_j| [Σy > 0]. The diagonal means
    nothing.
    """
    if kind == "relu2":
        open_BN = (y_BKN.sum(1) > 0).to(y_BKN.dtype)
        return 2 * _gram(y_BKN.abs(), y_BKN.abs(), w_N * open_BN)
    p_BKN, q_BKN = torch.relu(y_BKN), torch.relu(-y_BKN)
    larger_BN = torch.maximum(p_BKN.sum(1), q_BKN.sum(1))
    least_N = torch.finfo(y_BKN.dtype).tiny * w_N.clamp_min(1)  # what w can be divided by
    one_way = _gram(p_BKN, q_BKN, w_N / larger_BN.maximum(least_N))
    return one_way + one_way.mT


def gated_coupling(
    value_BKN: Float[Tensor, "b k n"], gate_BKN: Float[Tensor, "b k n"], w_N: Float[Tensor, " n"]
) -> Float[Tensor, "b k k"]:
    """Σ_n w |u_i||g_j|, value i against gate j: over all i ≠ j and times `SLOPE_BOUND`, never
    below |Σ_i u_i (φ(Σg) − φ(g_i))|."""
    return _gram(value_BKN.abs(), gate_BKN.abs(), w_N)


def gating(
    kind: Kind,
    size_BKN: Float[Tensor, "b k n"],
    gate_BKN: Float[Tensor, "b k n"],
    w_N: Float[Tensor, " n"],
) -> Float[Tensor, "b k k"]:
    """Σ_n w |u_i||φ(Σg) − φ(Σg − g_j)|: how much of value i member j lets through or holds back on
    this row, given all of its members.

    Args:
        size_BKN: |u|; the product is taken in its format.
    """
    phi, all_BN = activation(kind), gate_BKN.sum(1)
    lost_BKN = phi(all_BN[:, None] - gate_BKN) - phi(all_BN)[:, None]
    return upcast(size_BKN @ lost_BKN.abs_().mul_(w_N).to(size_BKN.dtype).mT)


def dominance(
    first_QN: Float[Tensor, "q n"],
    second_QN: Float[Tensor, "q n"],
    largest_QN: Float[Tensor, "q n"],
    w_N: Float[Tensor, " n"],
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """I(i, j) = Σ_n w |y_j| over the neurons where |y_i| is the largest, and I(j, i) likewise.

    arXiv 2606.09940, as its code describes it, but summed: the published code adds at repeated
    indices and so keeps one neuron of each pair. Of equal members each is a dominant one.

    Args:
        largest_QN: max |y| over all latents of the pair's token.
    """
    first_QN, second_QN = first_QN.abs(), second_QN.abs()
    leads_QN = torch.ge(first_QN, largest_QN, out=torch.empty_like(first_QN))  # 1 or 0
    by_first = leads_QN.mul_(second_QN) @ w_N
    leads_QN = torch.ge(second_QN, largest_QN, out=leads_QN)
    return by_first, leads_QN.mul_(first_QN) @ w_N


def ratio(
    first_QN: Float[Tensor, "q n"], second_QN: Float[Tensor, "q n"], w_N: Float[Tensor, " n"]
) -> Float[Tensor, " q"]:
    """Σ_n w min(|y_i/y_j|, |y_j/y_i|) / Σ_n w: the post's ratio, 0 where one of the two is alone, 1
    where they are equally large. Its mean over tokens is the mean over neurons of r_ij,n."""
    first_QN, second_QN = first_QN.abs(), second_QN.abs()
    larger_QN = torch.maximum(first_QN, second_QN).clamp_min(torch.finfo(first_QN.dtype).tiny)
    total = w_N.sum().clamp_min(torch.finfo(w_N.dtype).tiny)
    return (torch.minimum(first_QN, second_QN) / larger_QN) @ w_N / total


def hadamard(
    first_QN: Float[Tensor, "q n"], second_QN: Float[Tensor, "q n"], w_N: Float[Tensor, " n"]
) -> Float[Tensor, " q"]:
    """‖w ∘ (W_inᵀ d_i) ∘ (W_inᵀ d_j)‖: the post's proxy, from weights alone."""
    product: Tensor = torch.linalg.vector_norm(first_QN * second_QN * w_N, dim=-1)
    return product


def _gram(left_BKN: Tensor, right_BKN: Tensor, w: Tensor) -> Tensor:
    """Σ_n w left_i right_j; `w` is [N], or [B, N]."""
    w_B1N = w[:, None] if w.ndim == 2 else w
    return (left_BKN * w_B1N) @ right_BKN.mT


def factors(
    kind: Kind, E_LN: Float[Tensor, "l n"], w_N: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "l m"], Float[Tensor, "l m"]]:
    """Left and right factors whose products bound the coupling of two latents of strength 1.

    ⟨left_i, right_j⟩ = Σ_n w √|e_i e_j| [e_i e_j < 0], at least Σ_n w min(|e_i|, |e_j|) [e_i e_j <
    0]; at other strengths times √(a_i a_j). For squared ReLU the coupling itself, which grows with
    a_i a_j. Two columns per neuron.
    """
    plus, minus = torch.relu(E_LN), torch.relu(-E_LN)
    if kind == "relu2":
        left, right = torch.cat([plus, minus], -1), torch.cat([E_LN.abs(), plus], -1)
        return 2 * left * torch.cat([w_N, w_N]), right
    plus, minus = (plus * w_N).sqrt(), (minus * w_N).sqrt()
    return torch.cat([plus, minus], -1), torch.cat([minus, plus], -1)


def gated_factors(
    E_LN: Float[Tensor, "l n"], G_LN: Float[Tensor, "l n"], w_N: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "l n"], Float[Tensor, "l n"]]:
    """The same where neurons are gated: ⟨left_i, right_j⟩ = Σ_n w |E_i||G_j| is the coupling of
    value i and gate j itself, and grows with a_i a_j."""
    return E_LN.abs() * w_N, G_LN.abs()

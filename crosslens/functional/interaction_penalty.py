"""How far an MLP is from treating a coder's latents one by one, as something to train against.

Latent i of a token contributes y_i = a_i r (d_i · w_n) to neuron n: its strength, the scalar of the
norm before the MLP, its decoder row through the MLP's input matrix (gain folded in). As in
`crosslens.functional.interactions`, whose sums these are; here they keep their gradient to the
decoder's rows and bias and to the strengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.functional.blocks import upcast
from crosslens.functional.gathers import Lists
from crosslens.functional.interactions import Kind, alone, degree

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Neurons:
    """An MLP's neurons as what stands at a site reaches them.

    W columns: one per neuron, and where the MLP is gated the gates' after the values'.
    """

    kind: Kind
    """φ; where the MLP is gated it acts on the gate."""
    through_DW: Tensor
    """From the site's raw units to pre-activations, but for the norm's scalar; in the format that
    the products are to have."""
    fixed_W: Tensor
    """What the MLP's and the norm's biases add."""
    out_norm_N: Tensor
    """‖w_out,n‖: how far one unit of the neuron moves the MLP's output."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Active:
    """The latents that are active on some tokens."""

    decoder_UD: Tensor
    """Rows of the decoder at the site, in the model's units, each latent's once."""
    lists: Lists
    """For each token, which of them."""
    strength_E: Tensor
    """How strongly (above 0), times the norm's scalar on the token."""
    always_TW: Tensor
    """What the biases put into the neurons."""


def interaction_share(active: Active, neurons: Neurons) -> Float[Tensor, ""]:
    """mean_t [Σ_n ‖w_out,n‖ |A − W| / Σ_n ‖w_out,n‖ (|A| + |W|)]: the share, in [0, 1], of what the
    latents do at the neurons that is their interaction.

    W is what all of them add to a neuron's output, φ(c + Σ_i y_i) − φ(c) beside the constant part
    c, and A what they would add one by one, Σ_i φ(y_i); where gated (Σ u_i) φ(Σ g_i) less the
    constant part's own, and Σ_i u_i φ(g_i). For ReLU, A − W is min(P, Q) with c as one more latent
    (I1). φ is taken as its positively homogeneous part: ReLU for GELU and SiLU, which leaves out h
    (I4); relu2 is so itself.

    Scaling all contributions by one factor changes nothing, and as the denominator has its gradient
    too, no step is taken towards smaller norms. It is of outputs and not of the contributions'
    sizes, which could be had for nothing at neurons that stay shut.
    """
    n, kind = len(neurons.out_norm_N), _homogeneous(neurons.kind)
    E_UW = _effective(active, neurons)
    fixed = _halves(active.always_TW, n)
    sums = zip(_halves(_bag(E_UW, active), n), fixed, strict=True)
    always_TN = alone(kind, *_pair(fixed))
    together_TN = alone(kind, *_pair(tuple(y_TN + c_TN for y_TN, c_TN in sums))) - always_TN
    apart_TN = _one_by_one(kind, E_UW, active, n)
    w_N = neurons.out_norm_N
    made_T = (apart_TN - together_TN).abs() @ w_N
    most_T = (apart_TN.abs() + together_TN.abs()) @ w_N
    nothing_T = ~(most_T > 0)
    return (made_T / most_T.masked_fill(nothing_T, 1.0)).masked_fill(nothing_T, 0.0).mean()


def dominance_gap(active: Active, neurons: Neurons) -> Float[Tensor, ""]:
    """mean_{t,n} (Σ_i |y_i| − max_i |y_i|), the penalty of 2606.09940: what is there beside the
    largest contribution, unweighted and in the pre-activation's own units.

    The bias of the MLP, which its code spreads evenly over all latents, is left out. A gated MLP's
    gates count as neurons of their own.
    """
    size_TW, largest_TW = dominance(active, neurons)
    n_places = active.lists.n_items * len(neurons.fixed_W)
    return (size_TW - largest_TW).sum() / max(1, n_places)


def dominance(
    active: Active, neurons: Neurons
) -> tuple[Float[Tensor, "t w"], Float[Tensor, "t w"]]:
    """Σ_i |y_i| and max_i |y_i|, of the tokens that have any active latent."""
    size_UW = _effective(active, neurons).abs()
    some_T = active.lists.counts_I > 0
    winner_TW = _winners(size_UW.detach(), active)
    largest_TW = size_UW.gather(0, active.lists.index_N.long()[winner_TW])
    return _bag(size_UW, active)[some_T], largest_TW * active.strength_E[winner_TW]


@torch.no_grad()
def _winners(size_UW: Tensor, active: Active) -> Tensor:
    """Which entry is the largest, for each token that has any and each column; of equal ones the
    first. All tokens' first entries, then all second ones, …: a loop over tokens takes twice as
    long."""
    lists, index_E, strength_E = active.lists, active.lists.index_N.long(), active.strength_E
    order_T = lists.counts_I.argsort(descending=True, stable=True)
    order_T = order_T[lists.counts_I[order_T] > 0]
    counts_T, starts_T = lists.counts_I[order_T], lists.starts_I[order_T]
    best_TW = size_UW.new_full((len(order_T), size_UW.shape[1]), -torch.inf)
    winner_TW = starts_T[:, None].repeat(1, size_UW.shape[1])
    for slot in range(int(counts_T[:1].sum())):
        n = int((counts_T > slot).sum())  # those whose lists are as long come first
        entry_S = starts_T[:n] + slot
        y_SW = size_UW.index_select(0, index_E[entry_S]).mul_(strength_E[entry_S, None])
        larger_SW = y_SW > best_TW[:n]
        winner_TW[:n] = torch.where(larger_SW, entry_S[:, None], winner_TW[:n])
        best_TW[:n] = torch.maximum(best_TW[:n], y_SW)
    return winner_TW[order_T.argsort()]


def _homogeneous(kind: Kind) -> Kind:
    return "relu2" if kind == "relu2" else "relu"


def _effective(active: Active, neurons: Neurons) -> Tensor:
    """What each latent puts into the neurons per unit of its strength [U, W]."""
    through_DW = neurons.through_DW
    return upcast(active.decoder_UD.to(through_DW.dtype) @ through_DW)


def _one_by_one(kind: Kind, E_UW: Tensor, active: Active, n: int) -> Tensor:
    """Σ_i φ(y_i), or Σ_i u_i φ(g_i) [T, N]: sparse products too, since φ is homogeneous."""
    parts = _halves(E_UW, n)
    power = degree(kind) + (len(parts) == 2)
    return _bag(alone(kind, *_pair(parts)), active, power)


def _bag(table_UN: Tensor, active: Active, power: int = 1) -> Tensor:
    """Σ over each token's latents of strength^power · table [T, N]. torch's own operation, whose
    gradients to both are sparse too: an [entries, N] tensor is never made."""
    lists = active.lists
    if not len(lists.index_N):  # torch takes no empty table
        return table_UN.new_zeros(lists.n_items, table_UN.shape[1])
    return torch.nn.functional.embedding_bag(
        lists.index_N.long(),
        table_UN,
        lists.starts_I[:-1],
        mode="sum",
        per_sample_weights=active.strength_E**power,
    )


def _halves(value: Tensor, n: int) -> tuple[Tensor, ...]:
    """Values, and gates where there are any."""
    return torch.split(value, n, -1)


def _pair(parts: tuple[T, ...]) -> tuple[T, T | None]:
    return parts[0], parts[1] if len(parts) == 2 else None

"""Both passes by the compiled kernels, which hold no contribution of any pair."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.interactions.neurons.contributions import SiteChunk
from crosslens.interactions.pairs.blocks import Beside, Block, Tables
from crosslens.interactions.pairs.points import Points
from crosslens.kernels import pairs as kernel


def _listed(chunk: SiteChunk) -> kernel.Listed:
    one = chunk.effective
    return kernel.Listed(one.mlp.kind, chunk.lists, chunk.weight_E, one.out_norm_N)


def fused_gating(
    chunk: SiteChunk, block: Block, given: Tables, besides: tuple[Beside, Beside | None]
) -> tuple[Float[Tensor, "b m m"], Float[Tensor, " b"]]:
    """`shared` of all pairs of a block's members, where there is a gate; and the coupling over all
    pairs of latents of a row, of each with itself too. `given` must be `fused`."""
    gate, value = besides
    assert given.value is not None
    assert value is not None
    gates = kernel.Brought(given.inner.E_LN, gate.always_RN, gate.error_RN)
    values = kernel.Brought(given.value.E_LN, value.always_RN, value.error_RN)
    return kernel.gating(_listed(chunk), block.row_B, gates, values)


def takes_contexts(chunk: SiteChunk) -> bool:
    """Whether there is a kernel for the second pass."""
    return kernel.takes(chunk.effective.value.E_LN)


def fused_contexts(
    these: Points, place_Q: Tensor, first_Q: Tensor, second_Q: Tensor
) -> list[Tensor]:
    """`IN_CONTEXT` of some meetings, one column after another [Q].

    Args:
        place_Q: where each one's row is among those of the points, ascending.
    """
    branches = (these.inner, these.value)
    gates, values = (
        None
        if branch is None
        else kernel.Stand(branch.E_LN, torch.stack([c.point_R.branch(at) for c in these.contexts]))
        for at, branch in enumerate(branches)
    )
    assert gates is not None
    inside = [torch.stack([c.holds(e) for c in these.contexts], 1) for e in (first_Q, second_Q)]
    met = kernel.Met(these.row_R[place_Q], place_Q, first_Q, second_Q)
    found_QC4, compared_Q4 = kernel.in_context(
        _listed(these.chunk), met, gates, values, torch.stack(inside, -1)
    )
    rest_Q4, bias_Q4, shapley_QS4 = found_QC4[:, 0], found_QC4[:, 1], found_QC4[:, 2:]
    first_dominant, second_dominant, ratio, reach = compared_Q4.T
    return [
        *rest_Q4.T[:2],
        *bias_Q4.T[:2],
        *shapley_QS4.mean(1).T[:2],
        shapley_QS4[:, :, 1].var(1) / shapley_QS4.shape[1],
        *rest_Q4.T[2:],
        first_dominant,
        second_dominant,
        ratio / these.w_N.sum().clamp_min(torch.finfo(these.w_N.dtype).tiny),
        reach,
    ]

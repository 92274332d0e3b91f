"""Both passes by the compiled kernels, which hold no contribution of any pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.interactions.neurons.contributions import Branch, SiteChunk
from crosslens.interactions.pairs.blocks import Beside, Block, Tables
from crosslens.interactions.pairs.points import Coalition, branches
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


def fused_sharing(
    chunk: SiteChunk, block: Block, given: Tables, besides: tuple[Beside, Beside | None]
) -> tuple[Float[Tensor, "b m m"], Float[Tensor, "b m m"], Float[Tensor, " b"]]:
    """`shared` and `coupling` of all pairs of a block's members, where there is no gate; for relu2
    not the coupling, but its sum over all pairs of latents of a row, of each with itself too."""
    values = kernel.Brought(given.inner.E_LN, besides[0].always_RN, besides[0].error_RN)
    return kernel.sharing(_listed(chunk), block.row_B, values)


def takes_contexts(chunk: SiteChunk) -> bool:
    """Whether there is a kernel for the second pass."""
    return kernel.takes(chunk.effective.value.E_LN)


def fused_contexts(
    chunk: SiteChunk,
    row_R: Tensor,
    meetings: tuple[Tensor, Tensor, Tensor],
    drawn: Sequence[Coalition],
) -> list[Tensor]:
    """`IN_CONTEXT` of some meetings, one column after another [Q].

    Args:
        row_R: the rows that they are on, ascending.
        meetings: of each, the place of its row among these, ascending, and its two entries.
    """
    one, (place_Q, first_Q, second_Q) = chunk.effective, meetings
    gates, values = (None if b is None else _brought(chunk, b, row_R) for b in branches(chunk))
    assert gates is not None
    met = kernel.Met(row_R[place_Q], place_Q, first_Q, second_Q)
    found_QC4, compared_Q4 = kernel.in_context(
        _listed(chunk), met, gates, values, _inside(chunk, row_R, drawn)
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
        ratio / one.out_norm_N.sum().clamp_min(torch.finfo(ratio.dtype).tiny),
        reach,
    ]


def _brought(chunk: SiteChunk, branch: Branch, row_R: Tensor) -> kernel.Brought:
    always_RN, error_RN = chunk.constant(branch, row_R), chunk.error(branch, row_R)
    return kernel.Brought(branch.E_LN, always_RN, error_RN)


def _inside(chunk: SiteChunk, row_R: Tensor, drawn: Sequence[Coalition]) -> kernel.Inside:
    """Everything (`rest`), nothing (`bias`), then each coalition."""
    every_E = torch.ones_like(chunk.weight_E, dtype=torch.bool)
    every_P = torch.ones_like(row_R, dtype=torch.bool)
    entries = [every_E, ~every_E, *(each.latent_E for each in drawn)]
    errors = [every_P, ~every_P, *(each.error_R[row_R] for each in drawn)]
    return kernel.Inside(torch.stack(entries), torch.stack(errors))

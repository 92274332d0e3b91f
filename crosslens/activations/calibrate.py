"""Estimate, before training, the norms that scale and filter activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.activations.harvest import Source, row_norms
from crosslens.activations.policy import within_norms
from crosslens.errors import CrosslensError


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Norms per site, in the layout's order, estimated under the token policy."""

    scale: tuple[float, ...]
    """√d / mean‖x‖: brings a site's mean norm to √d."""
    median: tuple[float, ...]
    """Median ‖x‖ before outliers are left out."""
    tokens: int
    """Rows that the estimate rests on."""
    outliers: int
    """Rows left out of it for their norm."""


def calibrate(source: Source, tokens: int) -> Calibration:
    """Norms from about `tokens` positions in chunks spread evenly over the blocks.

    The median is taken over the positions that the token policy keeps; rows beyond the policy's
    multiple of it are then left out of the mean, as they will be left out of training.
    """
    wanted = min(source.n_chunks, max(1, round(tokens / source.rows_per_chunk)))
    picks = [round(i * (source.n_chunks - 1) / max(1, wanted - 1)) for i in range(wanted)]
    norm_RP = torch.cat([_kept_norms(source, index) for index in sorted(set(picks))])
    if len(norm_RP) < 2:
        raise CrosslensError("The token policy keeps no token: there is nothing to train on.")
    median_P = norm_RP.median(0).values
    _check_alive(source, median_P)
    fine_R = within_norms(source.policy, norm_RP, median_P)
    width_P = torch.tensor(source.layout.widths)
    scale_P = width_P.sqrt() / norm_RP[fine_R].mean(0)
    return Calibration(
        scale=tuple(scale_P.tolist()),
        median=tuple(median_P.tolist()),
        tokens=len(norm_RP),
        outliers=int((~fine_R).sum()),
    )


def _kept_norms(source: Source, index: int) -> Tensor:
    sites = source.activations(source.blocks.tokens_NT[source.block_range(index)])
    keep_BT, _ = source.keep(index, sites)
    return row_norms(sites)[keep_BT.flatten()]


def _check_alive(source: Source, median_P: Tensor) -> None:
    for site, median in zip(source.layout.sites, median_P.tolist(), strict=True):
        if median <= 0:
            raise CrosslensError(
                f"Activations at {site} are all zero, so there is nothing to learn there."
            )

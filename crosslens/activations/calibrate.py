"""Estimate, before training, the norms that scale and filter activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from crosslens.activations.harvest import Source, row_norms
from crosslens.activations.policy import within_norms
from crosslens.coder import Wiring, all_rows
from crosslens.errors import CrosslensError

Scale = Literal["root_width", "unit_square"]
"""What the scale of a site of width d brings to a set value: its mean norm to √d (Anthropic and
most others), or its mean squared norm to 1 (DeepMind's JumpReLU SAEs and Gemma Scope)."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Norms estimated under the token policy."""

    scale: Scale = "root_width"
    read_scale: tuple[float, ...]
    """What each site the coder reads is multiplied by: √d / mean‖x‖, or 1 / √mean‖x‖²."""
    write_scale: tuple[float, ...]
    """The same of each site it writes."""
    median: tuple[float, ...]
    """Median ‖x‖ of each harvested site, before outliers are left out."""
    tokens: int
    """Rows that the estimate rests on."""
    outliers: int
    """Rows left out of it for their norm."""


def calibrate(
    source: Source, wiring: Wiring, tokens: int, scale: Scale = "root_width"
) -> tuple[Calibration, Tensor]:
    """Norms, and the rows [R, X] they rest on: about `tokens` positions, in chunks spread evenly.

    The median is taken over the positions that the token policy keeps; rows beyond the policy's
    multiple of it are then left out of the means, as they will be left out of training. Where a
    coder's rows are made of harvested ones (differences), those rows are what is measured.
    """
    wanted = min(source.n_chunks, max(1, round(tokens / source.rows_per_chunk)))
    picks = [round(i * (source.n_chunks - 1) / max(1, wanted - 1)) for i in range(wanted)]
    unjudged = replace(source, median_P=None)
    chunks = [unjudged.chunk(index) for index in sorted(set(picks))]
    harvest_RP = torch.cat([row_norms(chunk.sites) for chunk in chunks])
    if len(harvest_RP) < 2:
        raise CrosslensError("The token policy keeps no token: there is nothing to train on.")
    median_P = harvest_RP.median(0).values
    _check_alive(source.layout.sites, median_P)
    fine_R = within_norms(source.policy, harvest_RP, median_P)
    rows_RX = torch.cat([chunk.rows() for chunk in chunks]).cpu()[fine_R].float()
    read_RP, write_RP = _viewed_norms(wiring, harvest_RP[fine_R], rows_RX)
    calibration = Calibration(
        scale=scale,
        read_scale=_scale(scale, wiring.scaled_widths(wiring.read), read_RP),
        write_scale=_scale(scale, wiring.scaled_widths(wiring.write), write_RP),
        median=tuple(median_P.tolist()),
        tokens=len(harvest_RP),
        outliers=int((~fine_R).sum()),
    )
    return calibration, rows_RX


def _scale(scale: Scale, widths: Sequence[int], norm_RP: Tensor) -> tuple[float, ...]:
    mean_P = norm_RP.mean(0)
    if (mean_P <= 0).any():
        raise CrosslensError(
            "The two models' activations do not differ at all: they are the same weights, or the "
            "adapter does nothing. There is nothing for a difference to learn."
        )
    if scale == "unit_square":
        return tuple(norm_RP.square().mean(0).rsqrt().tolist())
    return tuple((torch.tensor(widths).sqrt() / mean_P).tolist())


def _viewed_norms(wiring: Wiring, norm_RP: Tensor, rows_RX: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the sites read and of those written."""
    if wiring.view == "per_site":
        return norm_RP, norm_RP
    if wiring.view == "difference":
        made_RX = all_rows(wiring, rows_RX).x_BX
        made_RP = row_norms([made_RX[:, columns] for columns in wiring.read.slices])
        return made_RP, made_RP
    read, write = (
        [wiring.harvest.index(site) for site in part.sites] for part in (wiring.read, wiring.write)
    )
    return norm_RP[:, read], norm_RP[:, write]


def _check_alive(sites: Sequence[str], median_P: Tensor) -> None:
    for site, median in zip(sites, median_P.tolist(), strict=True):
        if median <= 0:
            raise CrosslensError(
                f"Activations at {site} are all zero, so there is nothing to learn there."
            )

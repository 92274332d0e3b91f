"""Harvested rows → a coder's rows, and its reconstructions → what takes their place in a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.coder.layout import Wiring


@dataclass(frozen=True)
class Rows:
    """What a coder is given and what it should write, raw."""

    x_BX: Tensor
    y_BY: Tensor
    site_B: Tensor | None = None
    """Which harvested site each row is of, where the view is per site."""


def side_by_side(sites: Iterable[Tensor]) -> Tensor:
    """Activations [..., D] of one site after another → rows [all positions, all columns]."""
    return torch.cat([site.flatten(0, -2) for site in sites], -1)


def all_rows(wiring: Wiring, rows_BX: Tensor) -> Rows:
    """Every row that harvested rows [B, all columns] give: B, or B·P where the view is per site."""
    match wiring.view:
        case "difference":
            x_BX = _difference(wiring, rows_BX)
            return Rows(x_BX, x_BX)
        case "per_site":
            n_sites = len(wiring.harvest.sites)
            site_B = torch.arange(n_sites, device=rows_BX.device).repeat(len(rows_BX))
            x_BX = rows_BX.reshape(-1, wiring.read.width)
            return Rows(x_BX, x_BX, site_B)
        case _:
            x_BX = _picked(wiring, rows_BX, wiring.read.sites)
            same = wiring.write == wiring.read
            return Rows(x_BX, x_BX if same else _picked(wiring, rows_BX, wiring.write.sites))


def training_rows(wiring: Wiring, rows_BX: Tensor, generator: torch.Generator) -> Rows:
    """One row per token: where the view is per site, a site drawn at random (seed 003: rows of one
    token at several sites are too alike to share a batch)."""
    if wiring.view != "per_site":
        return all_rows(wiring, rows_BX)
    n_sites, n = len(wiring.harvest.sites), len(rows_BX)
    site_B = torch.randint(n_sites, (n,), generator=generator).to(rows_BX.device)
    x_BX = rows_BX.view(n, n_sites, -1)[torch.arange(n, device=rows_BX.device), site_B]
    return Rows(x_BX, x_BX, site_B)


def site_names(wiring: Wiring) -> tuple[str, ...]:
    """The sites that a reconstruction is told apart by."""
    return wiring.harvest.sites if wiring.view == "per_site" else wiring.write.sites


def by_site(wiring: Wiring, rows_BY: Tensor) -> tuple[Tensor, ...]:
    """Rows like those of `all_rows`, for each of `site_names` [B, D]."""
    if wiring.view == "per_site":
        n_sites = len(wiring.harvest.sites)
        return rows_BY.view(-1, n_sites, rows_BY.shape[-1]).unbind(1)
    return tuple(rows_BY[:, columns] for columns in wiring.write.slices)


def spliced_sites(wiring: Wiring) -> tuple[str, ...]:
    """The harvested sites that `replacements` gives, in its order."""
    return _halves(wiring)[1] if wiring.view == "difference" else site_names(wiring)


def replacements(wiring: Wiring, rows_BX: Tensor, recon_BY: Tensor) -> dict[str, Tensor]:
    """Harvested site → what stands for its activations [B, D] in the model, from the
    reconstruction of `all_rows`. A difference is added to the model it is counted from."""
    match wiring.view:
        case "difference":
            base_BX = _picked(wiring, rows_BX, _halves(wiring)[0])
            parts = (base_BX + recon_BY).split(list(wiring.write.widths), -1)  # type: ignore[no-untyped-call]
            return dict(zip(spliced_sites(wiring), parts, strict=True))
        case _:
            return dict(zip(site_names(wiring), by_site(wiring, recon_BY), strict=True))


def _picked(wiring: Wiring, rows_BX: Tensor, sites: tuple[str, ...]) -> Tensor:
    if sites == wiring.harvest.sites:
        return rows_BX
    parts = [rows_BX[:, wiring.harvest.slice(site)] for site in sites]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _halves(wiring: Wiring) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites of the first model and of the second, in the same order."""
    sites = wiring.harvest.sites
    return sites[: len(sites) // 2], sites[len(sites) // 2 :]


def _difference(wiring: Wiring, rows_BX: Tensor) -> Tensor:
    first, second = _halves(wiring)
    return _picked(wiring, rows_BX, second).float() - _picked(wiring, rows_BX, first).float()

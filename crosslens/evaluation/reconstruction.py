"""How well and how sparsely a coder reconstructs rows, in one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.coder import Coder, all_rows
from crosslens.coder.rows import by_site, site_names
from crosslens.errors import CrosslensError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True)
class SiteFigures:
    """Reconstruction at one site, on raw activations."""

    fvu: float
    """Σ‖x − x̂‖² / Σ‖x − x̄‖²: sums over all rows, x̄ their mean (ratio of variances)."""
    explained_variance: float
    """mean over rows of 1 − ‖x − x̂‖² / ‖x − x̄‖², x̄ the mean of a batch of rows (mean of ratios):
    the other published convention, lower where small rows fit badly."""
    cosine: float
    """Mean cos(x, x̂)."""
    norm_ratio: float
    """Mean ‖x̂‖ / ‖x‖."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Figures over some rows."""

    tokens: int
    l0: float
    """Mean number of active latents of a code."""
    l0_quantiles: dict[str, float]
    dead: float
    """Share of latents that were active on none of these rows."""
    fvu: float
    """As per site, with each site's squared errors weighted by its scale²: what training sees."""
    sites: dict[str, SiteFigures]
    mean: dict[str, Tensor]
    """Mean activation per harvested site [D], raw."""


def reconstruction(coder: Coder, batches: Iterable[Tensor]) -> Reconstruction:
    """Figures of a coder over batches of harvested rows [R, columns], in `eval` mode.

    Raises:
        CrosslensError: there are no rows.
    """
    was_training = coder.training
    sums = _Sums(coder)
    with torch.no_grad():
        coder.eval()
        for rows_BX in batches:
            if len(rows_BX):
                sums.add(rows_BX)
        coder.train(was_training)
    return sums.figures()


class _Sums:
    """Everything is a sum over rows, kept in float64."""

    def __init__(self, coder: Coder) -> None:
        self.coder, self.wiring = coder, coder.wiring
        self.sites = site_names(self.wiring)
        device = coder.b_dec.device
        self.tokens = self.codes = 0
        self.l0_counts = torch.zeros(coder.wiring.n_latents + 1, dtype=torch.int64, device=device)
        self.fired_L = torch.zeros(coder.wiring.n_latents, dtype=torch.bool, device=device)
        self.harvested_X = torch.zeros(
            self.wiring.harvest.width, dtype=torch.float64, device=device
        )
        self.sum_P = [torch.zeros((), dtype=torch.float64, device=device) for _ in self.sites]
        self.error_P, self.square_P, self.ratio_P, self.cosine_P, self.norms_P = torch.zeros(
            5, len(self.sites), dtype=torch.float64, device=device
        )

    def add(self, rows_BX: Tensor) -> None:
        """One batch of harvested rows."""
        rows_BX = rows_BX.to(self.harvested_X.device)
        rows = all_rows(self.wiring, rows_BX)
        z_BL = self.coder.encode(rows.x_BX, rows.site_B)
        recon_BY = self.coder.decode(z_BL, rows.x_BX, rows.site_B)
        active_BL = z_BL != 0
        self.tokens += len(rows_BX)
        self.codes += len(z_BL)
        self.l0_counts += torch.bincount(active_BL.sum(-1), minlength=len(self.l0_counts))
        self.fired_L |= active_BL.any(0)
        self.harvested_X += rows_BX.sum(0, dtype=torch.float64)
        pairs = zip(
            by_site(self.wiring, rows.y_BY.float()), by_site(self.wiring, recon_BY), strict=True
        )
        for p, (target_BD, site_BD) in enumerate(pairs):
            self._add_site(p, target_BD, site_BD)

    def _add_site(self, p: int, x_BD: Tensor, recon_BD: Tensor) -> None:
        error_B = (x_BD - recon_BD).square().sum(-1)
        norm_B, recon_norm_B = x_BD.norm(dim=-1), recon_BD.norm(dim=-1)
        spread_B = (x_BD - x_BD.mean(0)).square().sum(-1)
        dot_B = (x_BD * recon_BD).sum(-1)
        tiny = torch.finfo(torch.float32).tiny
        self.sum_P[p] = self.sum_P[p] + x_BD.sum(0, dtype=torch.float64)
        self.error_P[p] += error_B.double().sum()
        self.square_P[p] += norm_B.double().square().sum()
        self.ratio_P[p] += (1 - error_B / spread_B.clamp_min(tiny)).double().sum()
        self.cosine_P[p] += (dot_B / (norm_B * recon_norm_B).clamp_min(tiny)).double().sum()
        self.norms_P[p] += (recon_norm_B / norm_B.clamp_min(tiny)).double().sum()

    def figures(self) -> Reconstruction:
        """What the sums amount to."""
        if not self.tokens:
            raise CrosslensError("There are no rows to evaluate: the token policy keeps none.")
        n = self.tokens
        mean_square_P = torch.stack([(each / n).square().sum() for each in self.sum_P])
        spread_P = self.square_P - n * mean_square_P
        weight_P = self.coder.scale_write.double().square()
        levels = torch.arange(len(self.l0_counts), device=self.l0_counts.device)
        harvest, mean_X = self.wiring.harvest, (self.harvested_X / n).float()
        return Reconstruction(
            tokens=n,
            l0=float((levels * self.l0_counts).sum() / self.codes),
            l0_quantiles=_quantiles(self.l0_counts, self.codes),
            dead=float((~self.fired_L).double().mean()),
            fvu=float((weight_P * self.error_P).sum() / (weight_P * spread_P).sum()),
            sites={site: self._site(p, spread_P) for p, site in enumerate(self.sites)},
            mean={s: mean_X[c] for s, c in zip(harvest.sites, harvest.slices, strict=True)},
        )

    def _site(self, p: int, spread_P: Tensor) -> SiteFigures:
        n = self.tokens
        return SiteFigures(
            fvu=float(self.error_P[p] / spread_P[p]),
            explained_variance=float(self.ratio_P[p] / n),
            cosine=float(self.cosine_P[p] / n),
            norm_ratio=float(self.norms_P[p] / n),
        )


def _quantiles(counts: Tensor, n: int) -> dict[str, float]:
    """The smallest level at or below which a share q of the rows lies."""
    below = counts.cumsum(0)
    return {f"{q:g}": float((below < q * n).sum()) for q in QUANTILES}

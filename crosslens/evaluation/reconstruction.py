"""How well and how sparsely a coder reconstructs rows, in one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.coder import Coder
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
    """Mean number of active latents."""
    l0_quantiles: dict[str, float]
    dead: float
    """Share of latents that were active on none of these rows."""
    fvu: float
    """As per site, with each site's squared errors weighted by its scale²: what training sees."""
    sites: dict[str, SiteFigures]
    mean: dict[str, Tensor]
    """Mean activation per site [D], raw."""


def reconstruction(coder: Coder, batches: Iterable[Tensor]) -> Reconstruction:
    """Figures of an autoencoding coder over batches of raw rows [R, X], in `eval` mode.

    Raises:
        CrosslensError: there are no rows.
    """
    was_training = coder.training
    sums = _Sums(coder)
    with torch.no_grad():
        coder.eval()
        for x_BX in batches:
            if len(x_BX):
                sums.add(x_BX)
        coder.train(was_training)
    return sums.figures()


class _Sums:
    """Everything is a sum over rows, kept in float64."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        write = coder.wiring.write
        n_sites, device = len(write.sites), coder.b_dec.device
        self.rows = 0
        self.l0_counts = torch.zeros(coder.wiring.n_latents + 1, dtype=torch.int64, device=device)
        self.fired_L = torch.zeros(coder.wiring.n_latents, dtype=torch.bool, device=device)
        self.sum_Y = torch.zeros(write.width, dtype=torch.float64, device=device)
        self.error_P, self.square_P, self.ratio_P, self.cosine_P, self.norms_P = torch.zeros(
            5, n_sites, dtype=torch.float64, device=device
        )

    def add(self, x_BX: Tensor) -> None:
        """One batch of rows; what is read is also what is to be written."""
        x_BX = x_BX.to(self.sum_Y.device)
        z_BL = self.coder.encode(x_BX)
        recon_BY = self.coder.decode(z_BL).float()
        active_BL = z_BL != 0
        self.rows += len(x_BX)
        l0_B = active_BL.sum(-1)
        self.l0_counts += torch.bincount(l0_B, minlength=len(self.l0_counts))
        self.fired_L |= active_BL.any(0)
        target_BY = x_BX.float()
        self.sum_Y += target_BY.sum(0, dtype=torch.float64)
        for p, columns in enumerate(self.coder.wiring.write.slices):
            self._add_site(p, target_BY[:, columns], recon_BY[:, columns])

    def _add_site(self, p: int, x_BD: Tensor, recon_BD: Tensor) -> None:
        error_B = (x_BD - recon_BD).square().sum(-1)
        norm_B, recon_norm_B = x_BD.norm(dim=-1), recon_BD.norm(dim=-1)
        spread_B = (x_BD - x_BD.mean(0)).square().sum(-1)
        dot_B = (x_BD * recon_BD).sum(-1)
        tiny = torch.finfo(torch.float32).tiny
        self.error_P[p] += error_B.double().sum()
        self.square_P[p] += norm_B.double().square().sum()
        self.ratio_P[p] += (1 - error_B / spread_B.clamp_min(tiny)).double().sum()
        self.cosine_P[p] += (dot_B / (norm_B * recon_norm_B).clamp_min(tiny)).double().sum()
        self.norms_P[p] += (recon_norm_B / norm_B.clamp_min(tiny)).double().sum()

    def figures(self) -> Reconstruction:
        if not self.rows:
            raise CrosslensError("There are no rows to evaluate: the token policy keeps none.")
        write, n = self.coder.wiring.write, self.rows
        mean_Y = self.sum_Y / n
        mean_P = torch.stack([mean_Y[c].square().sum() for c in write.slices])
        spread_P = self.square_P - n * mean_P
        weight_P = self.coder.scale_write.double().square()
        sites = {
            site: SiteFigures(
                fvu=float(self.error_P[p] / spread_P[p]),
                explained_variance=float(self.ratio_P[p] / n),
                cosine=float(self.cosine_P[p] / n),
                norm_ratio=float(self.norms_P[p] / n),
            )
            for p, site in enumerate(write.sites)
        }
        levels = torch.arange(len(self.l0_counts), device=self.l0_counts.device)
        return Reconstruction(
            tokens=n,
            l0=float((levels * self.l0_counts).sum() / n),
            l0_quantiles=_quantiles(self.l0_counts, n),
            dead=float((~self.fired_L).double().mean()),
            fvu=float((weight_P * self.error_P).sum() / (weight_P * spread_P).sum()),
            sites=sites,
            mean={s: mean_Y[c].float() for s, c in zip(write.sites, write.slices, strict=True)},
        )


def _quantiles(counts: Tensor, n: int) -> dict[str, float]:
    """The smallest level at or below which a share q of the rows lies."""
    below = counts.cumsum(0)
    return {f"{q:g}": float((below < q * n).sum()) for q in QUANTILES}

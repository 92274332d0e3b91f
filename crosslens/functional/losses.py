"""Summands of training objectives, before their weights."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def squared_error(
    target_BY: Float[Tensor, "b y"], recon_BY: Float[Tensor, "b y"]
) -> Float[Tensor, ""]:
    """mean_b Σ_y (x − x̂)²: summed over all sites written, averaged over rows."""
    return (target_BY - recon_BY).square().sum(-1).mean()


def variance(target_BY: Float[Tensor, "b y"]) -> Float[Tensor, ""]:
    """mean_b Σ_y (x − x̄)² about the batch mean; what `squared_error` is compared with."""
    return (target_BY - target_BY.mean(0)).square().sum(-1).mean()


def l1_of_norms(z_BL: Float[Tensor, "b l"], norm_LP: Float[Tensor, "l p"]) -> Float[Tensor, ""]:
    """mean_b Σ_l f_l Σ_s ‖W_dec[l, s]‖ (Anthropic, crosscoders, October 2024).

    The sum over sites, not the norm of the concatenation: it is what lets latents of one site
    or one model appear.
    """
    return (z_BL * norm_LP.sum(-1)).sum(-1).mean()


def residual_error(
    error_BY: Float[Tensor, "b y"], recon_BY: Float[Tensor, "b y"]
) -> Float[Tensor, ""]:
    """Σ(e − ê)² / Σ(e − ē)²: the share of a residual that its reconstruction leaves (AuxK).

    Gao et al. 2024, section A.2. The residual must come detached. A residual without variance
    has nothing to explain and costs 0.
    """
    spread = (error_BY - error_BY.mean(0)).square().sum()
    left = (error_BY - recon_BY).square().sum()
    return (left / spread.clamp_min(1e-30)).where(spread > 0, 0.0)

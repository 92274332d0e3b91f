"""What a reconstruction leaves, before weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def squared_error(
    target_BY: Float[Tensor, "b y"],
    recon_BY: Float[Tensor, "b y"],
    weight_Y: Float[Tensor, " y"] | None = None,
) -> Float[Tensor, ""]:
    """mean_b Σ_y w_y (x − x̂)²: summed over all sites written, averaged over rows; w = 1 if not
    given."""
    if weight_Y is None:  # in one pass, and another for the gradient
        return torch.nn.functional.mse_loss(recon_BY, target_BY, reduction="sum") / len(recon_BY)
    return _summed((target_BY - recon_BY).square(), weight_Y)


def variance(
    target_BY: Float[Tensor, "b y"], weight_Y: Float[Tensor, " y"] | None = None
) -> Float[Tensor, ""]:
    """mean_b Σ_y w_y (x − x̄)² about the batch mean; what `squared_error` is compared with."""
    return _summed((target_BY - target_BY.mean(0)).square(), weight_Y)


def share_of_residual(left: Float[Tensor, ""], error_BY: Float[Tensor, "b y"]) -> Float[Tensor, ""]:
    """Σ(e − ê)² / Σ(e − ē)²: the share of a residual that its reconstruction leaves (AuxK).

    Gao et al. 2024, section A.2. The residual must come detached. A residual without variance
    has nothing to explain and costs 0.

    Args:
        left: Σ(e − ê)² over rows and columns.
    """
    spread = (error_BY - error_BY.mean(0)).square().sum()
    return (left / spread.clamp_min(1e-30)).where(spread > 0, 0.0)


def nested_error(
    target_BY: Float[Tensor, "b y"],
    constant_BY: Float[Tensor, "b y"] | Float[Tensor, " y"],
    parts: Sequence[Float[Tensor, "b y"]],
) -> Float[Tensor, ""]:
    """Σ_j mean_b ‖x − (constant + Σ_{i≤j} part_i)‖²: the errors of all prefixes (Matryoshka SAEs;
    Bussmann et al. 2025)."""
    recon_BY, total = constant_BY, target_BY.new_zeros(())
    for part_BY in parts:
        recon_BY = recon_BY + part_BY
        total = total + squared_error(target_BY, recon_BY.expand_as(target_BY))
    return total


def _summed(square_BY: Tensor, weight_Y: Tensor | None) -> Tensor:
    if weight_Y is not None:
        square_BY = square_BY * weight_Y
    return torch.mean(square_BY.sum(-1))

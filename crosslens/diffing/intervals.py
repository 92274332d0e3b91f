"""Intervals of ratios of sums over groups of tokens, and of counts.

A ratio of sums, Σ_g top_g / Σ_g bottom_g, is what every scaling factor is. With few groups, and
latents that are active in fewer still, a percentile bootstrap is too narrow; `clustered_ratio` is
not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from crosslens.errors import UsageError

AT_A_TIME = 4096
"""Latents whose bootstrap draws are held together."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure per latent with its interval; NaN for a latent that was never active."""

    value_L: Float64[Tensor, " l"]
    low_L: Float64[Tensor, " l"]
    """Lower end; −∞ where the tokens bound it on no side."""
    high_L: Float64[Tensor, " l"]
    halves_HL: Float64[Tensor, "h l"]
    """The figure from the first half of the groups of tokens, and from the second."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One figure with its interval."""

    value: float
    low: float
    high: float


def clustered_ratio(
    top_GL: Float64[Tensor, "g l"],
    bottom_GL: Float64[Tensor, "g l"],
    weight_GL: Float64[Tensor, "g l"],
    level: float = 0.95,
) -> Estimate:
    """Σ top / Σ bottom per latent, with an interval that holds for few, unequal groups.

    top and bottom are each a slope times the weight, plus noise that is independent from group to
    group: α = Σ top / Σ weight and β = Σ bottom / Σ weight are regressions through the origin, and
    the figure is ρ = α/β. With h_g = weight_g / Σ weight, residuals u_g = top_g − α·weight_g and
    v_g = bottom_g − β·weight_g, the cluster-robust covariance "CR2" (Bell & McCaffrey 2002) is
    V_αβ = Σ_g u_g v_g / ((1 − h_g) (Σ weight)²), and the interval is Fieller's (1954): all ρ with
    (α − ρβ)² ≤ t²(V_αα − 2ρV_αβ + ρ²V_ββ), t Student's with Satterthwaite's degrees of freedom
    (`degrees_of_freedom`). Where bottom is the weight this is α ± t√V_αα.

    Where the set is not an interval (β may be 0, or the latent is active in one group) it is −∞, ∞.
    """
    weights_L = weight_GL.sum(0)
    share_GL = weight_GL / weights_L
    spread_GL = weights_L * (1 - share_GL).sqrt()
    alpha_L, beta_L = top_GL.sum(0) / weights_L, bottom_GL.sum(0) / weights_L
    u_GL = (top_GL - alpha_L * weight_GL) / spread_GL
    v_GL = (bottom_GL - beta_L * weight_GL) / spread_GL
    square_L = students_t(degrees_of_freedom(share_GL), level).square()
    low_L, high_L = _fieller(
        alpha_L.square() - square_L * u_GL.square().sum(0),
        alpha_L * beta_L - square_L * (u_GL * v_GL).sum(0),
        beta_L.square() - square_L * v_GL.square().sum(0),
    )
    value_L = top_GL.sum(0) / bottom_GL.sum(0)
    known_L = ~value_L.isnan()
    return Estimate(
        value_L=value_L,
        low_L=low_L.where(known_L, torch.nan),
        high_L=high_L.where(known_L, torch.nan),
        halves_HL=_halves(top_GL, bottom_GL),
    )


def _fieller(c_L: Tensor, b_L: Tensor, a_L: Tensor) -> tuple[Tensor, Tensor]:
    """Where a·ρ² − 2b·ρ + c ≤ 0: from, to. Not an interval unless a > 0."""
    root_L = (b_L.square() - a_L * c_L).clamp_min(0).sqrt()
    bounded_L = a_L > 0
    low_L = ((b_L - root_L) / a_L).where(bounded_L, -torch.inf)
    high_L = ((b_L + root_L) / a_L).where(bounded_L, torch.inf)
    return low_L, high_L


def bootstrap_ratio(
    top_GL: Float64[Tensor, "g l"],
    bottom_GL: Float64[Tensor, "g l"],
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The same figure with a percentile interval over groups drawn with replacement (Efron 1979):
    the ratio of sums inside each draw. Draws in which bottom is 0 are left out.

    The usual interval, for comparison: with 16 groups one of 95 % holds the truth in 90 to 93 % of
    cases, and in 65 % where bottom is near 0 in a latent that is active in a few groups.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(top_GL)
    drawn_DG = torch.randint(n, (draws, n), generator=generator)
    times_GD = torch.zeros(n, draws, dtype=torch.float64)
    times_GD.scatter_add_(0, drawn_DG.T, torch.ones_like(times_GD))
    bounds = [
        _quantiles(times_GD, top_GK, bottom_GK, level)
        for top_GK, bottom_GK in zip(
            torch.split(top_GL, AT_A_TIME, dim=-1),
            torch.split(bottom_GL, AT_A_TIME, dim=-1),
            strict=True,
        )
    ]
    low_L, high_L = torch.cat(bounds, -1)
    return Estimate(
        value_L=top_GL.sum(0) / bottom_GL.sum(0),
        low_L=low_L,
        high_L=high_L,
        halves_HL=_halves(top_GL, bottom_GL),
    )


def _quantiles(times_GD: Tensor, top_GL: Tensor, bottom_GL: Tensor, level: float) -> Tensor:
    """Where the middle share `level` of the draws' ratios begins and ends, per latent [2, L]."""
    ratio_LD = (top_GL.T @ times_GD) / (bottom_GL.T @ times_GD)
    known_LD = ratio_LD.isfinite()
    sorted_LD = ratio_LD.where(known_LD, torch.nan).sort(dim=-1).values  # NaN comes last
    last_L = known_LD.sum(-1, keepdim=True) - 1
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    at_LQ = (ends * last_L).round().long().clamp_min(0)
    return sorted_LD.gather(-1, at_LQ).T


def _halves(top_GL: Tensor, bottom_GL: Tensor) -> Tensor:
    half = len(top_GL) // 2
    parts = (slice(0, half), slice(half, None))
    return torch.stack([top_GL[at].sum(0) / bottom_GL[at].sum(0) for at in parts])


def degrees_of_freedom(share_GL: Float64[Tensor, "g l"]) -> Float64[Tensor, " l"]:
    """Satterthwaite's degrees of freedom of the CR2 variance of a one-variable regression through
    the origin, from the groups' shares h_g of Σ weight (Bell & McCaffrey 2002; Imbens & Kolesár
    2016): 1 / (Σ h² + (Σ a)² − Σ a²), a = h²/(1 − h). Equal shares give G − 1.

    NaN where one group has everything.
    """
    squares_GL = share_GL.square()
    a_GL = squares_GL / (1 - share_GL)
    # Products of two groups' a, for (Σ a)² − Σ a² is lost to rounding where one has nearly all.
    inverse_L = squares_GL.sum(0) + 2 * (a_GL[1:] * a_GL.cumsum(0)[:-1]).sum(0)
    # Of two groups it is 1, which rounding would take below what Student's t is told of.
    return (1 / inverse_L).clamp_min(1.0)


def students_t(freedom_L: Float64[Tensor, " l"], level: float) -> Float64[Tensor, " l"]:
    """The t with P(|T| ≤ t) = level, for any degrees of freedom from 1 on; NaN below 1."""
    if not 0 < level < 1:
        raise UsageError(f"An interval's level is a share in (0, 1), found {level}.")
    t_L = torch.from_numpy(stdtrit(freedom_L.numpy(), (1 + level) / 2))
    return t_L.where(freedom_L >= 1, torch.nan)


def jackknife(value: float, left_out: NDArray[np.float64], level: float = 0.95) -> Interval:
    """A figure with an interval from its values with each group left out (Tukey 1958): standard
    error √((G−1)/G · Σ(θ₋g − mean)²), Student's t of G − 1 degrees of freedom."""
    n = len(left_out)
    if n < 2:
        return Interval(value=value, low=-np.inf, high=np.inf)
    error = float(np.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum()))
    reach = float(students_t(torch.tensor([n - 1.0], dtype=torch.float64), level)) * error
    return Interval(value=value, low=value - reach, high=value + reach)

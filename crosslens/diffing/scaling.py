"""How well each latent's direction in `b` explains what happens in `a`, and in `b` itself: exact
latent scaling (Minder et al. 2025, 2504.02922) of all latents in one pass.

With d = d_b, the latent's decoder in model b, β^m is the least-squares slope of a target y^m on
f·d over all tokens, β^m = Σ f⟨d, y^m⟩ / (Σ f² ‖d‖²), for two targets per model m:

- error: y^m = e^m + f·d^m, what the coder leaves of m without this latent. Since y^m differs
  from e^m by the latent's own part only, β^m = Σ f⟨d, e^m⟩ / (Σ f² ‖d‖²) + ⟨d, d^m⟩/‖d‖²: a sum
  over the entries of the code, where the definition asks for a regression per latent.
- reconstruction: y^m = x̂^m, what the coder makes of m with all its latents, biases included.

ν = β^a/β^b. High ν of the error: the latent is in `a` too, but its decoder there was shrunk away.
High ν of the reconstruction: other latents write it in `a` (decoupling). Low both: of b only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from crosslens import kernels
from crosslens.diffing.groups import Groups
from crosslens.diffing.intervals import (
    Estimate,
    bootstrap_ratio,
    clustered_ratio,
    degrees_of_freedom,
)
from crosslens.diffing.norms import Norms
from crosslens.diffing.pair import Pair
from crosslens.diffing.stream import Coded
from crosslens.errors import UsageError

NU_ERROR = 0.2
NU_RECONSTRUCTION = 0.5
"""Minder et al.: a latent is of the chat model only if both ratios are below these."""

Ratio = Callable[[Tensor, Tensor], Estimate]
"""(top, bottom), each [G, L] → Σ top / Σ bottom with an interval."""


class ScalingSums:
    """What both scalings need: five float64 numbers per group of tokens and latent, and a count.

    Raises:
        UsageError: a direction of one model means nothing in the other: their widths differ.
    """

    def __init__(self, pair: Pair, groups: Groups) -> None:
        _check(pair)
        self.pair, self.groups = pair, groups
        self.direction_LY = pair.decoders()[1].contiguous()
        shape = (groups.n, len(self.direction_LY))
        device = self.direction_LY.device
        self.count_L = torch.zeros(shape[1], dtype=torch.int64, device=device)
        self.square_GL = torch.zeros(shape, dtype=torch.float64, device=device)
        """Σ f²."""
        self.error_MGL = torch.zeros(2, *shape, dtype=torch.float64, device=device)
        """Σ f⟨d, e^m⟩ of a and of b."""
        self.recon_MGL = torch.zeros_like(self.error_MGL)
        """Σ f⟨d, x̂^m⟩."""

    def add(self, chunk: Coded) -> None:
        """The tokens of one chunk. Only active latents cost anything."""
        latent_E, device = chunk.latent_E, self.count_L.device
        group_E = self.groups.of_rows(chunk).to(device)[chunk.row_E]
        cell_E = group_E * len(self.count_L) + latent_E
        value_E = chunk.value_E.double()
        self.count_L += torch.bincount(latent_E, minlength=len(self.count_L))
        self.square_GL.view(-1).index_add_(0, cell_E, value_E.square())
        for sums_MGL, rows_RY in (
            (self.error_MGL, chunk.error_RY),
            (self.recon_MGL, chunk.recon_RY),
        ):
            for sums_GL, columns in zip(
                sums_MGL, (self.pair.columns_a, self.pair.columns_b), strict=True
            ):
                along_E = kernels.products(chunk.lists, rows_RY[:, columns], self.direction_LY)
                sums_GL.view(-1).index_add_(0, cell_E, value_E * along_E)


@dataclass(frozen=True, kw_only=True)
class LatentScaling:
    """β of both models and ν, from the errors and from the reconstructions."""

    count_L: Int64[Tensor, " l"]
    """Tokens on which each latent was active."""
    freedom_L: Float64[Tensor, " l"]
    """Degrees of freedom behind the intervals: about the groups of tokens that tell, less one."""
    beta_error_a: Estimate
    beta_error_b: Estimate
    nu_error: Estimate
    beta_reconstruction_a: Estimate
    beta_reconstruction_b: Estimate
    nu_reconstruction: Estimate


def latent_scaling(sums: ScalingSums, level: float = 0.95) -> LatentScaling:
    """All factors, with intervals that hold for rare latents as well (`clustered_ratio`)."""
    square_GL = sums.square_GL.cpu()
    return _scaling(sums, partial(clustered_ratio, weight_GL=square_GL, level=level))


def bootstrapped_scaling(
    sums: ScalingSums, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> LatentScaling:
    """The same factors with percentile intervals over groups drawn with replacement."""
    return _scaling(sums, partial(bootstrap_ratio, draws=draws, level=level, seed=seed))


def chat_specific(
    found: LatentScaling,
    norms: Norms,
    nu_error: float = NU_ERROR,
    nu_reconstruction: float = NU_RECONSTRUCTION,
) -> Bool[Tensor, " l"]:
    """Latents of b only, by Minder et al.'s rule on the estimates; never one that is not known.

    Nor one whose decoder is larger in `a`: the rule asks how much of d_b is in `a`, and where d_b
    is a remnant of noise, ν is any number, often far below 0.
    """
    error_L, recon_L = found.nu_error.value_L, found.nu_reconstruction.value_L
    return (error_L < nu_error) & (recon_L < nu_reconstruction) & (norms.b_L > norms.a_L)


def surely_chat_specific(
    found: LatentScaling,
    norms: Norms,
    nu_error: float = NU_ERROR,
    nu_reconstruction: float = NU_RECONSTRUCTION,
) -> Bool[Tensor, " l"]:
    """Those whose whole intervals lie below: the tokens at hand rule out that they are not."""
    error_L, recon_L = found.nu_error.high_L, found.nu_reconstruction.high_L
    return (error_L < nu_error) & (recon_L < nu_reconstruction) & (norms.b_L > norms.a_L)


def _scaling(sums: ScalingSums, ratio: Ratio) -> LatentScaling:
    d_a_LY, d_b_LY = (d.double().cpu() for d in sums.pair.decoders())
    square_L = d_b_LY.square().sum(-1)
    weight_GL = sums.square_GL.cpu()
    own_a_GL = (d_b_LY * d_a_LY).sum(-1) / square_L * weight_GL
    error_a_GL, error_b_GL = sums.error_MGL.cpu() / square_L
    recon_a_GL, recon_b_GL = sums.recon_MGL.cpu() / square_L
    error_a_GL, error_b_GL = error_a_GL + own_a_GL, error_b_GL + weight_GL
    return LatentScaling(
        count_L=sums.count_L.cpu(),
        freedom_L=degrees_of_freedom(weight_GL / weight_GL.sum(0)),
        beta_error_a=ratio(error_a_GL, weight_GL),
        beta_error_b=ratio(error_b_GL, weight_GL),
        nu_error=ratio(error_a_GL, error_b_GL),
        beta_reconstruction_a=ratio(recon_a_GL, weight_GL),
        beta_reconstruction_b=ratio(recon_b_GL, weight_GL),
        nu_reconstruction=ratio(recon_a_GL, recon_b_GL),
    )


def _check(pair: Pair) -> None:
    if not pair.same_width:
        pick = pair.coder.wiring.write.pick
        raise UsageError(
            f"Latent scaling puts directions of {pair.b} into {pair.a}, which needs equal widths; "
            f"they are {pick(pair.sites_b).widths} and {pick(pair.sites_a).widths}."
        )

"""Terms that ask for a good reconstruction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import Tensor

from crosslens import functional as F
from crosslens import kernels
from crosslens.coder import Activation, LayerConditioned, Pass, TopK, Wiring, WiringConfig
from crosslens.coder.activations import k_at
from crosslens.errors import UsageError, suggestion
from crosslens.training.objective.term import check_weight
from crosslens.training.schedule import Span


@dataclass(frozen=True, kw_only=True)
class Recon:
    """Squared error of the reconstruction, summed over sites, averaged over rows."""

    weight: float = 1.0
    ramp: Span = 0.0
    """Share of the run, or length, over which the weight rises linearly from 0."""
    normalize: bool = True
    """Divide by the batch's variance, so that the term is the FVU."""
    site_weights: dict[str, float] = field(default_factory=dict)
    """Site written (or glob) → factor on its error, and on its share of the variance; 1 for sites
    not named. Of several globs that fit, the last counts."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.recon")
        if any(not 0 <= factor < math.inf for factor in self.site_weights.values()):
            raise UsageError(
                f"objective.recon.site_weights must not be negative, found {self.site_weights}."
            )

    def __call__(self, step: Pass) -> Tensor:
        weight_Y = self._weights(step)
        error = F.squared_error(step.target_BY, step.recon_BY, weight_Y)
        return error / F.variance(step.target_BY, weight_Y) if self.normalize else error

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        if self.site_weights and isinstance(wiring, LayerConditioned):
            raise UsageError(
                "objective.recon.site_weights cannot be used with a layer-conditioned wiring: its "
                "sites share every column."
            )

    def check_wiring(self, wiring: Wiring) -> None:
        sites = wiring.write.sites
        for pattern in self.site_weights:
            if not any(fnmatchcase(site, pattern) for site in sites):
                raise UsageError(
                    f"objective.recon.site_weights names {pattern!r}, which is no site written."
                    f"{suggestion(pattern, sites)} Written are {', '.join(sites)}."
                )
        if self.site_weights and not any(self.factor(site) for site in sites):
            raise UsageError("objective.recon.site_weights are 0 for every site written.")

    def factor(self, site: str) -> float:
        """The factor on the error at `site`."""
        found = [w for pattern, w in self.site_weights.items() if fnmatchcase(site, pattern)]
        return found[-1] if found else 1.0

    def _weights(self, step: Pass) -> Tensor | None:
        if not self.site_weights:
            return None
        write = step.coder.wiring.write
        factors_P = step.target_BY.new_tensor([self.factor(site) for site in write.sites])
        return write.spread(factors_P)


@dataclass(frozen=True, kw_only=True)
class Matryoshka:
    """The sum of the errors of nested prefixes of the latents (Bussmann et al. 2025), the whole
    dictionary among them: use it with `recon.weight` 0.

    A prefix takes the same share of each group of latents, so that every site is written.
    """

    weight: float = 1.0
    ramp: Span = 0.0
    """Share of the run, or length, over which the weight rises linearly from 0."""
    fractions: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """What each prefix adds to the one before, as shares of the latents."""
    normalize: bool = True
    """Divide by the batch's variance, so that the term is a sum of FVUs."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.matryoshka")
        if not self.fractions or min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise UsageError(
                "objective.matryoshka.fractions must be positive and sum to 1, found "
                f"{self.fractions}."
            )

    def runs(self, n_latents: int) -> tuple[int, ...]:
        """How many of `n_latents` latents each prefix adds. The first has one at least."""
        ends = [min(n_latents, math.ceil(f * n_latents - 1e-6)) for f in accumulate(self.fractions)]
        ends[-1] = n_latents
        return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))

    def __call__(self, step: Pass) -> Tensor:
        coder = step.coder
        sizes = [self.runs(group.n_latents) for group in coder.wiring.groups]
        runs = iter(F.split_columns(step.code, [n for group in sizes for n in group]))
        parts: list[Tensor | None] = [None] * len(self.fractions)
        for i, group in enumerate(sizes):
            for j, (n, start) in enumerate(zip(group, accumulate((0, *group)), strict=False)):
                run = next(runs)
                if n:
                    part_BY = F.upcast(step.decode_run(run, i, start))
                    known = parts[j]
                    parts[j] = part_BY if known is None else known + part_BY
        fixed_BY = coder.b_dec if step.skipped_BY is None else coder.b_dec + step.skipped_BY
        blank_BY = step.target_BY.new_zeros(())
        found = [(blank_BY if part is None else part).expand_as(step.target_BY) for part in parts]
        total = F.nested_error(step.target_BY, fixed_BY, found)
        return total / F.variance(step.target_BY) if self.normalize else total

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        """Fits every activation."""

    def check_wiring(self, wiring: Wiring) -> None:
        """Fits every wiring."""


@dataclass(frozen=True, kw_only=True)
class MultiTopK:
    """The error with `factor` times k latents (Gao et al. 2024, section 5.3), so that a code stays
    good when more latents are read off than it was trained with."""

    weight: float = 1 / 8
    ramp: Span = 0.0
    """Share of the run, or length, over which the weight rises linearly from 0."""
    factor: int = 4
    normalize: bool = True
    """Divide by the batch's variance, as the reconstruction's term does."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.multi_topk")
        if self.factor < 2:
            raise UsageError(f"objective.multi_topk.factor must be ≥ 2, found {self.factor}.")

    def __call__(self, step: Pass) -> Tensor:
        coder = step.coder
        activation = coder.activation
        assert isinstance(activation, TopK)
        k = min(self.factor * k_at(activation, step.progress), coder.wiring.n_latents)
        select = F.signed_topk if activation.signed else F.topk
        fixed_BY = coder.b_dec if step.skipped_BY is None else coder.b_dec + step.skipped_BY

        def error(pre_BL: Tensor, wanted_BY: Tensor) -> Tensor:
            recon_BY = F.upcast(coder.decode_scaled(select(pre_BL, k)))
            return (wanted_BY - recon_BY).square().sum()

        wanted_BY = step.target_BY - fixed_BY
        if step.known is None:
            value = F.sum_rows(error, (step.pre_BL, wanted_BY)) / len(wanted_BY)
        else:
            lists = kernels.largest(step.pre_BL, k, positive=not activation.signed)
            left_BY = wanted_BY - step.decode(step.entries(lists))
            value = left_BY.square().sum() / len(wanted_BY)
        return value / F.variance(step.target_BY) if self.normalize else value

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        if not isinstance(activation, TopK):
            raise UsageError(
                "objective.multi_topk needs coder.activation TopK, found "
                f"{type(activation).__name__}. Set objective.multi_topk.weight to 0."
            )

    def check_wiring(self, wiring: Wiring) -> None:
        """Fits every wiring."""


@dataclass(frozen=True, kw_only=True)
class AuxK:
    """Dead latents explain what the live ones leave (Gao et al. 2024, section A.2).

    The residual is detached and decoded without the bias, so that only dead latents learn.
    """

    weight: float = 1 / 32
    ramp: Span = 0.0
    """Share of the run, or length, over which the weight rises linearly from 0."""
    k: int = 128
    """Dead latents used per row, at most."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.aux")
        if self.k < 1:
            raise UsageError(f"objective.aux.k must be at least 1, found {self.k}.")

    def __call__(self, step: Pass) -> Tensor:
        if step.dead_L is None:
            return step.recon_BY.new_zeros(())
        dead = step.dead_L.nonzero().squeeze(-1)
        if not len(dead):
            return step.recon_BY.new_zeros(())
        # Only columns of dead latents: narrow, so nothing need be computed again for the gradient.
        k = min(self.k, len(dead))
        recon_BY = step.decode_columns(F.topk(step.columns(dead), k), dead)
        error_BY = (step.target_BY - step.recon_BY).detach()
        left_BY = error_BY - F.upcast(recon_BY)
        return F.share_of_residual(left_BY.square().sum(), error_BY)

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        """Fits every activation."""

    def check_wiring(self, wiring: Wiring) -> None:
        """Fits every wiring."""

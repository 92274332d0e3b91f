"""Terms that keep the code sparse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens import functional as F
from crosslens.coder import Activation, Pass, Wiring, WiringConfig
from crosslens.errors import UsageError
from crosslens.training.objective.term import (
    Norm,
    check_factor_count,
    check_factor_groups,
    check_factors,
    check_not_signed,
    check_positive,
    check_weight,
    factor_per_latent,
    latent_norms,
)
from crosslens.training.schedule import Span


@dataclass(frozen=True, kw_only=True)
class NormL1:
    """Σ_l f_l n_l (Anthropic, April and October 2024)."""

    weight: float = 0.0
    ramp: Span = 0.05
    """Share of the run, or length, over which the weight rises linearly from 0."""
    norm: Norm = "sum"
    """n_l: the sum of the sites' decoder norms, or the norm of all sites together."""
    group_factors: tuple[float, ...] = ()
    """A factor on the weight for each group of latents; none: 1. Designated shared latents are
    penalised with 0.1 to 0.2 (Anthropic, February 2025)."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.l1")
        check_factors(self.group_factors, "objective.l1.group_factors")

    def __call__(self, step: Pass) -> Tensor:
        norm_L = latent_norms(step.coder, self.norm)
        return F.l1_of_norms(step.code, norm_L * factor_per_latent(step.coder, self.group_factors))

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        check_not_signed("objective.l1", activation)
        check_factor_count(self.group_factors, "objective.l1.group_factors", wiring)

    def check_wiring(self, wiring: Wiring) -> None:
        check_factor_groups(self.group_factors, "objective.l1.group_factors", wiring)


@dataclass(frozen=True, kw_only=True)
class Tanh:
    """Σ_l tanh(c f_l n_l) (*Circuits Updates*, Anthropic, January 2025)."""

    weight: float = 0.0
    ramp: Span = 1.0
    """Share of the run, or length, over which the weight rises linearly from 0."""
    c: float = 4.0
    norm: Norm = "sum"
    """n_l: the sum of the sites' decoder norms, or the norm of all sites together."""
    group_factors: tuple[float, ...] = ()
    """A factor on the weight for each group of latents; none: 1."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.tanh")
        check_positive(self, "objective.tanh", "c")
        check_factors(self.group_factors, "objective.tanh.group_factors")

    def __call__(self, step: Pass) -> Tensor:
        factor_L = factor_per_latent(step.coder, self.group_factors)
        return F.tanh_of_norms(step.code, latent_norms(step.coder, self.norm), factor_L, self.c)

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        check_not_signed("objective.tanh", activation)
        check_factor_count(self.group_factors, "objective.tanh.group_factors", wiring)

    def check_wiring(self, wiring: Wiring) -> None:
        check_factor_groups(self.group_factors, "objective.tanh.group_factors", wiring)


@dataclass(frozen=True, kw_only=True)
class QuadraticTanh:
    """Σ_l p̂_l (1 + p̂_l/s) with p̂_l = mean_b tanh(c f_l n_l): dense latents cost more.

    OpenMOSS (Ge et al. 2025, 2509.17196, eq. 9; Llamascopium's `tanh-quad`), after a quadratic
    frequency penalty of Google DeepMind's.
    """

    weight: float = 0.0
    ramp: Span = 0.1
    """Share of the run, or length, over which the weight rises linearly from 0."""
    c: float = 4.0
    scale: float = 0.01
    """s: the firing rate from which on the quadratic part outweighs the linear one."""
    norm: Norm = "sum"
    """n_l: the sum of the sites' decoder norms, or the norm of all sites together."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.quadratic_tanh")
        check_positive(self, "objective.quadratic_tanh", "c", "scale")

    def __call__(self, step: Pass) -> Tensor:
        rate_L = F.tanh_frequency(step.code, latent_norms(step.coder, self.norm), self.c)
        return F.quadratic_frequency(rate_L, self.scale)

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        check_not_signed("objective.quadratic_tanh", activation)

    def check_wiring(self, wiring: Wiring) -> None:
        """Fits every wiring."""


@dataclass(frozen=True, kw_only=True)
class PAnneal:
    """Σ_l (f_l n_l)^p with p falling from 1 to `p_end` (Karvonen et al. 2024, 2408.00113)."""

    weight: float = 0.0
    ramp: Span = 0.05
    """Share of the run, or length, over which the weight rises linearly from 0."""
    p_end: float = 0.2
    start: float = 0.1
    """Share of the run after which p starts to fall, linearly until the end."""
    rescale: bool = True
    """Keep the term at the size of its p = 1 form, batch by batch, so that the pressure changes
    from large latents to small ones, not in total. The authors' code does it at each change of p
    with the mean of the last ten batches."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.p_anneal")
        if not 0 < self.p_end <= 1:
            raise UsageError(f"objective.p_anneal.p_end must be in (0, 1], found {self.p_end}.")
        if not 0 <= self.start < 1:
            raise UsageError(f"objective.p_anneal.start must be in [0, 1), found {self.start}.")

    def power(self, progress: float) -> float:
        """p when `progress` of the run is done."""
        done = max(0.0, (progress - self.start) / (1 - self.start))
        return 1 + (self.p_end - 1) * min(1.0, done)

    def __call__(self, step: Pass) -> Tensor:
        norm_L = latent_norms(step.coder, "sum")
        p = self.power(step.progress)
        value = F.power_of_norms(step.code, norm_L, p)
        if p == 1 or not self.rescale:
            return value
        with torch.no_grad():
            plain = F.power_of_norms(step.code, norm_L, 1.0)
        return value * (plain / value.detach().clamp_min(1e-30))

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        """Fits every activation."""

    def check_wiring(self, wiring: Wiring) -> None:
        """Fits every wiring."""

"""Terms for activations with a threshold or a gate of each latent's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crosslens import functional as F
from crosslens.coder import Activation, Gated, JumpReLU, Pass, Wiring, WiringConfig
from crosslens.errors import UsageError
from crosslens.training.objective.term import Norm, check_positive, check_weight, latent_norms
from crosslens.training.schedule import Span


@dataclass(frozen=True, kw_only=True)
class PreAct:
    """Σ_l ReLU(θ_l − pre_l) n_l on pre-activations of all latents, dead ones too.

    *Circuits Updates*, Anthropic, January 2025, with weight 3e-6.
    """

    weight: float = 0.0
    ramp: Span = 0.0
    """Share of the run, or length, over which the weight rises linearly from 0."""
    norm: Norm = "sum"
    """n_l: the sum of the sites' decoder norms, or the norm of all sites together."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.pre_act")

    def __call__(self, step: Pass) -> Tensor:
        norm_L = latent_norms(step.coder, self.norm)
        return F.preactivation_gap(step.pre_BL, _thresholds(step), norm_L)

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        _needs_jumprelu("objective.pre_act", activation)

    def check_wiring(self, wiring: Wiring) -> None:
        """Fits every wiring."""


@dataclass(frozen=True, kw_only=True)
class L0:
    """‖f‖₀, with a straight-through gradient to the thresholds only (Rajamanoharan et al. 2024);
    with a target, (2/L0*)(‖f‖₀ − L0*)² of each row (Gemma Scope 2)."""

    weight: float = 0.0
    ramp: Span = 0.0
    """Share of the run, or length, over which the weight rises linearly from 0."""
    target: float | None = None
    """L0*; None: the plain count."""
    density_weight: float = 0.0
    """Weight, within this term, of Σ_l max(0, p_l − density_limit), p_l the share of the batch's
    rows on which a latent fires: Gemma Scope 2 has such a penalty, whose form is not printed."""
    density_limit: float = 0.1

    def __post_init__(self) -> None:
        check_weight(self, "objective.l0")
        if self.target is not None:
            check_positive(self, "objective.l0", "target")
        if self.density_weight < 0 or not 0 <= self.density_limit < 1:
            raise UsageError(
                "objective.l0 needs density_weight ≥ 0 and density_limit in [0, 1), found "
                f"{self.density_weight} and {self.density_limit}."
            )

    def __call__(self, step: Pass) -> Tensor:
        activation = step.coder.activation
        assert isinstance(activation, JumpReLU)
        if isinstance(step.code, F.SparseCode):
            found = F.count_active_entries(step.code, _thresholds(step), activation.epsilon)
        else:
            found = F.count_active(step.pre_BL, _thresholds(step), activation.epsilon)
        count_B, rate_L = found
        if self.target is not None:
            count_B = 2 / self.target * (count_B - self.target).square()
        dense = torch.relu(rate_L - self.density_limit).sum()
        return count_B.mean() + self.density_weight * dense

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        _needs_jumprelu("objective.l0", activation)

    def check_wiring(self, wiring: Wiring) -> None:
        """Fits every wiring."""


@dataclass(frozen=True, kw_only=True)
class GatedL1:
    """Σ_l ReLU(π_l) n_l of the gate's pre-activations (Rajamanoharan et al. 2024, Gated SAEs).

    The paper has decoders of norm 1, where n_l = 1.
    """

    weight: float = 0.0
    ramp: Span = 0.05
    """Share of the run, or length, over which the weight rises linearly from 0."""
    norm: Norm = "sum"
    """n_l: the sum of the sites' decoder norms, or the norm of all sites together."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.gated_l1")

    def __call__(self, step: Pass) -> Tensor:
        pre = step.code if isinstance(step.code, F.SparseCode) else step.pre_BL
        return F.rectified_l1(pre, latent_norms(step.coder, self.norm))

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        _needs_gated("objective.gated_l1", activation)

    def check_wiring(self, wiring: Wiring) -> None:
        """Fits every wiring."""


@dataclass(frozen=True, kw_only=True)
class GatedAux:
    """‖x − x̂_frozen(ReLU(π))‖²: the gate alone reconstructs, with a decoder, bias and skip that
    this term does not move (Rajamanoharan et al. 2024, Gated SAEs)."""

    weight: float = 0.0
    ramp: Span = 0.0
    """Share of the run, or length, over which the weight rises linearly from 0."""
    normalize: bool = True
    """Divide by the batch's variance, as the reconstruction's term does."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.gated_aux")

    def __call__(self, step: Pass) -> Tensor:
        coder = step.coder
        wanted_BY = step.target_BY - coder.b_dec.detach()
        if step.skipped_BY is not None:
            wanted_BY = wanted_BY - step.skipped_BY.detach()

        def error(code: F.Code, wanted_BY: Tensor) -> Tensor:
            runs = F.split_columns(code, [group.n_latents for group in coder.wiring.groups])
            for i, run in enumerate(runs):
                wanted_BY = wanted_BY - F.upcast(coder.decode_run(run, i, frozen=True))
            return wanted_BY.square().sum()

        if isinstance(step.code, F.SparseCode):
            open_code = replace(step.code, values_N=torch.relu(step.code.pre_N))
            value = error(open_code, wanted_BY) / len(wanted_BY)
        else:

            def rectified(pre_BL: Tensor, wanted_BY: Tensor) -> Tensor:
                return error(torch.relu(pre_BL), wanted_BY)

            value = F.sum_rows(rectified, (step.pre_BL, wanted_BY)) / len(wanted_BY)
        return value / F.variance(step.target_BY) if self.normalize else value

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        _needs_gated("objective.gated_aux", activation)

    def check_wiring(self, wiring: Wiring) -> None:
        """Fits every wiring."""


def _thresholds(step: Pass) -> Tensor:
    activation = step.coder.activation
    assert isinstance(activation, JumpReLU)
    return activation.thresholds(step.coder)


def _needs_jumprelu(field: str, activation: Activation) -> None:
    if not isinstance(activation, JumpReLU):
        raise UsageError(
            f"{field} moves the thresholds of a JumpReLU, and coder.activation is "
            f"{type(activation).__name__}. Take --coder.activation jumprelu, or set "
            f"{field}.weight to 0."
        )


def _needs_gated(field: str, activation: Activation) -> None:
    if not isinstance(activation, Gated):
        raise UsageError(
            f"{field} trains the gate of a Gated activation, and coder.activation is "
            f"{type(activation).__name__}. Take --coder.activation gated, or set "
            f"{field}.weight to 0."
        )

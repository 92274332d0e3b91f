"""Activations with a threshold or a gate of each latent's own. Each is its own configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crosslens import functional as F
from crosslens import kernels
from crosslens.coder.activations.state import State
from crosslens.errors import UsageError
from crosslens.functional.gathers import Lists

_PUBLISHED = {
    "deepmind": {"initial_threshold": 0.001, "bandwidth": 0.001},
    "anthropic": {"initial_threshold": math.exp(0.1), "bandwidth": 2.0},
}


@dataclass(frozen=True, kw_only=True)
class ReLU:
    """f = max(pre, 0); sparsity must come from the objective."""

    def __call__(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Tensor:
        return F.relu(pre_BL)

    def entries(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Lists:
        """Where the code may be other than 0."""
        return kernels.above(pre_BL, torch.zeros_like(norm_L))

    def of_entries(self, pre_N: Tensor, latents_N: Tensor, state: State) -> Tensor:
        """The code at those places."""
        return pre_N


@dataclass(frozen=True, kw_only=True)
class JumpReLU:
    """x·1[x > θ] with a learnt threshold per latent, in float32.

    The published recipes differ in three numbers that belong together; `deepmind()`,
    `anthropic()` and `anthropic_clt()` give them.
    """

    form: Literal["deepmind", "anthropic"] = "deepmind"
    """`deepmind` learns θ itself, with gradient −θ/ε in the window; `anthropic` learns t = log θ,
    with gradient −e^t/ε as printed (a chain rule would have another factor e^t)."""
    initial_threshold: float | None = None
    """θ at the start, in either form; None: as the form's authors have it."""
    bandwidth: float | None = None
    """Width ε of the straight-through window around θ; None: as the form's authors have it."""
    input_gradient: bool = False
    """Also pass +θ/ε in the window to the pre-activation: beyond the published equations."""

    def __post_init__(self) -> None:
        # One form's numbers never stand in for the other's: half a preset is a wrong one.
        for name, value in _PUBLISHED[self.form].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.theta <= 0 or self.epsilon <= 0:
            raise UsageError(
                "JumpReLU needs initial_threshold > 0 and bandwidth > 0, found "
                f"{self.initial_threshold} and {self.bandwidth}."
            )

    @property
    def theta(self) -> float:
        """`initial_threshold`, known."""
        assert self.initial_threshold is not None
        return self.initial_threshold

    @property
    def epsilon(self) -> float:
        """`bandwidth`, known."""
        assert self.bandwidth is not None
        return self.bandwidth

    @classmethod
    def deepmind(cls) -> JumpReLU:
        """θ = ε = 0.001, for rows of unit mean square (Rajamanoharan et al. 2024)."""
        return cls(form="deepmind")

    @classmethod
    def anthropic(cls) -> JumpReLU:
        """log θ = 0.1, ε = 2, for rows of mean norm √n (*Circuits Updates*, January 2025)."""
        return cls(form="anthropic")

    @classmethod
    def anthropic_clt(cls) -> JumpReLU:
        """θ = 0.03, ε = 1 (cross-layer transcoders; *Circuit Tracing*, March 2025)."""
        return cls(form="anthropic", initial_threshold=0.03, bandwidth=1.0)

    def __call__(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Tensor:
        if self.form == "anthropic":
            assert state.log_threshold is not None
            return F.jumprelu_log(pre_BL, state.log_threshold, self.epsilon, self.input_gradient)
        assert state.threshold is not None
        return F.jumprelu(pre_BL, state.threshold, self.epsilon, self.input_gradient)

    def entries(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Lists:
        """Where the code may be other than 0, or the threshold has a gradient."""
        return kernels.above(pre_BL, self.thresholds(state).detach() - self.epsilon / 2)

    def of_entries(self, pre_N: Tensor, latents_N: Tensor, state: State) -> Tensor:
        """The code at those places."""
        if self.form == "anthropic":
            assert state.log_threshold is not None
            t_N, form = state.log_threshold[latents_N], F.jumprelu_log
            return form(pre_N[None], t_N, self.epsilon, self.input_gradient)[0]
        assert state.threshold is not None
        theta_N = state.threshold[latents_N]
        return F.jumprelu(pre_N[None], theta_N, self.epsilon, self.input_gradient)[0]

    def thresholds(self, state: State) -> Tensor:
        """θ per latent [L], with its gradient to what is learnt."""
        if self.form == "anthropic":
            assert state.log_threshold is not None
            return state.log_threshold.exp()
        assert state.threshold is not None
        return state.threshold


@dataclass(frozen=True, kw_only=True)
class Gated:
    """1[π > 0]·ReLU(e^r·(W_enc x) + b_mag) with π = W_enc x + b_enc (Rajamanoharan et al. 2024).

    The gate itself has no gradient: it learns from the terms `gated_l1` and `gated_aux`.
    """

    def __call__(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Tensor:
        assert state.r_mag is not None
        assert state.b_mag is not None
        return F.gated(pre_BL, state.b_enc, state.r_mag, state.b_mag)

    def entries(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Lists:
        """Where the gate is open."""
        return kernels.above(pre_BL, torch.zeros_like(norm_L))

    def of_entries(self, pre_N: Tensor, latents_N: Tensor, state: State) -> Tensor:
        """The code at those places."""
        assert state.r_mag is not None
        assert state.b_mag is not None
        per_latent = (state.b_enc, state.r_mag, state.b_mag)
        return F.gated(pre_N[None], *(value_L[latents_N] for value_L in per_latent))[0]

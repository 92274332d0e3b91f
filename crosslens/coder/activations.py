"""Activation functions of a coder. Each is its own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from crosslens import functional as F
from crosslens.errors import CrosslensError, UsageError


@runtime_checkable
class State(Protocol):
    """What an activation may look at and keep in its coder."""

    training: bool
    progress: float
    """Share of the training that is done."""
    threshold: Tensor | None
    """Learnt per latent, or running for the whole batch."""

    @property
    def b_enc(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ReLU:
    """f = max(pre, 0); sparsity must come from the objective."""

    def __call__(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Tensor:
        return F.relu(pre_BL)


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k largest of each row."""

    k: int = 32

    def __post_init__(self) -> None:
        _check_k(self.k)

    def __call__(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Tensor:
        return F.topk(pre_BL, self.k)


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """The B·k largest scores f·Σ_s‖W_dec[l, s]‖ of a batch; at inference, scores ≥ θ."""

    k: int = 32
    threshold_decay: float = 0.98
    """Share of the running threshold that a training step keeps."""

    def __post_init__(self) -> None:
        _check_k(self.k)
        if not 0 <= self.threshold_decay < 1:
            raise UsageError(f"threshold_decay must be in [0, 1), found {self.threshold_decay}.")

    def __call__(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Tensor:
        assert state.threshold is not None
        if not state.training:
            return F.above_threshold(pre_BL, norm_L, state.threshold)
        z_BL, kept = F.batch_topk(pre_BL, norm_L, self.k)
        # In place and without branching on values: a GPU need not wait for the answer.
        old = state.threshold.where(state.threshold.isfinite(), kept)
        decay = self.threshold_decay
        state.threshold.copy_(old * decay + kept.to(old.dtype) * (1 - decay))
        return z_BL


@dataclass(frozen=True, kw_only=True)
class JumpReLU:
    """x·1[x > θ] with a learnt threshold per latent (fp32)."""

    initial_threshold: float = 0.001
    bandwidth: float = 0.001
    """Width ε of the straight-through window around θ."""

    def __post_init__(self) -> None:
        if self.initial_threshold <= 0 or self.bandwidth <= 0:
            raise UsageError(
                "JumpReLU needs initial_threshold > 0 and bandwidth > 0, found "
                f"{self.initial_threshold} and {self.bandwidth}."
            )

    def __call__(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Tensor:
        assert state.threshold is not None
        return F.jumprelu(pre_BL, state.threshold, self.bandwidth)


Activation = ReLU | TopK | BatchTopK | JumpReLU


def activation_parameters(activation: Activation, n_latents: int) -> dict[str, tuple[Tensor, bool]]:
    """What an activation keeps in its coder: name → (initial value, whether it is learnt).

    BatchTopK's running threshold is not known (NaN) before its first training step.
    """
    match activation:
        case JumpReLU(initial_threshold=value):
            return {"threshold": (torch.full((n_latents,), value), True)}
        case BatchTopK():
            return {"threshold": (torch.tensor(torch.nan), False)}
        case _:
            return {}


def check_fits(activation: Activation, n_latents: int) -> None:
    """Refuse a k beyond the number of latents."""
    if isinstance(activation, TopK | BatchTopK) and activation.k > n_latents:
        raise UsageError(
            f"k is {activation.k} but the coder has only {n_latents} latents. "
            "Lower --coder.activation.k or raise --coder.latents."
        )


def check_calibrated(activation: Activation, threshold: Tensor | None) -> None:
    """Refuse to run a BatchTopK coder that was never trained: it has no threshold yet."""
    if isinstance(activation, BatchTopK) and not (threshold is not None and threshold.isfinite()):
        raise CrosslensError(
            "This BatchTopK coder has no inference threshold: it was saved before its first "
            "training step, or by a tool that keeps none. Train it, or calibrate a threshold."
        )


def _check_k(k: int) -> None:
    if k < 1:
        raise UsageError(f"k must be at least 1, found {k}.")

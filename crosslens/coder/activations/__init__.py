"""Activation functions of a coder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crosslens.coder.activations.gating import Gated, JumpReLU, ReLU
from crosslens.coder.activations.selecting import AbsTopK, BatchTopK, GroupMax, TopK, k_at
from crosslens.coder.activations.state import KEPT, State
from crosslens.errors import CrosslensError, UsageError

__all__ = [
    "KEPT",
    "AbsTopK",
    "Activation",
    "BatchTopK",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "ReLU",
    "State",
    "TopK",
    "activation_parameters",
    "check_calibrated",
    "check_fits",
    "entries_per_row",
    "k_at",
]

Activation = ReLU | TopK | AbsTopK | BatchTopK | GroupMax | JumpReLU | Gated


def activation_parameters(activation: Activation, n_latents: int) -> dict[str, tuple[Tensor, bool]]:
    """What an activation keeps in its coder: name → (initial value, whether it is learnt).

    BatchTopK's running threshold is not known (NaN) before its first training step.
    """
    match activation:
        case JumpReLU(form="anthropic", theta=theta):
            return {"log_threshold": (torch.full((n_latents,), math.log(theta)), True)}
        case JumpReLU(theta=theta):
            return {"threshold": (torch.full((n_latents,), theta), True)}
        case Gated():
            return {name: (torch.zeros(n_latents), True) for name in ("r_mag", "b_mag")}
        case BatchTopK():
            return {"threshold": (torch.tensor(torch.nan), False)}
        case _:
            return {}


def entries_per_row(activation: Activation, progress: float) -> int | None:
    """How many entries of a row are not 0, at most, or in the mean of a batch; None where that is
    not set."""
    match activation:
        case TopK() | BatchTopK():
            return k_at(activation, progress)
        case AbsTopK() | GroupMax():
            return activation.k
        case _:
            return None


def check_fits(activation: Activation, n_latents: int) -> None:
    """Refuse a k beyond the number of latents, or one that does not divide them into runs."""
    if isinstance(activation, GroupMax) and n_latents % activation.k:
        raise UsageError(
            f"coder.activation.k ({activation.k}) does not divide coder.latents ({n_latents}), so "
            "GroupMax cannot make k equal runs of them."
        )
    for name in ("k", "k_start"):
        k = getattr(activation, name, None)
        if k is not None and k > n_latents:
            raise UsageError(
                f"{name} is {k} but the coder has only {n_latents} latents. "
                f"Lower --coder.activation.{name.replace('_', '-')} or raise --coder.latents."
            )


def check_calibrated(activation: Activation, threshold: Tensor | None) -> None:
    """Refuse to run a BatchTopK coder that was never trained: it has no threshold yet."""
    if isinstance(activation, BatchTopK) and not (threshold is not None and threshold.isfinite()):
        raise CrosslensError(
            "This BatchTopK coder has no inference threshold: it was saved before its first "
            "training step, or by a tool that keeps none. Train it, or calibrate a threshold."
        )

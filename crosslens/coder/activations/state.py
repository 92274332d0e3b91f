"""What an activation may look at and keep in its coder."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

KEPT = ("threshold", "log_threshold", "r_mag", "b_mag")
"""Names of the tensors that activations keep in a coder; None where the activation has no such."""


@runtime_checkable
class State(Protocol):
    """What an activation may look at and keep in its coder."""

    training: bool
    progress: float
    """Share of the training that is done."""
    threshold: Tensor | None
    """θ: learnt per latent, or running for the whole batch."""
    log_threshold: Tensor | None
    """t = log θ, learnt per latent."""
    r_mag: Tensor | None
    """Gated: log of the magnitude path's weights over the gate's, per latent."""
    b_mag: Tensor | None
    """Gated: the magnitude path's bias."""

    @property
    def b_enc(self) -> Tensor: ...

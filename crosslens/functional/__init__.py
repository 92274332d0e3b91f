"""The mathematics: pure functions on tensors. Each names its equation."""

from crosslens.functional.activations import (
    above_threshold,
    batch_topk,
    jumprelu,
    relu,
    topk,
)
from crosslens.functional.losses import (
    l1_of_norms,
    residual_error,
    squared_error,
    variance,
)

__all__ = [
    "above_threshold",
    "batch_topk",
    "jumprelu",
    "l1_of_norms",
    "relu",
    "residual_error",
    "squared_error",
    "topk",
    "variance",
]

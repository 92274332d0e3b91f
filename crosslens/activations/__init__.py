"""From tokens to rows of activations: which positions count, their scale, their order."""

from crosslens.activations.calibrate import Calibration, Scale, calibrate
from crosslens.activations.harvest import (
    Chunk,
    Source,
    check_aligned,
    other_tokenizers,
    row_norms,
    site_layout,
)
from crosslens.activations.policy import Counts, TokenPolicy, token_mask, within_norms
from crosslens.activations.ring import Ring

__all__ = [
    "Calibration",
    "Chunk",
    "Counts",
    "Ring",
    "Scale",
    "Source",
    "TokenPolicy",
    "calibrate",
    "check_aligned",
    "other_tokenizers",
    "row_norms",
    "site_layout",
    "token_mask",
    "within_norms",
]

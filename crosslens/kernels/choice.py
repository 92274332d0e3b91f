"""When to hold only a code's entries."""

from __future__ import annotations

import torch

from crosslens.kernels.calibration import Size, find
from crosslens.kernels.cost import balance

ASSUMED = {
    ("cpu", torch.bfloat16): 0.03,
    ("cpu", torch.float32): 0.08,
    ("cuda", torch.bfloat16): 0.003,
    ("cuda", torch.float32): 0.02,
}
"""Break-even shares where nothing was measured: bytes/s of a gather over flop/s of a product, for
typical machines of today."""
CAUTIOUS = 0.01
TYPICAL = Size(rows=2048, read=2880, written=2880, latents=16_384)
"""The step for which the share is told where none is named."""


def break_even(dtype: torch.dtype, device: torch.device, size: Size = TYPICAL) -> float:
    """The share of a code's entries below which a training step is faster with these alone: from
    this machine's calibration at the nearest shape, or assumed where there is none.

    Args:
        dtype: of the products.
    """
    known = find(device).calibration
    rates = None if known is None else known.rates(dtype, size)
    if rates is None:
        return ASSUMED.get((device.type, dtype), CAUTIOUS)
    return balance(rates, size, dtype)

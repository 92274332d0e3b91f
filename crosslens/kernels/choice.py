"""When to hold only a code's entries."""

from __future__ import annotations

import torch

ASSUMED = {
    ("cpu", torch.bfloat16): 0.03,
    ("cpu", torch.float32): 0.08,
    ("cuda", torch.bfloat16): 0.003,
    ("cuda", torch.float32): 0.02,
}
"""Break-even shares where nothing was measured: bytes/s of a gather over flop/s of a product, for
typical machines of today."""
CAUTIOUS = 0.01


def break_even(dtype: torch.dtype, device: torch.device) -> float:
    """The share of a code's entries below which a training pass is faster with these alone."""
    return ASSUMED.get((device.type, dtype), CAUTIOUS)

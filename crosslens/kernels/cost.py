"""What a training step costs on a machine of known rates, with a whole code or its entries only.

The counts are those of `docs/performance.md`. Per row, a product over all latents takes 2 · width ·
latents operations, and one over a code's entries reads width numbers for each; per step, every
weight is stepped once.
"""

from __future__ import annotations

import torch

from crosslens.kernels.calibration import Rates, Size

FLOAT = 4
"""Bytes of a weight, and of a number of a row."""
PASSES = 6.5
"""Rows × latents tensors that a whole code, its gradient and what looks at them write anew."""
EFFORT = 40.0
"""What else is done for each of its pre-activations, in multiplications in cache: finding the
largest, say. Training knows better what its activation and its terms take."""

HALVINGS = 30

Parts = dict[str, float]
"""Seconds by part of a step."""


def shared(rates: Rates, size: Size, dtype: torch.dtype) -> Parts:
    """What both forms of a step do: the encoder's product and bias, and the decoder's norms."""
    places = size.rows * size.latents
    return {
        "encoder": 2 * places * size.read / rates.encode
        + rates.pass_seconds(places * dtype.itemsize),
        "norms": size.latents * size.written / rates.norms,
    }


def with_entries(rates: Rates, size: Size, dtype: torch.dtype, entries: float | int) -> Parts:
    """What a step does besides, if it holds the entries of its code only.

    Args:
        entries: per row, those of all codes that are decoded.
    """
    pairs = size.rows * entries
    gathered = pairs * size.written * dtype.itemsize
    summed = rates.sum_seconds(size.latents, size.read + size.written, pairs)
    return {
        "selection": size.rows * size.latents / rates.look + pairs / rates.take,
        "decoder": gathered / rates.bag_rows,
        "code's gradient": gathered / rates.products,
        # Once for the norm that clips them, and once to step.
        "weights' gradient": 2 * (pairs / rates.sort + summed),
        "optimizer": size.weights / rates.adam_rows,
    }


def with_whole_code(rates: Rates, size: Size, dtype: torch.dtype, effort: float = EFFORT) -> Parts:
    """What a step does besides, if it holds its whole code.

    Args:
        effort: as `EFFORT`.
    """
    places = size.rows * size.latents
    flop = 2 * places
    return {
        "selection": PASSES * rates.pass_seconds(places * dtype.itemsize)
        + places * effort / rates.block,
        "decoder": flop * size.written / rates.decode,
        "code's gradient": flop * size.written / rates.encode,
        "weights' gradient": flop * (size.read + size.written) / rates.weights,
        "optimizer": size.weights / rates.adam,
    }


def balance(rates: Rates, size: Size, dtype: torch.dtype) -> float:
    """The share of a code's entries at which both forms take equally long, in [0, 1]."""
    whole = sum(with_whole_code(rates, size, dtype).values())
    low, high = 0.0, float(size.latents)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        faster = sum(with_entries(rates, size, dtype, middle).values()) < whole
        low, high = (middle, high) if faster else (low, middle)
    return low / size.latents

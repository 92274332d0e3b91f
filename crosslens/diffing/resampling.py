"""Blocks or prompts drawn again with replacement: how far chance alone may have moved a figure."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.diffing.intervals import Interval
from crosslens.errors import UsageError

TIMES = 1000
LEVEL = 0.95
LEAST = 5
"""So many things at least: four can be drawn in 35 ways only, and the ends of a 95 % interval are
the 40th part of the draws each."""


def draws(n: int, seed: int, times: int = TIMES) -> Float[Tensor, "d n"]:
    """How often each of `n` things is drawn when `n` are drawn with replacement, so many times
    (bootstrap, Efron 1979). The first line is the sample itself: each thing once.

    Raises:
        UsageError: too few things to draw an interval from.
    """
    if n < LEAST:
        raise UsageError(
            f"An interval needs at least {LEAST} blocks or prompts to resample, found {n}. Give "
            "more tokens or prompts."
        )
    drawn_DN = torch.randint(n, (times, n), generator=torch.Generator().manual_seed(seed))
    count_DN = torch.zeros(times, n).scatter_add_(1, drawn_DN, torch.ones(times, n))
    return torch.cat([torch.ones(1, n), count_DN])


def interval(value_D: Float[Tensor, " d"]) -> Interval:
    """Of a figure computed on each line of `draws`: its value, and the percentiles of the rest.
    Lines on which it is not defined (NaN) are left out."""
    value_D = value_D.double()
    tail = (1 - LEVEL) / 2
    at = torch.tensor([tail, 1 - tail], dtype=torch.float64, device=value_D.device)
    low, high = value_D[1:].nanquantile(at).tolist()
    return Interval(value=float(value_D[0]), low=low, high=high)


def mean_over(sum_N: Float[Tensor, " n"], count_N: Float[Tensor, " n"], seed: int = 0) -> Interval:
    """Σ sum / Σ count over blocks, resampled block by block: tokens of a block are not
    independent."""
    count_DN = draws(len(sum_N), seed).double()
    return interval(count_DN @ sum_N.double() / (count_DN @ count_N.double()))

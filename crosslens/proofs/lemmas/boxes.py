"""Interval arithmetic: one box for many inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.proofs.rounding import Ball, down, exact, matmul, up


@dataclass(frozen=True)
class Box:
    """Reals between `low` and `high`, coordinate by coordinate."""

    low: Tensor
    high: Tensor


def sum_box(a: Box, b: Box) -> Box:
    """{x + y}."""
    return Box(down(a.low + b.low), up(a.high + b.high))


def linear_box(box: Box, W_DN: Float[Tensor, "D N"]) -> Box:
    """Holds xᵀ W for every x of the box.

    Proof. x = centre + e with |e| ≤ radius, so each coordinate is within |radius|ᵀ|W| of
    centreᵀ W. Any centre will do if the radius reaches both ends, which is checked in floats
    rounded up.
    """
    centre = (box.low + box.high) / 2
    radius = torch.maximum(up(box.high - centre), up(centre - box.low))
    found = matmul(Ball(centre, radius), exact(W_DN))
    return Box(found.lower, found.upper)


def relu_box(box: Box) -> Box:
    """relu is monotone."""
    return Box(box.low.clamp_min(0), box.high.clamp_min(0))

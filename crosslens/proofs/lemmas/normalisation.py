"""RMSNorm and LayerNorm on a ball."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.proofs.rounding import SLACK, down, norm_down, product_up, up


def rms_moves(
    x: Float[Tensor, "*s D"],
    eps: Float[Tensor, "*s"],
    gain: Tensor | None = None,
    floor: float = 0.0,
) -> Float[Tensor, "*s"]:
    """At least ‖R(x + e) − R(x)‖ over ‖e‖ ≤ eps, R(x) = gain ∘ x √D / √(‖x‖² + D floor).

    Proof. With y = (x, √(D floor)) in D + 1 dimensions, R is gain times √D times the first D
    coordinates of y/‖y‖. Dunkl and Williams: ‖y/‖y‖ − z/‖z‖‖ ≤ 2‖y − z‖/(‖y‖ + ‖z‖), and
    ‖z‖ ≥ ‖y‖ − eps. Never more than 2√D. A gain multiplies by max |gain|.
    `floor` is the small number that the norm adds to the mean square.
    """
    width = x.shape[-1]
    size = norm_down(x)
    if floor > 0:
        size = _with_floor(size, width * floor)
    return _scaled(_moves(size, eps, width), gain)


def layer_moves(
    x: Float[Tensor, "*s D"],
    eps: Float[Tensor, "*s"],
    gain: Tensor | None = None,
    floor: float = 0.0,
) -> Float[Tensor, "*s"]:
    """As `rms_moves` for LayerNorm; its shift cancels.

    Proof. LayerNorm is RMSNorm of the centred row, and centring, a projection, moves it by at most
    eps. The centred row's norm is bounded from below: the float mean is off by at most γ_D Σ|x|/D,
    which moves the row by at most √D times that.
    """
    width = x.shape[-1]
    centred = x - x.mean(-1, keepdim=True)
    off = up(x.abs().sum(-1) / width * ((width + 4) * SLACK)) * math.sqrt(width) * 2
    size = down(norm_down(centred) - up(off)).clamp_min(0)
    if floor > 0:
        size = _with_floor(size, width * floor)
    return _scaled(_moves(size, eps, width), gain)


def _with_floor(size: Tensor, floor: float) -> Tensor:
    """At most √(size² + floor)."""
    square = down(down(size * size) + floor * (1 - SLACK)).clamp_min(0)
    return down(square.sqrt() * (1 - SLACK))


def _moves(size: Tensor, eps: Tensor, width: int) -> Tensor:
    """2 √D eps / (2 size − eps), at most 2 √D; `size` is at most ‖y‖."""
    root = math.sqrt(width) * (1 + SLACK)
    size = size * (1 - SLACK)
    below = down(2 * size - eps)
    ratio = up(2 * root * eps / below) * (1 + SLACK)
    most = torch.full_like(ratio, 2 * root)
    return torch.where(below > 0, torch.minimum(ratio, most), most)


def _scaled(moves: Tensor, gain: Tensor | None) -> Tensor:
    return moves if gain is None else product_up(moves, gain.double().abs().max())

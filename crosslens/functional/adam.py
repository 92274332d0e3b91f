"""One step of Adam on rows of a weight matrix, from gradients that are not summed yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from crosslens.functional.gathers import Lists, bag_sum


@dataclass(frozen=True)
class RowGradient:
    """The gradient of a weight matrix [L, X], latent by latent: Σ weight · table[index]."""

    lists: Lists
    """For each latent, rows of the table."""
    weight_N: Tensor
    table_TX: Tensor


@dataclass(frozen=True, kw_only=True)
class AdamStep:
    """The numbers of one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    """Of this step, from 1."""
    scale: float | Tensor = 1.0
    """Factor on the gradient: what clipping leaves of it. A tensor [] need not leave the GPU."""
    projected: bool = False
    """Take out of each row's gradient what would only change the row's norm."""


@dataclass(frozen=True)
class AdamRows:
    """A weight matrix and what Adam keeps for it; changed in place."""

    weights_LX: Tensor
    mean_LX: Tensor | None
    """First moment; None with beta1 = 0, where it is the gradient itself. Like the second in the
    weights' format, or in bfloat16, then rounded as `rounded` says."""
    square_LX: Tensor
    seen_L: Tensor | None
    """int32, with beta1 = 0: the step at which each row was last touched. A row without gradient
    only has its second moment decay then, which is made up for when the row is next touched."""
    copy_LX: Tensor | None = None
    """The weights once more, in the format of the products."""


def projected(weights_LX: Tensor, gradient_LX: Tensor) -> Tensor:
    """The gradient without its part along each weight row."""
    square_L = weights_LX.square().sum(-1)
    along_L = (gradient_LX * weights_LX).sum(-1)
    share_L = (along_L / square_L).where(square_L > 0, 0.0)
    return gradient_LX - share_L[:, None] * weights_LX


def row_squares(gradient: RowGradient, project_on_LX: Tensor | None = None) -> Tensor:
    """Squared length of each latent's gradient [L]; of its projection if weights are given."""
    sum_LX = bag_sum(gradient.lists, gradient.weight_N, gradient.table_TX)
    if project_on_LX is not None:
        sum_LX = projected(project_on_LX, sum_LX)
    return sum_LX.square().sum(-1)


def rounded(value_RX: Tensor, row_R: Tensor, step: int, bits: int = 0) -> Tensor:
    """bfloat16 of float32, up or down at random with the chances that keep the mean (Gupta et al.
    2015). To the nearest, a moment that changes by less than 1/256 of itself a step would stay.

    What is drawn depends on row, column and step alone, so that training goes on to the bit.

    Args:
        row_R: the number of each row in its matrix.
        bits: which of a hash's two halves is used: 0 or 16.
    """
    width = value_RX.shape[1]
    place_RX = row_R[:, None] * width + torch.arange(width, device=value_RX.device)
    hash_RX = (place_RX + salt(step)) & _WORD
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # Wellons's lowbias32
        hash_RX = (hash_RX ^ (hash_RX >> shift)) * factor & _WORD
    hash_RX = hash_RX ^ (hash_RX >> 16)
    known_RX = value_RX.contiguous().view(torch.int32)
    drawn_RX = known_RX + ((hash_RX >> bits) & 0xFFFF).int()
    drawn_RX = (drawn_RX & -0x10000).view(torch.float32)
    return torch.where(value_RX.isfinite(), drawn_RX, value_RX).to(torch.bfloat16)


def salt(step: int) -> int:
    """What the hash of a step begins with."""
    return step * 0x9E3779B9 & _WORD


_WORD = 0xFFFFFFFF


def adam_rows(gradient: RowGradient, rows: AdamRows, how: AdamStep) -> None:
    """Kingma & Ba 2015 as `torch.optim.Adam` computes it, on all rows; with beta1 = 0, where that
    is the same, only on those that have a gradient."""
    grad_LX = bag_sum(gradient.lists, gradient.weight_N, gradient.table_TX)
    touched_R = torch.arange(len(grad_LX), device=grad_LX.device)
    if rows.seen_L is not None:
        touched_R = gradient.lists.counts_I.nonzero().squeeze(-1)
    step_rows(touched_R, grad_LX[touched_R], rows, how)


@torch.no_grad()
def step_rows(
    touched: Int64[Tensor, " r"], grad: Float[Tensor, "r x"], rows: AdamRows, how: AdamStep
) -> None:
    """The same for some rows, whose gradient is summed."""
    weights, square = rows.weights_LX[touched], rows.square_LX[touched].to(rows.weights_LX.dtype)
    if how.projected:
        grad = projected(weights, grad)
    grad = (grad * how.scale).to(weights.dtype)
    decay: Tensor | float = how.beta2
    if rows.seen_L is not None:
        decay = how.beta2 ** (how.step - rows.seen_L[touched])[:, None].to(weights.dtype)
        rows.seen_L[touched] = how.step
    square = decay * square + (1 - how.beta2) * grad.square()
    mean = grad
    if rows.mean_LX is not None:
        mean = rows.mean_LX[touched].to(weights.dtype)
        mean = mean + (1 - how.beta1) * (grad - mean)
        rows.mean_LX[touched] = _kept(mean, rows.mean_LX, touched, how.step, 16)
    root = square.sqrt() / (1 - how.beta2**how.step) ** 0.5 + how.eps
    weights = weights - how.lr / (1 - how.beta1**how.step) * mean / root
    rows.square_LX[touched] = _kept(square, rows.square_LX, touched, how.step, 0)
    rows.weights_LX[touched] = weights
    if rows.copy_LX is not None:
        rows.copy_LX[touched] = weights.to(rows.copy_LX.dtype)


def _kept(value_RX: Tensor, like: Tensor, row_R: Tensor, step: int, bits: int) -> Tensor:
    """In the format that the moment is kept in."""
    if like.dtype != torch.bfloat16:
        return value_RX
    return rounded(value_RX.float(), row_R, step, bits)

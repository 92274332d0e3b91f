"""One step of Adam on rows of a weight matrix, from gradients that are not summed yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
    """First moment; None with beta1 = 0, where it is the gradient itself."""
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


@torch.no_grad()
def adam_rows(gradient: RowGradient, rows: AdamRows, how: AdamStep) -> None:
    """Kingma & Ba 2015 as `torch.optim.Adam` computes it, on all rows; with beta1 = 0, where that
    is the same, only on those that have a gradient."""
    touched = slice(None) if rows.seen_L is None else gradient.lists.counts_I.nonzero().squeeze(-1)
    weights, square = rows.weights_LX[touched], rows.square_LX[touched]
    grad = bag_sum(gradient.lists, gradient.weight_N, gradient.table_TX)[touched]
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
        mean = rows.mean_LX + (1 - how.beta1) * (grad - rows.mean_LX)
        rows.mean_LX.copy_(mean)
    root = square.sqrt() / (1 - how.beta2**how.step) ** 0.5 + how.eps
    weights = weights - how.lr / (1 - how.beta1**how.step) * mean / root
    rows.square_LX[touched] = square
    rows.weights_LX[touched] = weights
    if rows.copy_LX is not None:
        rows.copy_LX[touched] = weights.to(rows.copy_LX.dtype)

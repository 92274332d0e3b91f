"""The fast forms of `functional.gathers` and `functional.adam`, the same but for rounding.

On the CPU, C that is compiled on first use; on CUDA, Triton; where neither is, torch's own
operations. What takes a call is decided by the device and format of its tensors alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosslens import functional as F
from crosslens.functional.adam import AdamRows, AdamStep, RowGradient
from crosslens.functional.gathers import Lists, starts_of
from crosslens.kernels.dispatch import chosen

__all__ = [
    "above",
    "adam_rows",
    "bag_sum",
    "largest",
    "largest_of_batch",
    "products",
    "row_squares",
]

SAMPLE = 64
"""Of so many rows of a batch one is looked at to guess its cut, but of so many at least."""
SLACK = 1.2
"""So many times the entries wanted are aimed at, so that the guess seldom leaves too few."""
TRIED = (1.0, 0.5, 0.1, 0.0)
"""Parts of the guess that are tried in turn until there are enough."""


def bag_sum(lists: Lists, weight_N: Tensor, table_TX: Tensor) -> Tensor:
    """Σ over each item's list of weight · table[index] [items, X]; `functional.gathers.bag_sum`."""
    return chosen(table_TX).bag_sum(lists, weight_N, table_TX)


def products(lists: Lists, rows_IX: Tensor, table_TX: Tensor) -> Tensor:
    """⟨rows[item], table[index]⟩ of each pair [N]; `functional.gathers.products`."""
    return chosen(table_TX).products(lists, rows_IX, table_TX)


def largest(pre_BL: Tensor, k: int, *, absolute: bool = False, positive: bool = False) -> Lists:
    """The k largest of each row; `functional.gathers.largest`."""
    return chosen(pre_BL).largest(pre_BL, k, absolute=absolute, positive=positive)


def above(pre_BL: Tensor, bar_L: Tensor) -> Lists:
    """The places of each row above their column's bar; `functional.gathers.above`."""
    return chosen(pre_BL).above(pre_BL, bar_L)


def row_squares(gradient: RowGradient, project_on_LX: Tensor | None = None) -> Tensor:
    """Squared length of each latent's gradient [L]; `functional.adam.row_squares`."""
    return chosen(gradient.table_TX, project_on_LX).row_squares(gradient, project_on_LX)


def adam_rows(gradient: RowGradient, rows: AdamRows, how: AdamStep) -> None:
    """A step of Adam on the rows of a weight matrix, in place; `functional.adam.adam_rows`."""
    kept = (rows.weights_LX, rows.mean_LX, rows.square_LX)
    moments = {t.dtype for t in kept[1:] if t is not None}
    alike = rows.weights_LX.dtype == torch.float32 and len(moments) == 1
    same = rows.copy_LX is None or rows.copy_LX.dtype == gradient.table_TX.dtype
    lazy_or_moving = (rows.mean_LX is None) == (rows.seen_L is not None)
    fit = alike and same and lazy_or_moving
    chosen(gradient.table_TX, rows.copy_LX, *kept, fit=fit).adam_rows(gradient, rows, how)


@torch.no_grad()
def largest_of_batch(pre_BL: Tensor, norm_L: Tensor, n: int) -> tuple[Lists, Tensor]:
    """The n largest scores relu(pre)·norm of a batch; `functional.gathers.largest_of_batch`.

    Nothing is sorted and no score of the whole batch is held: a sample of rows tells about where
    the cut is, one pass lists what is above it, and the choice is made among those.
    """
    norm_L = F.upcast(norm_L)
    guess = _guessed_cut(pre_BL, norm_L, n)
    for share in TRIED:
        # Without a norm there is no score.
        bar_L = (guess * share / norm_L).where(norm_L > 0, torch.inf)
        found = above(pre_BL, bar_L)
        score_N = _scores(pre_BL, norm_L, found)
        if len(score_N) >= n or float(guess) == 0:
            break
    if len(score_N) > n:
        found, score_N = _cut(found, score_N, n)
    if not len(score_N):
        return found, norm_L.new_zeros(())
    smallest = score_N.where(score_N > 0, torch.inf).min()  # a NaN is not the smallest
    return found, smallest.where(smallest < torch.inf, 0.0)


def _guessed_cut(pre_BL: Tensor, norm_L: Tensor, n: int) -> Tensor:
    """A score that somewhat more than n of the batch should reach."""
    if not pre_BL.numel():
        return norm_L.new_zeros(())
    sample_SL = pre_BL[:: max(1, min(SAMPLE, len(pre_BL) // SAMPLE))]
    wanted = min(sample_SL.numel(), int(SLACK * n * len(sample_SL) / len(pre_BL)) + 1)
    score = (F.upcast(torch.relu(sample_SL)) * norm_L).flatten()
    smallest = score.topk(wanted).values[-1]  # of sorted ones: a NaN among them is the first
    return smallest.nan_to_num(nan=0.0, posinf=0.0)


def _scores(pre_BL: Tensor, norm_L: Tensor, found: Lists) -> Tensor:
    index_N = found.index_N.long()
    places_N = found.items_N * pre_BL.shape[1] + index_N
    return F.upcast(pre_BL.reshape(-1)[places_N]) * norm_L[index_N]


def _cut(found: Lists, score_N: Tensor, n: int) -> tuple[Lists, Tensor]:
    chosen_N = largest(score_N[None], n).index_N.long()
    counts_B = torch.bincount(found.items_N[chosen_N], minlength=found.n_items)
    return Lists(starts_of(counts_B), found.index_N[chosen_N]), score_N[chosen_N]

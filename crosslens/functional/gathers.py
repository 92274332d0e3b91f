"""Sums and products over lists of rows, in plain torch: what the kernels must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.functional.blocks import upcast


@dataclass(frozen=True)
class Lists:
    """A list of numbers for each of some items: those of item i are
    `index_N[starts_I[i] : starts_I[i + 1]]`."""

    starts_I: Tensor
    """[items + 1], int64, from 0 to N."""
    index_N: Tensor
    """int32."""

    @property
    def n_items(self) -> int:
        return len(self.starts_I) - 1

    @property
    def counts_I(self) -> Tensor:
        """How long each item's list is [items]."""
        return self.starts_I.diff()

    @property
    def items_N(self) -> Tensor:
        """Whose list each number is in, int64."""
        numbers = torch.arange(self.n_items, device=self.starts_I.device)
        return numbers.repeat_interleave(self.counts_I, output_size=len(self.index_N))

    def within(self, numbers: slice) -> tuple[Lists, Tensor]:
        """The pairs whose number is in the slice, numbered from its start; and which they are (a
        mask [N])."""
        inside_N = (self.index_N >= numbers.start) & (self.index_N < numbers.stop)
        counts_I = torch.bincount(self.items_N[inside_N], minlength=self.n_items)
        return Lists(starts_of(counts_I), self.index_N[inside_N] - numbers.start), inside_N

    def turned(self, n: int) -> tuple[Lists, Tensor]:
        """The same pairs listed by number, of which there are `n`: for each the items that have it,
        ascending; and where each pair stood."""
        order_N = self.index_N.argsort(stable=True)
        counts = torch.bincount(self.index_N, minlength=n)
        return Lists(starts_of(counts), self.items_N[order_N].int()), order_N


def starts_of(counts_I: Tensor) -> Tensor:
    """Lengths of lists → where each starts, and the end."""
    return torch.nn.functional.pad(counts_I.cumsum(0), (1, 0))


def lists_of_mask(mask_BL: Tensor) -> Lists:
    """The places of each row that are set."""
    return Lists(starts_of(mask_BL.sum(-1)), mask_BL.nonzero()[:, 1].int())


def bag_sum(
    lists: Lists, weight_N: Float[Tensor, " n"], table_TX: Float[Tensor, "t x"]
) -> Float[Tensor, "i x"]:
    """Σ over each item's list of weight · table[index], in float32 or wider.

    With rows of a batch as items and the decoder as the table, the reconstruction; with latents as
    items and the rows' gradients as the table, the gradient of the decoder.
    """
    wide = upcast(table_TX)
    out_IX = wide.new_zeros(lists.n_items, table_TX.shape[1])
    rows_NX = wide[lists.index_N.long()] * weight_N[:, None].to(wide.dtype)
    return out_IX.index_add_(0, lists.items_N, rows_NX)


def products(
    lists: Lists, rows_IX: Float[Tensor, "i x"], table_TX: Float[Tensor, "t x"]
) -> Float[Tensor, " n"]:
    """⟨rows[item], table[index]⟩ of each pair, in float32 or wider: the product of two dense
    matrices, sampled at the pairs."""
    return (rows_IX[lists.items_N] * upcast(table_TX)[lists.index_N.long()]).sum(-1)


def largest(
    pre_BL: Float[Tensor, "b l"], k: int, *, absolute: bool = False, positive: bool = False
) -> Lists:
    """The k largest of each row, ascending by place; of equal ones at the cut, the first. With
    `absolute`, by size; with `positive`, without those that are 0 or less. What is not a number
    counts as the largest, so that it is not lost."""
    score_BL = pre_BL.abs() if absolute else pre_BL
    chosen_BK = score_BL.argsort(dim=-1, descending=True, stable=True)[:, :k]
    mask_BL = torch.zeros_like(pre_BL, dtype=torch.bool).scatter_(-1, chosen_BK, True)
    return lists_of_mask(mask_BL & ~(score_BL <= 0) if positive else mask_BL)


def above(pre_BL: Float[Tensor, "b l"], bar_L: Float[Tensor, " l"]) -> Lists:
    """The places of each row that are above their column's bar, or not a number."""
    return lists_of_mask(~(upcast(pre_BL) <= bar_L))


def largest_of_batch(
    pre_BL: Float[Tensor, "b l"], norm_L: Float[Tensor, " l"], n: int
) -> tuple[Lists, Float[Tensor, ""]]:
    """The places of the n largest scores relu(pre)·norm of a whole batch that are above 0, and the
    smallest of these scores (0 if there is none).

    Which of equal scores at the cut come in is not fixed.
    """
    score = (upcast(torch.relu(pre_BL)) * upcast(norm_L)).flatten()
    found = score.topk(min(n, len(score)), sorted=False)
    mask = torch.zeros_like(score, dtype=torch.bool).index_fill_(0, found.indices, True)
    lists = lists_of_mask((mask & ~(score <= 0)).view(pre_BL.shape))
    positive = found.values[found.values > 0]
    return lists, positive.min() if len(positive) else score.new_zeros(())

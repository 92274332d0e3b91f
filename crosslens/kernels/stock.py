"""The kernels in torch's own operations: any device, and the same results."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

from crosslens import functional as F
from crosslens.functional import adam as reference
from crosslens.functional.adam import AdamRows, AdamStep, RowGradient
from crosslens.functional.gathers import Lists, lists_of_mask, starts_of

BLOCK = 1 << 22
"""Elements gathered at a time."""


def bag_sum(lists: Lists, weight_N: Tensor, table_TX: Tensor) -> Tensor:
    """`functional.gathers.bag_sum` [items, X], by `embedding_bag`."""
    if not len(lists.index_N):
        return F.upcast(table_TX[:0]).new_zeros(lists.n_items, table_TX.shape[1])
    wide = F.upcast(table_TX) if table_TX.device.type == "mps" else table_TX
    sum_IX = torch.nn.functional.embedding_bag(
        lists.index_N,
        wide,
        lists.starts_I.to(lists.index_N.dtype),
        mode="sum",
        per_sample_weights=weight_N.to(wide.dtype),
        include_last_offset=True,
    )
    return F.upcast(sum_IX)


def products(lists: Lists, rows_IX: Tensor, table_TX: Tensor) -> Tensor:
    """`functional.gathers.products` [N], some pairs at a time."""
    rows_IX = F.upcast(rows_IX)
    out_N = rows_IX.new_empty(len(lists.index_N))
    items_N, size = lists.items_N, max(1, BLOCK // table_TX.shape[1])
    for start in range(0, len(out_N), size):
        at = slice(start, start + size)
        gathered = F.upcast(table_TX[lists.index_N[at]])
        out_N[at] = (rows_IX[items_N[at]] * gathered).sum(-1)
    return out_N


def largest(pre_BL: Tensor, k: int, *, absolute: bool = False, positive: bool = False) -> Lists:
    """`functional.gathers.largest`; which of equal numbers at the cut come in is torch's choice."""
    blocks = F.split_rows(pre_BL) if absolute else (pre_BL,)
    found = [(b.abs() if absolute else b).topk(k, dim=-1, sorted=False).indices for b in blocks]
    chosen_BK = torch.cat(found).sort(dim=-1).values
    if not positive:
        counts_B = torch.full((len(pre_BL),), k, device=pre_BL.device)
        return Lists(starts_of(counts_B), chosen_BK.flatten().int())
    score_BK = pre_BL.gather(-1, chosen_BK)
    on_BK = ~((score_BK.abs() if absolute else score_BK) <= 0)
    return Lists(starts_of(on_BK.sum(-1)), chosen_BK[on_BK].int())


def above(pre_BL: Tensor, bar_L: Tensor) -> Lists:
    """`functional.gathers.above`, some rows at a time."""
    parts = [lists_of_mask(~(F.upcast(block) <= bar_L)) for block in F.split_rows(pre_BL)]
    counts_B = torch.cat([part.counts_I for part in parts])
    return Lists(starts_of(counts_B), torch.cat([part.index_N for part in parts]))


def row_squares(gradient: RowGradient, project_on_LX: Tensor | None = None) -> Tensor:
    """`functional.adam.row_squares` [L]."""
    sum_LX = bag_sum(gradient.lists, gradient.weight_N, gradient.table_TX)
    if project_on_LX is not None:
        sum_LX = reference.projected(project_on_LX, sum_LX)
    return sum_LX.square().sum(-1)


@torch.no_grad()
def adam_rows(gradient: RowGradient, rows: AdamRows, how: AdamStep) -> None:
    """`functional.adam.adam_rows`; by torch's fused step where that keeps what is kept here."""
    if rows.mean_LX is None or rows.square_LX.dtype != rows.weights_LX.dtype:
        reference.adam_rows(gradient, rows, how)
        return
    sum_LX = bag_sum(gradient.lists, gradient.weight_N, gradient.table_TX)
    if how.projected:
        sum_LX = reference.projected(rows.weights_LX, sum_LX)
    adam(
        [rows.weights_LX],
        [sum_LX.mul_(how.scale).to(rows.weights_LX.dtype)],
        [rows.mean_LX],
        [rows.square_LX],
        [],
        [torch.tensor(how.step - 1.0, device=sum_LX.device)],
        fused=True,
        amsgrad=False,
        beta1=how.beta1,
        beta2=how.beta2,
        lr=how.lr,
        weight_decay=0.0,
        eps=how.eps,
        maximize=False,
    )
    if rows.copy_LX is not None:
        rows.copy_LX.copy_(rows.weights_LX)

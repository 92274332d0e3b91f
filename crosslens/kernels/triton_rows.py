"""The kernels in Triton, for CUDA.

Where TRITON_INTERPRET=1 was set before triton was imported, numpy does them on the CPU: for tests.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from crosslens.functional.adam import AdamRows, AdamStep, RowGradient, salt
from crosslens.functional.gathers import Lists, starts_of
from crosslens.kernels import triton_programs as programs

UNUSED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Formats that the kernels take → how many of a float32's last bits their numbers leave at 0."""
TILE = (8, 512)
"""Rows and columns of a table that a program reads at a time."""
SPAN = 2048
"""Places of a row of pre-activations that a program reads at a time."""


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels run on the tensors' device and know their formats."""
    device = "cuda" if isinstance(programs.bag_sum, triton.JITFunction) else "cpu"
    known = (t for t in tensors if t is not None)
    return all(t.device.type == device and t.dtype in UNUSED_BITS for t in known)


def bag_sum(lists: Lists, weight_N: Tensor, table_TX: Tensor) -> Tensor:
    """`functional.gathers.bag_sum` [items, X], float32."""
    width, columns = table_TX.shape[1], _columns(table_TX)
    out_IX = table_TX.new_empty(lists.n_items, width, dtype=torch.float32)
    grid = (lists.n_items, triton.cdiv(width, columns))
    fixed = (*_pairs(lists, weight_N), _flat(table_TX), width, out_IX, TILE[0], columns)
    _run(programs.bag_sum, grid, table_TX, fixed)
    return out_IX


def products(lists: Lists, rows_IX: Tensor, table_TX: Tensor) -> Tensor:
    """`functional.gathers.products` [N], float32."""
    out_N = table_TX.new_empty(len(lists.index_N), dtype=torch.float32)
    pairs = (_flat(lists.starts_I), _flat(lists.index_N))
    fixed = (*pairs, _flat(rows_IX), _flat(table_TX), table_TX.shape[1], out_N)
    _run(programs.products, (lists.n_items,), table_TX, (*fixed, TILE[0], _columns(table_TX)))
    return out_N


def largest(pre_BL: Tensor, k: int, *, absolute: bool = False, positive: bool = False) -> Lists:
    """`functional.gathers.largest`."""
    n_rows, width = pre_BL.shape
    out_BK = pre_BL.new_empty(n_rows, k, dtype=torch.int32)
    counts_B = pre_BL.new_empty(n_rows, dtype=torch.int64)
    options = (absolute, positive, UNUSED_BITS[pre_BL.dtype], _span(pre_BL))
    _run(programs.largest, (n_rows,), pre_BL, (_flat(pre_BL), width, k, out_BK, counts_B, *options))
    if k <= width and not positive:
        return Lists(starts_of(counts_B), out_BK.flatten())
    on_BK = torch.arange(k, device=pre_BL.device) < counts_B[:, None]
    return Lists(starts_of(counts_B), out_BK[on_BK])


def above(pre_BL: Tensor, bar_L: Tensor) -> Lists:
    """`functional.gathers.above`."""
    n_rows, width = pre_BL.shape
    counts_B = pre_BL.new_empty(n_rows, dtype=torch.int64)
    fixed = (_flat(pre_BL), width, _flat(bar_L))
    _run(programs.count_above, (n_rows,), pre_BL, (*fixed, counts_B, _span(pre_BL)))
    starts_B = starts_of(counts_B)
    out_N = pre_BL.new_empty(int(starts_B[-1]), dtype=torch.int32)
    _run(programs.places_above, (n_rows,), pre_BL, (*fixed, starts_B, out_N, _span(pre_BL)))
    return Lists(starts_B, out_N)


def row_squares(gradient: RowGradient, project_on_LX: Tensor | None = None) -> Tensor:
    """`functional.adam.row_squares` [L], float32."""
    lists, table_TX = gradient.lists, gradient.table_TX
    out_L = table_TX.new_empty(lists.n_items, dtype=torch.float32)
    weights = None if project_on_LX is None else _flat(project_on_LX)
    fixed = (*_pairs(lists, gradient.weight_N), _flat(table_TX), table_TX.shape[1], weights, out_L)
    _run(programs.row_squares, (lists.n_items,), table_TX, (*fixed, TILE[0], _columns(table_TX)))
    return out_L


@torch.no_grad()
def adam_rows(gradient: RowGradient, rows: AdamRows, how: AdamStep) -> None:
    """`functional.adam.adam_rows`; each row is summed, stepped and copied by one program."""
    lists, table_TX, scale = gradient.lists, gradient.table_TX, how.scale
    kept = (rows.weights_LX, rows.mean_LX, rows.square_LX, rows.seen_L, rows.copy_LX)
    assert all(t is None or t.is_contiguous() for t in kept), "they are changed in place"
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, device=table_TX.device)
    numbers = (
        how.lr / (1 - how.beta1**how.step),
        1 - how.beta1,
        1 - how.beta2,
        how.beta2,
        math.log2(how.beta2) if how.beta2 else -math.inf,
        1 / (1 - how.beta2**how.step) ** 0.5,
        how.eps,
        how.step,
        salt(how.step),
    )
    pairs = _pairs(lists, gradient.weight_N)
    fixed = (*pairs, _flat(table_TX), table_TX.shape[1], *kept, scale, *numbers, how.projected)
    _run(programs.adam_rows, (lists.n_items,), table_TX, (*fixed, TILE[0], _columns(table_TX)))


def _run(program: Any, grid: tuple[int, ...], like: Tensor, fixed: tuple[Any, ...]) -> None:
    """A kernel on the GPU that has `like`, which need not be the current one."""
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        program[grid](*fixed)


def _flat(value: Tensor) -> Tensor:
    return value.detach().contiguous()


def _pairs(lists: Lists, weight_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _flat(lists.starts_I), _flat(lists.index_N), _flat(weight_N)


def _columns(table_TX: Tensor) -> int:
    return min(TILE[1], int(triton.next_power_of_2(table_TX.shape[1])))


def _span(pre_BL: Tensor) -> int:
    return min(SPAN, int(triton.next_power_of_2(pre_BL.shape[1])))

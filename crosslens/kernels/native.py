"""The kernels in C, on the CPU. Threads share the items of a call; the sums stay the same."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from crosslens.functional.adam import AdamRows, AdamStep, RowGradient, salt
from crosslens.functional.gathers import Lists, starts_of
from crosslens.kernels.build import built

TABLES = {torch.bfloat16: "16", torch.float32: "32"}
"""Formats that the kernels are compiled for."""
SHARES = 8
"""Pieces per thread: lists differ in length, and a thread that is done early takes another."""


class _Adam(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("lr", "beta2", "eps", "fresh1", "fresh2")),
        *((name, ctypes.c_float) for name in ("scale", "bias1", "bias2")),
        ("step", ctypes.c_int64),
        ("projected", ctypes.c_int64),
        ("half", ctypes.c_int64),
        ("salt", ctypes.c_int64),
    )


def takes(*tensors: Tensor | None) -> bool:
    """Whether there are compiled kernels, and they are compiled for such tensors."""
    known = (t for t in tensors if t is not None)
    return built().compiled is not None and all(
        t.device.type == "cpu" and t.dtype in TABLES for t in known
    )


def bag_sum(lists: Lists, weight_N: Tensor, table_TX: Tensor) -> Tensor:
    """`functional.gathers.bag_sum` [items, X], float32."""
    table_TX, width = table_TX.contiguous(), table_TX.shape[1]
    out_IX = room(lists.n_items, width)
    fixed = (*_lists(lists), _floats(weight_N), table_TX, width, out_IX)
    _call("bag_sum", table_TX.dtype, lists.n_items, fixed)
    return out_IX


def products(lists: Lists, rows_IX: Tensor, table_TX: Tensor) -> Tensor:
    """`functional.gathers.products` [N], float32."""
    table_TX, out_N = table_TX.contiguous(), room(len(lists.index_N))
    fixed = (*_lists(lists), _floats(rows_IX), table_TX, table_TX.shape[1], out_N)
    _call("products", table_TX.dtype, lists.n_items, fixed)
    return out_N


def largest(pre_BL: Tensor, k: int, *, absolute: bool = False, positive: bool = False) -> Lists:
    """`functional.gathers.largest`."""
    pre_BL = pre_BL.contiguous()
    n_rows, width = pre_BL.shape
    out_BK = room(n_rows, k, dtype=torch.int32)
    counts_B = room(n_rows, dtype=torch.int64)
    fixed = (pre_BL, width, k, int(absolute), int(positive), out_BK, counts_B)
    _call("largest", pre_BL.dtype, n_rows, fixed)
    starts_B = starts_of(counts_B)
    if int(starts_B[-1]) == out_BK.numel():
        return Lists(starts_B, out_BK.flatten())
    return Lists(starts_B, out_BK[torch.arange(k) < counts_B[:, None]])


def above(pre_BL: Tensor, bar_L: Tensor) -> Lists:
    """`functional.gathers.above`."""
    pre_BL, bar_L = pre_BL.contiguous(), _floats(bar_L)
    n_rows, width = pre_BL.shape
    counts_B = room(n_rows, dtype=torch.int64)
    _call("count_above", pre_BL.dtype, n_rows, (pre_BL, width, bar_L, counts_B))
    starts_B = starts_of(counts_B)
    out_N = room(int(starts_B[-1]), dtype=torch.int32)
    _call("places_above", pre_BL.dtype, n_rows, (pre_BL, width, bar_L, starts_B, out_N))
    return Lists(starts_B, out_N)


def row_squares(gradient: RowGradient, project_on_LX: Tensor | None = None) -> Tensor:
    """`functional.adam.row_squares` [L], float32."""
    lists, table_TX = gradient.lists, gradient.table_TX.contiguous()
    out_L = room(lists.n_items)
    weights = None if project_on_LX is None else _floats(project_on_LX)
    fixed = (
        *_lists(lists),
        _floats(gradient.weight_N),
        table_TX,
        table_TX.shape[1],
        weights,
        out_L,
    )
    _call("row_squares", table_TX.dtype, lists.n_items, fixed)
    return out_L


@torch.no_grad()
def adam_rows(gradient: RowGradient, rows: AdamRows, how: AdamStep) -> None:
    """`functional.adam.adam_rows`; each row is summed, stepped and copied while it is in cache."""
    lists, table_TX = gradient.lists, gradient.table_TX.contiguous()
    step = _Adam(
        lr=how.lr,
        beta2=how.beta2,
        eps=how.eps,
        fresh1=1 - how.beta1,
        fresh2=1 - how.beta2,
        scale=float(how.scale),
        bias1=1 - how.beta1**how.step,
        bias2=(1 - how.beta2**how.step) ** 0.5,
        step=how.step,
        projected=int(how.projected),
        half=int(rows.square_LX.dtype == torch.bfloat16),
        salt=salt(how.step),
    )
    kept = (rows.weights_LX, rows.mean_LX, rows.square_LX, rows.seen_L, rows.copy_LX)
    assert all(t is None or t.is_contiguous() for t in kept), "they are changed in place"
    fixed = (
        ctypes.byref(step),
        *_lists(lists),
        _floats(gradient.weight_N),
        table_TX,
        table_TX.shape[1],
        *kept,
    )
    _call("adam_rows", table_TX.dtype, lists.n_items, fixed)


def _lists(lists: Lists) -> tuple[Tensor, Tensor]:
    return lists.starts_I.contiguous(), lists.index_N.contiguous()


def _floats(value: Tensor) -> Tensor:
    return value.detach().float().contiguous()


def _call(name: str, table: torch.dtype, n_items: int, fixed: tuple[Any, ...]) -> None:
    """A kernel compiled for a format of the table, over all items.

    Raises:
        MemoryError: it found no memory for one row.
    """
    results = shared_out(name + TABLES[table], n_items, fixed)
    if name in ("row_squares", "adam_rows", "largest"):
        check(results)


def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel writes to, whatever torch's own default format and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def check(results: list[int]) -> None:
    """What kernels return that may find no memory."""
    if any(results):
        raise MemoryError("There is no memory left for one row of numbers.")


def shared_out(name: str, n_items: int, fixed: tuple[Any, ...]) -> list[int]:
    """Call a kernel for all items, shared out over as many threads as torch uses; what each part
    returns, where the kernel returns anything."""
    library = built().compiled
    assert library is not None
    function: Callable[..., int] = getattr(library, name)
    arguments = tuple(map(_pointer, fixed))
    threads = torch.get_num_threads()

    def piece(bounds: tuple[int, int]) -> int:
        return function(*arguments, *map(ctypes.c_int64, bounds))

    if threads == 1:
        return [piece((0, n_items))]
    return list(_pool(threads).map(piece, _pieces(n_items, threads * SHARES)))


def _pointer(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value


def _pieces(n: int, pieces: int) -> Iterator[tuple[int, int]]:
    edges = sorted({n * i // pieces for i in range(pieces + 1)})
    return pairwise(edges)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="crosslens-kernel")

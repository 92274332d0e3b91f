"""Sums over rows that hold what they compute for a block of rows only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 1 << 18
"""Elements of a block: 1 MiB in float32. Of large tensors a block is `SHARE`, so that a GPU is not
kept busy with starting kernels."""
SHARE = 32


def upcast(value: Tensor) -> Tensor:
    """float32 from a shorter format; float32 and float64 as they are."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def split_rows(value_BX: Tensor, size: int | None = None) -> tuple[Tensor, ...]:
    """Views of `size` consecutive rows each; as many as fit into a block if not given."""
    return tuple(value_BX.split(size or _block_rows(value_BX)))  # type: ignore[no-untyped-call]


def sum_rows(
    function: Callable[..., Tensor], rows: Tensor | tuple[Tensor, ...], *others: Tensor
) -> Tensor:
    """Σ over blocks of rows of function(*blocks, *others).

    Equal to function(*rows, *others) where that is a sum over rows. What the gradient needs is
    computed again, block by block, so that no second rows × latents tensor outlives its block.

    Args:
        rows: one tensor or several with the same number of rows; the first is the widest.
    """
    rows = rows if isinstance(rows, tuple) else (rows,)
    size = _block_rows(rows[0])
    parts = [
        checkpoint(function, *blocks, *others, use_reentrant=False, preserve_rng_state=False)
        for blocks in zip(*(split_rows(each, size) for each in rows), strict=True)
    ]
    return torch.stack(parts).sum(0)


def _block_rows(value_BL: Tensor) -> int:
    return max(1, max(BLOCK, value_BL.numel() // SHARE) // max(1, value_BL.shape[-1]))

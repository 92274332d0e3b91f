"""A code that holds its entries only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from crosslens.functional.blocks import split_rows, sum_rows, upcast
from crosslens.functional.gathers import Lists


@dataclass(frozen=True)
class SparseCode:
    """The entries of a code [B, L] that are not zero, or that have a gradient."""

    lists: Lists
    """For each row, its latents, ascending."""
    values_N: Tensor
    pre_N: Tensor
    """The same entries' pre-activations."""
    n_latents: int

    def __len__(self) -> int:
        return self.lists.n_items

    @property
    def latents_N(self) -> Tensor:
        """The latent of each entry, int64."""
        return self.lists.index_N.long()

    def renumbered(self, start: int) -> SparseCode:
        """The same with `start` added to the latents' numbers."""
        if not start:
            return self
        lists = Lists(self.lists.starts_I, self.lists.index_N + start)
        return replace(self, lists=lists, n_latents=self.n_latents + start)

    def dense(self) -> Tensor:
        """The code itself [B, L]."""
        z_BL = self.values_N.new_zeros(len(self), self.n_latents)
        return z_BL.index_put((self.lists.items_N, self.latents_N), self.values_N)


Code = Tensor | SparseCode
"""Rows × latents: all of them, or the entries."""


def split_columns(code: Code, sizes: Sequence[int]) -> tuple[Code, ...]:
    """So many consecutive latents each, numbered from 0 again."""
    if isinstance(code, Tensor):
        return tuple(code.split(list(sizes), -1))  # type: ignore[no-untyped-call]
    if len(sizes) == 1:
        return (code,)
    ends = tuple(accumulate(sizes))
    return tuple(_columns(code, end - n, end) for n, end in zip(sizes, ends, strict=True))


def sum_entries(function: Callable[..., Tensor], code: Code, *vectors_L: Tensor) -> Tensor:
    """Σ over all entries of function(entry, *the latent's numbers), which must be 0 for entry 0."""
    if isinstance(code, SparseCode):
        at_N = code.latents_N
        return function(code.values_N, *(v[at_N] for v in vectors_L)).sum()
    return sum_rows(lambda z, *v: function(upcast(z), *v).sum(), code, *vectors_L)


def sum_by_latent(function: Callable[..., Tensor], code: Code, *vectors_L: Tensor) -> Tensor:
    """The same sum for each latent [L]."""
    if isinstance(code, SparseCode):
        at_N = code.latents_N
        value_N = function(code.values_N, *(v[at_N] for v in vectors_L))
        return value_N.new_zeros(code.n_latents).index_add(0, at_N, value_N)
    return sum_rows(lambda z, *v: function(upcast(z), *v).sum(0), code, *vectors_L)


def count_entries(code: Code) -> Tensor:
    """How many entries are not zero."""
    return torch.count_nonzero(code.values_N if isinstance(code, SparseCode) else code)


def fires(code: Code) -> Tensor:
    """Which latents are not zero in some row [L], without a mask of the whole code."""
    if isinstance(code, SparseCode):
        fired_L = torch.zeros(code.n_latents, dtype=torch.bool, device=code.values_N.device)
        return fired_L.index_put((code.latents_N[code.values_N != 0],), fired_L.new_ones(()))
    return torch.stack([(block != 0).any(0) for block in split_rows(code)]).any(0)


def _columns(code: SparseCode, start: int, stop: int) -> SparseCode:
    lists, inside_N = code.lists.within(slice(start, stop))
    return SparseCode(lists, code.values_N[inside_N], code.pre_N[inside_N], stop - start)

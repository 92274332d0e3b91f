"""Groups of tokens that intervals treat as independent of one another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from crosslens.diffing.stream import Coded
from crosslens.errors import UsageError
from crosslens.text import Blocks

GROUPS = 16
"""Sums are kept for so many groups. More would cost memory and hardly narrow an interval: with 16
Student's t is 2.13, with endless groups 1.96."""


@dataclass(frozen=True)
class Groups:
    """Every block is of one group. The two halves of split-half figures are its first and second
    half of groups."""

    of_block_N: Int64[Tensor, " n"]
    n: int = GROUPS

    def __post_init__(self) -> None:
        if self.n < 2:
            raise UsageError(f"An interval needs at least 2 groups of tokens, found {self.n}.")

    def of_rows(self, chunk: Coded) -> Tensor:
        """The group of each token of a chunk, on the CPU [R]."""
        return self.of_block_N[chunk.block_R]


def block_groups(n_blocks: int, n: int = GROUPS) -> Groups:
    """Blocks spread over groups: right where each block's text is independent of the others'."""
    return Groups(_spread(torch.arange(n_blocks), n), n)


def document_groups(blocks: Blocks, n: int = GROUPS) -> Groups:
    """Blocks that begin in the same document stay together.

    A document longer than a block gives rows that resemble each other in several blocks; spread
    over groups they would pass for independent ones, and intervals would be too narrow.
    """
    begun_NT = blocks.docs_NT.long()
    first_N = (begun_NT >= 0).int().argmax(-1)
    return Groups(_spread(begun_NT.gather(1, first_N[:, None])[:, 0], n), n)


def _spread(number_N: Tensor, n: int) -> Tensor:
    """Numbers → groups, evenly, the same on every machine: the upper bits of number · 2⁶⁴/φ
    (Fibonacci hashing)."""
    golden = -7046029254386353131  # 2⁶⁴/φ, as an int64
    upper_N = (number_N.long() * golden >> 33) & 0x7FFFFFFF
    return (upper_N * n) >> 31

"""Which blocks of a chunk go through the models together, and how far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from crosslens.text import Blocks


@dataclass(frozen=True)
class Cut:
    """Tokens that one forward pass gets, ending where the last position that counts is."""

    tokens_BT: Tensor
    position_r: Tensor
    """Where the batch's rows lie among their positions, block after block."""


@dataclass(frozen=True)
class Batch:
    """Blocks that go through the models together."""

    at_r: Tensor
    """Which of the chunk's rows lie in these blocks."""
    shared: Cut
    own: Mapping[str, Cut]
    """For models with a tokenizer of their own."""

    def of(self, model: str) -> Cut:
        """What `model` gets."""
        return self.own.get(model, self.shared)


def batches(blocks: Blocks, counts_BT: Bool[Tensor, "b t"]) -> Iterator[Batch]:
    """The blocks of a chunk, those that end early together, so that little of a batch is padding;
    blocks of which nothing counts are left out.

    Args:
        counts_BT: positions that may count: the chunk's rows, in this order.
    """
    block_R, position_R = counts_BT.nonzero(as_tuple=True)
    n_positions = counts_BT.shape[1]
    needed_B = (counts_BT * torch.arange(1, n_positions + 1)).amax(1)
    length_B = _in_quarters(needed_B, n_positions)
    for length in sorted(set(length_B[length_B > 0].tolist())):
        mine_B = length_B == length
        at_r = mine_B[block_R].nonzero().squeeze(-1)
        block_r, position_r = block_R[at_r], position_R[at_r]
        place_r = (mine_B.cumsum(0) - 1)[block_r]
        shared = Cut(blocks.tokens_NT[mine_B, :length], place_r * length + position_r)
        own = {}
        for model in blocks.others:
            tokens_NS = blocks.of(model).tokens_NT
            own_r = blocks.places(model, block_r, position_r)
            reach = int(_in_quarters(own_r.max() + 1, tokens_NS.shape[1]))
            own[model] = Cut(tokens_NS[mine_B, :reach], place_r * reach + own_r)
        yield Batch(at_r, shared, own)


def _in_quarters(needed: Tensor, length: int) -> Tensor:
    """So many positions or a few more: each length costs kernels of its own, so there are few."""
    quarter = -(-length // 4)
    return ((needed + quarter - 1) // quarter * quarter).clamp_max(length)

"""The tokens of a chunk in blocks of like size, their pairs, and what goes into their neurons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from crosslens.functional.gathers import Lists
from crosslens.interactions.neurons.contributions import Branch, Effective, SiteChunk
from crosslens.kernels import pairs as kernel

ALWAYS, ERROR = -2, -1
"""Where the always-on part and the error are among the members of a row: after all latents."""
SLOTS = 256
"""Members of a block, those of padding included, whose contributions are held: 1.5 MB of a layer of
1536 neurons."""
MANY = 1 << 13
"""The same where they are not held."""


@dataclass(frozen=True, eq=False)
class Block:
    """Some tokens, padded to the longest of their lists. Their members are the K latents of the
    longest list, the always-on part and the error: M = K + 2."""

    row_B: Int64[Tensor, " b"]
    """Which of the chunk's rows."""
    entry_BK: Int64[Tensor, "b k"]
    """Which of the chunk's entries; padding points to some other row's."""
    valid_BK: Bool[Tensor, "b k"]
    pair_Q: Int64[Tensor, " q"]
    """Each pair's place in a [B, M, M] matrix, laid flat."""
    place_Q: Int64[Tensor, " q"]
    """Its place among the keys of the chunk."""

    @property
    def n_members(self) -> int:
        return self.entry_BK.shape[1] + 2

    @property
    def token_Q(self) -> Tensor:
        """Which of the block's tokens each pair is of."""
        return self.pair_Q // self.n_members**2

    def entries(self) -> tuple[Tensor, Tensor]:
        """The entries of the first and of the second latent of each pair."""
        slots, token_Q = self.n_members, self.token_Q
        first_Q, second_Q = self.pair_Q // slots % slots, self.pair_Q % slots
        return self.entry_BK[token_Q, first_Q], self.entry_BK[token_Q, second_Q]

    def only(self, wanted_Q: Bool[Tensor, " q"]) -> Block:
        """The same tokens with some of the pairs."""
        pair_Q, place_Q = self.pair_Q[wanted_Q], self.place_Q[wanted_Q]
        return Block(self.row_B, self.entry_BK, self.valid_BK, pair_Q, place_Q)


@dataclass(frozen=True, eq=False)
class PairIndex:
    """All pairs of latents that are active together on some token of a chunk."""

    blocks: tuple[Block, ...]
    key_U: Int64[Tensor, " u"]
    """i·L + j for i < j, ascending, each once."""
    count_U: Int64[Tensor, " u"]
    """On how many tokens."""


def pair_index(lists: Lists, n_latents: int, slots: int = SLOTS) -> PairIndex:
    """The pairs of a chunk's lists, whose latents ascend within a row."""
    parts = [_pairs(lists, row_B, n_latents) for row_B in _alike(lists.counts_I, slots)]
    keys = torch.cat([key_Q for _, key_Q in parts])
    key_U, place_N, count_U = torch.unique(keys, return_inverse=True, return_counts=True)
    places = place_N.split([len(key_Q) for _, key_Q in parts])
    blocks = [
        Block(block.row_B, block.entry_BK, block.valid_BK, block.pair_Q, place_Q)
        for (block, _), place_Q in zip(parts, places, strict=True)
    ]
    return PairIndex(tuple(blocks), key_U, count_U)


def _alike(counts_R: Tensor, slots: int) -> Iterator[Tensor]:
    """Rows with lists of similar length, together at most `slots` members unless it is one row."""
    order_R = counts_R.argsort(descending=True, stable=True)
    start = 0
    while start < len(order_R):
        size = max(1, slots // (int(counts_R[order_R[start]]) + 2))
        yield order_R[start : start + size]
        start += size


def _pairs(lists: Lists, row_B: Tensor, n_latents: int) -> tuple[Block, Tensor]:
    """A block whose pairs have no places yet, and their keys."""
    counts_B = lists.counts_I[row_B]
    slot_K = torch.arange(int(counts_B.max()), device=row_B.device)
    valid_BK = slot_K < counts_B[:, None]
    entry_BK = (lists.starts_I[row_B][:, None] + slot_K).where(valid_BK, 0)
    latent_BK = lists.index_N.long()[entry_BK] if len(slot_K) else entry_BK
    first_T, second_T = torch.triu_indices(len(slot_K), len(slot_K), 1, device=row_B.device)
    token_Q, at_Q = valid_BK[:, second_T].nonzero(as_tuple=True)
    first_Q, second_Q = first_T[at_Q], second_T[at_Q]
    n_members = len(slot_K) + 2
    pair_Q = (token_Q * n_members + first_Q) * n_members + second_Q
    key_Q = latent_BK[token_Q, first_Q] * n_latents + latent_BK[token_Q, second_Q]
    return Block(row_B, entry_BK, valid_BK, pair_Q, pair_Q), key_Q


@dataclass(frozen=True, eq=False)
class Members:
    """What each member of some rows contributes to every neuron."""

    inner_BMN: Float[Tensor, "b m n"]
    """To what the nonlinearity acts on: the neuron itself, or its gate."""
    size_BMN: Float[Tensor, "b m n"] | None
    """To what a gate multiplies, without its sign; None where there is none."""


@dataclass(frozen=True, eq=False)
class Beside:
    """What is there on every row of a chunk beside latents, in one branch: [R, N]."""

    always_RN: Tensor
    error_RN: Tensor


@dataclass(frozen=True, eq=False)
class Table:
    """A branch's weights, in the format that products are taken in."""

    branch: Branch
    E_LN: Float[Tensor, "l n"]

    def beside(self, chunk: SiteChunk) -> Beside:
        """What is there on a chunk's rows."""
        return Beside(chunk.constant(self.branch), chunk.error(self.branch))


@dataclass(frozen=True, eq=False)
class Tables:
    """Those of what the nonlinearity acts on and, where there is a gate, of what it multiplies."""

    inner: Table
    value: Table | None

    @property
    def fused(self) -> bool:
        """Whether a kernel makes `shared` from them, and members are never held."""
        tables = [self.inner] if self.value is None else [self.inner, self.value]
        return kernel.takes(*(each.E_LN for each in tables))

    @property
    def slots(self) -> int:
        """Members that a block should have."""
        return MANY if self.fused else SLOTS

    def beside(self, chunk: SiteChunk) -> tuple[Beside, Beside | None]:
        """What is there on a chunk's rows, in either."""
        return self.inner.beside(chunk), None if self.value is None else self.value.beside(chunk)


def tables(effective: Effective, dtype: torch.dtype) -> Tables:
    """What a gate multiplies is in that format unless a kernel takes it; what goes into the
    nonlinearity is always whole."""
    value, gate = effective.value, effective.gate
    if gate is None:
        return Tables(Table(value, value.E_LN), None)
    sparse = value.E_LN.dtype if kernel.takes(gate.E_LN, value.E_LN) else dtype
    return Tables(Table(gate, gate.E_LN), Table(value, value.E_LN.to(sparse)))


def members(
    chunk: SiteChunk, block: Block, given: Tables, besides: tuple[Beside, Beside | None]
) -> Members:
    """The contributions of a block's members; those of padding are zero."""
    inner_BMN = _contributions(chunk, block, given.inner.E_LN, besides[0])
    if given.value is None or besides[1] is None:
        return Members(inner_BMN, None)
    return Members(inner_BMN, _contributions(chunk, block, given.value.E_LN, besides[1]).abs_())


def weights(chunk: SiteChunk, block: Block) -> Float[Tensor, "b k"]:
    """Strength times the row's scalar of each latent of a block; zero at padding."""
    if not block.entry_BK.numel():
        return chunk.value_E.new_zeros(block.entry_BK.shape)
    return chunk.weight_E[block.entry_BK].where(block.valid_BK, 0.0)


def _contributions(chunk: SiteChunk, block: Block, E_LN: Tensor, other: Beside) -> Tensor:
    n_rows, n_latents = block.entry_BK.shape
    out_BMN = E_LN.new_empty(n_rows, n_latents + 2, E_LN.shape[1])
    if n_latents:
        latent_BK = chunk.lists.index_N[block.entry_BK]
        rows_BKN = E_LN.index_select(0, latent_BK.flatten()).view(*latent_BK.shape, -1)
        weight_BK = weights(chunk, block).to(E_LN.dtype)
        torch.mul(rows_BKN, weight_BK[..., None], out=out_BMN[:, :n_latents])
    out_BMN[:, ALWAYS] = other.always_RN[block.row_B]
    out_BMN[:, ERROR] = other.error_RN[block.row_B]
    return out_BMN

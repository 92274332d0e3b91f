"""First pass: what every pair of latents that meets does to a site's neurons, over all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.errors import CrosslensError
from crosslens.functional import pairs as F
from crosslens.interactions.neurons.contributions import Effective, SiteChunk
from crosslens.interactions.pairs.blocks import (
    ALWAYS,
    ERROR,
    MANY,
    Beside,
    Block,
    Members,
    PairIndex,
    members,
    pair_index,
    tables,
    weights,
)
from crosslens.interactions.pairs.bounds import bounds_of_many, own_bounds, product_strengths
from crosslens.interactions.pairs.fused import fused_gating, fused_sharing
from crosslens.interactions.sums import Gathering, Sums, fresh, summed

TOTALS = ("shared", "gram", "coupling")
"""Columns of the sums; the last only where it is not `gram` times something fixed.

`shared`: the pair's part of the row's own interaction (`functional.pairs.shared`); where gated, how
much of either's value is gated by the other (`gating`), both ways together. `gram`: Σ of √(a_i
a_j), or of a_i a_j where what interacts is a product (gated, squared ReLU), strengths times the
norm's scalar. `coupling`: the sound table, both ways together.
"""


@dataclass(frozen=True, kw_only=True)
class Met:
    """What the pairs of one site do, over all tokens."""

    effective: Effective
    tokens: int
    sums: Sums
    """One column for each of `columns`."""
    coupled: float
    """`coupling` of all pairs of latents."""
    always: float
    """`shared` between latents and the always-on part."""
    error: float
    """The same between latents, or the always-on part, and the coder's error."""

    @property
    def columns(self) -> tuple[str, ...]:
        return columns_of(self.effective)

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The latents of each key."""
        return self.sums.key_U // self.n_latents, self.sums.key_U % self.n_latents

    @property
    def n_latents(self) -> int:
        return len(self.effective.E_LN)

    def column(self, name: str) -> Tensor:
        """The sums of one measure, by key [U]."""
        if name in self.columns:
            return self.sums.total_UM[:, self.columns.index(name)]
        return self.column("gram") * bounds_of_many(self.effective, *self.pairs)

    def total(self, name: str) -> float:
        """Of all pairs of latents, also of those whose keys were dropped."""
        if name == "coupling":
            return self.coupled
        return float(self.sums.all_M[self.columns.index(name)])

    @property
    def whole(self) -> float:
        """`shared` of all pairs of members, the always-on part and the error among them. Without a
        gate, but for squared ReLU, that is Σ ‖w_out,n‖ min(P, Q) over all tokens."""
        return self.total("shared") + self.always + self.error


def columns_of(effective: Effective) -> tuple[str, ...]:
    """The columns of a site's sums."""
    return TOTALS[:-1] if product_strengths(effective) else TOTALS


class _Site:
    """The sums of one site as they grow."""

    def __init__(self, effective: Effective, dtype: torch.dtype) -> None:
        self.effective, self.columns = effective, columns_of(effective)
        self.tables = tables(effective, dtype)
        self.self_L = _coupling_with_self(effective) if product_strengths(effective) else None
        self.tokens, self.coupled, self.always, self.error = 0, 0.0, 0.0, 0.0

    def add(self, chunk: SiteChunk, index: PairIndex) -> Tensor:
        """Take in a chunk; gives the sums of its pairs, by key [U, M]."""
        besides = self.tables.beside(chunk)
        parts = [self._of_block(chunk, block, besides) for block in index.blocks]
        place_Q = torch.cat([block.place_Q for block in index.blocks])
        n_keys = len(index.key_U)
        columns = [
            summed(place_Q, torch.cat(column), n_keys) for column in zip(*parts, strict=True)
        ]
        total_UM = torch.stack(columns, -1)
        self.tokens += chunk.lists.n_items
        if self.self_L is None:
            self.coupled += float(total_UM[:, self.columns.index("coupling")].sum())
        else:
            self_E = self.self_L[chunk.lists.index_N]
            self.coupled -= float((chunk.weight_E.square() * self_E).sum(dtype=torch.float64))
        return total_UM

    def _of_block(
        self, chunk: SiteChunk, block: Block, besides: tuple[Beside, Beside | None]
    ) -> list[Tensor]:
        """Each measure of the block's pairs [Q]."""
        shared, *coupling = self._matrices(chunk, block, besides)
        self.always += float(shared[:, ALWAYS, :ALWAYS].sum())
        self.error += float(shared[:, ERROR, :ERROR].sum())
        matrices = [shared, _gram(chunk, block), *coupling]
        return [matrix.flatten()[block.pair_Q] for matrix in matrices]

    def _matrices(
        self, chunk: SiteChunk, block: Block, besides: tuple[Beside, Beside | None]
    ) -> list[Tensor]:
        """`shared` of all pairs of members [B, M, M], and the coupling where it is a column."""
        if self.tables.fused:
            return self._fused(chunk, block, besides)
        one, these = chunk.effective, members(chunk, block, self.tables, besides)
        if "coupling" in self.columns:
            coupling = F.coupling(one.mlp.kind, these.inner_BMN, one.out_norm_N)
            return [_shared(one, these), coupling]
        self.coupled += _coupled_with_self(one, these)
        return [_shared(one, these)]

    def _fused(
        self, chunk: SiteChunk, block: Block, besides: tuple[Beside, Beside | None]
    ) -> list[Tensor]:
        """`_matrices` by kernels."""
        given = chunk, block, self.tables, besides
        if self.tables.value is not None:
            shared, coupled_B = fused_gating(*given)
        else:
            shared, coupling, coupled_B = fused_sharing(*given)
            if "coupling" in self.columns:
                return [shared, coupling]
        self.coupled += float(coupled_B.sum())
        return [shared]

    def met(self, sums: Sums) -> Met:
        return Met(
            effective=self.effective,
            tokens=self.tokens,
            sums=sums,
            coupled=self.coupled,
            always=self.always,
            error=self.error,
        )


@torch.no_grad()
def meet(
    chunks: Iterable[Mapping[str, SiteChunk]],
    most_keys: int = 1 << 20,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Met]:
    """All measures of `TOTALS` for every pair that meets, per site, in one pass.

    Args:
        dtype: as in `PairPlan`.

    Memory: about 3·`most_keys` keys of 16 bytes, and 16 to 24 for each site; and a block of tokens.

    Raises:
        CrosslensError: no two latents are ever active on the same token.
    """
    sites: dict[str, _Site] = {}
    columns: dict[str, slice] = {}
    gathering = Gathering(most_keys)
    for by_site, index in indexed(chunks, lambda one: tables(one, dtype).slots):
        if not sites:
            sites = {name: _Site(chunk.effective, dtype) for name, chunk in by_site.items()}
            columns = _side_by_side(sites)
            gathering = Gathering(most_keys, [span.start for span in columns.values()])
        totals = [site.add(by_site[name], index) for name, site in sites.items()]
        gathering.add(fresh(index.key_U, index.count_U, torch.cat(totals, 1)))
    sums = gathering.sums() if sites else None
    if sums is None or not sums.all_count:
        tokens = max((site.tokens for site in sites.values()), default=0)
        raise CrosslensError(
            f"No two latents are active together on any of {tokens} tokens, so there are no pairs "
            "to measure. The code may be of one latent per token, or the threshold too high; use "
            "more tokens or a coder with a larger k."
        )
    return {name: site.met(sums.only(columns[name])) for name, site in sites.items()}


def indexed(
    chunks: Iterable[Mapping[str, SiteChunk]], slots: Callable[[Effective], int] = lambda _: MANY
) -> Iterator[tuple[Mapping[str, SiteChunk], PairIndex]]:
    """Chunks with their pairs, which all their sites share: they are of one code.

    Args:
        slots: how many members a site wants in a block.
    """
    for by_site in chunks:
        first = next(iter(by_site.values()))
        if any(chunk.lists is not first.lists for chunk in by_site.values()):
            raise ValueError("The sites of a chunk must share the lists of one code.")
        fewest = min(slots(chunk.effective) for chunk in by_site.values())
        yield by_site, pair_index(first.lists, len(first.effective.E_LN), fewest)


def _side_by_side(sites: Mapping[str, _Site]) -> dict[str, slice]:
    """The columns of each site, `shared` first."""
    found, start = {}, 0
    for name, site in sites.items():
        found[name] = slice(start, start + len(site.columns))
        start = found[name].stop
    return found


def _shared(one: Effective, these: Members) -> Tensor:
    """Of all pairs of a block's members [B, M, M], either way together."""
    kind, w_N = one.mlp.kind, one.out_norm_N
    if these.size_BMN is None:
        return F.shared(kind, these.inner_BMN, w_N)
    one_way = F.gating(kind, these.size_BMN, these.inner_BMN, w_N)
    return one_way + one_way.mT


def _gram(chunk: SiteChunk, block: Block) -> Tensor:
    strength_BK = weights(chunk, block)
    if not product_strengths(chunk.effective):
        strength_BK = strength_BK.sqrt()
    return torch.nn.functional.pad(strength_BK[:, :, None] * strength_BK[:, None], (0, 2, 0, 2))


def _coupling_with_self(one: Effective) -> Tensor:
    """At strength 1. Without a gate a bound is that of both orders of a pair, here of the one."""
    return own_bounds(one) / (1 if one.gate is not None else 2)


def _coupled_with_self(one: Effective, these: Members) -> float:
    """Σ of the coupling over all pairs of a block's latents, of each with itself too, where it is a
    product: the product of two sums."""
    inner_BKN = these.inner_BMN[:, :ALWAYS]
    if these.size_BMN is None:
        square_BN = inner_BKN.abs().sum(1).square() - torch.relu(-inner_BKN).sum(1).square()
        return float((square_BN @ one.out_norm_N).sum())
    size_BN = these.size_BMN[:, :ALWAYS].sum(1, dtype=inner_BKN.dtype)
    return float(((size_BN * inner_BKN.abs().sum(1)) @ one.out_norm_N).sum())

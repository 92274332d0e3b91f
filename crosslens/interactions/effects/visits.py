"""Where pairs meet, and in which blocks each is looked at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from crosslens.interactions.effects.choice import Chosen, EffectPlan
from crosslens.interactions.neurons.contributions import SiteChunk
from crosslens.interactions.pairs.table import Ints
from crosslens.text import Blocks

Singles: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Code:
    """Where each latent is active, and how strongly: entries latent by latent."""

    starts_L: Ints
    """[L + 1]: where the entries of each latent start, and the end."""
    place_E: Ints
    """block · T + position, ascending for each latent."""
    value_E: Singles

    @property
    def n_latents(self) -> int:
        return len(self.starts_L) - 1

    def of(self, latent: int) -> tuple[Ints, Singles]:
        """Where a latent is active, and how strongly."""
        at = slice(self.starts_L[latent], self.starts_L[latent + 1])
        return self.place_E[at], self.value_E[at]

    def meetings(self, i: int, j: int) -> Ints:
        """Where both are active."""
        return np.intersect1d(self.of(i)[0], self.of(j)[0], assume_unique=True)

    def jaccard(self, i: int, j: int) -> float:
        """Of the tokens on which either is active, the share on which both are."""
        both = len(self.meetings(i, j))
        either = len(self.of(i)[0]) + len(self.of(j)[0]) - both
        return both / either if either else 0.0

    def mean_product(self, i: int, j: int) -> float:
        """Mean of a_i·a_j over the tokens on which both are active."""
        (place_I, value_I), (place_J, value_J) = self.of(i), self.of(j)
        _, at_i, at_j = np.intersect1d(place_I, place_J, assume_unique=True, return_indices=True)
        return float((value_I[at_i] * value_J[at_j]).mean()) if len(at_i) else 0.0


def code_of(chunks: Iterable[Mapping[str, SiteChunk]]) -> Code:
    """The code of some chunks in order, which all their sites share."""
    ones = [next(iter(by_site.values())) for by_site in chunks]
    n_latents = len(ones[0].effective.decoder_LD)
    place_E = torch.cat([one.row_R[one.lists.items_N.cpu()] for one in ones])
    latent_E = torch.cat([one.lists.index_N.cpu() for one in ones]).long()
    value_E = torch.cat([one.value_E.cpu() for one in ones])
    order_E = latent_E.argsort(stable=True)
    ends_L = torch.bincount(latent_E, minlength=n_latents).cumsum(0)
    return Code(
        starts_L=np.append(0, ends_L.numpy()),
        place_E=place_E[order_E].numpy(),
        value_E=value_E[order_E].numpy(),
    )


def told_documents(blocks: Blocks) -> Ints:
    """The document of every position that predicts a token; −1 where there is none, or where the
    next position is padding or in no block [N, T]."""
    told_NT = blocks.docs_NT.numpy().astype(np.int64)
    told_NT[:, -1] = -1
    told_NT[:, :-1][blocks.padding_NT[:, 1:].numpy()] = -1
    return told_NT


@dataclass(frozen=True, eq=False)
class Visit:
    """A pair in a block."""

    pair: int
    """Its number among the chosen."""
    here_P: Ints
    """Positions at which both are active."""
    later_P: Ints
    """The other positions of the same documents that come after the first of them."""

    @property
    def position_P(self) -> Ints:
        """Those here, then the later ones."""
        return np.concatenate([self.here_P, self.later_P])


def visits(
    code: Code, chosen: Chosen, told_NT: Ints, plan: EffectPlan
) -> dict[int, Sequence[Visit]]:
    """Block → the pairs that are looked at in it.

    All pairs go through the blocks in one random order, so that those that share a latent share its
    passes too; each takes the blocks in which it meets until it has enough tokens, or blocks.
    """
    rank_N = np.random.default_rng(plan.seed).permutation(len(told_NT))
    found: dict[int, list[Visit]] = defaultdict(list)
    for pair, (i, j) in enumerate(zip(chosen.i_C.tolist(), chosen.j_C.tolist(), strict=True)):
        block_Q, position_Q = np.divmod(code.meetings(i, j), told_NT.shape[1])
        counts_Q = told_NT[block_Q, position_Q] >= 0
        places = block_Q[counts_Q], position_Q[counts_Q]
        for block, here_P in _some_blocks(*places, rank_N, plan):
            found[block].append(Visit(pair, here_P, _later(told_NT[block], here_P)))
    return dict(sorted(found.items()))


def _some_blocks(
    block_Q: Ints, position_Q: Ints, rank_N: Ints, plan: EffectPlan
) -> Iterator[tuple[int, Ints]]:
    blocks, tokens = np.unique(block_Q), 0
    for block in blocks[rank_N[blocks].argsort()][: plan.blocks].tolist():
        if tokens >= plan.tokens:
            return
        here_P = position_Q[block_Q == block]
        tokens += len(here_P)
        yield block, here_P


def _later(told_T: Ints, here_P: Ints) -> Ints:
    inside_T = np.zeros(len(told_T), np.bool_)
    for document in np.unique(told_T[here_P]):
        first = here_P[told_T[here_P] == document].min()
        inside_T |= (told_T == document) & (np.arange(len(told_T)) > first)
    inside_T[here_P] = False
    return np.flatnonzero(inside_T)

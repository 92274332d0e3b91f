"""Which pairs' effects are measured: the top ones, and two kinds of others to compare them with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosslens.errors import CrosslensError, UsageError
from crosslens.interactions.pairs.contexts import ContextPlan
from crosslens.interactions.pairs.table import Ints, Order, Triplets
from crosslens.interactions.pairs.totals import Met

CHOICES = ("top", "random", "cooccurring")
"""The highest of the table; any that meet; any that meet about as often as the top ones."""
NEAR = 10
"""A pair that meets as often as another is drawn from so many whose counts are nearest."""


@dataclass(frozen=True, kw_only=True)
class EffectPlan:
    """Which effects are measured, and on how much."""

    pairs: int = 50
    """Of each of `CHOICES`, all sites together."""
    tokens: int = 64
    """Meetings per pair that are measured, about: whole blocks are taken until there are enough."""
    blocks: int = 4
    """Blocks per pair, at most. Each costs three passes from the site on, less what pairs share."""
    positions: int = 8192
    """So much of the source is looked at, in blocks spread over it. What is at the coder's sites
    there is held in memory."""
    least: int = 8
    """Tokens on which a pair must meet there."""
    by: Order = "product"
    """What makes a pair one of the top."""
    at_once: int = 2
    """Pairs whose passes run together: three blocks of logits each."""
    contexts: ContextPlan = ContextPlan()
    """How the measures of pairs that the table does not hold are taken."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.pairs, self.tokens, self.blocks, self.positions, self.least, self.at_once) < 1:
            raise UsageError(
                "Effects need at least 1 pair, token, block, position, meeting and pair at once."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """Pairs of latents i < j at sites, site by site, in the order of `CHOICES`."""

    sites: tuple[str, ...]
    site_C: Ints
    """Index into `sites`."""
    i_C: Ints
    j_C: Ints
    kind_C: NDArray[Any]
    """One of `CHOICES`."""

    def __len__(self) -> int:
        return len(self.i_C)

    def keys(self, n_latents: int) -> Ints:
        """i·L + j of each."""
        return self.i_C * n_latents + self.j_C


@dataclass(frozen=True, eq=False)
class _Pool:
    """Pairs that meet often enough, by key, and on how many tokens."""

    key_U: Ints
    count_U: Ints

    def without(self, key_Q: Ints) -> _Pool:
        left_U = ~np.isin(self.key_U, key_Q)
        return _Pool(self.key_U[left_U], self.count_U[left_U])

    def shuffled(self, rng: np.random.Generator) -> _Pool:
        order = rng.permutation(len(self.key_U))
        return _Pool(self.key_U[order], self.count_U[order])


def choose(triplets: Triplets, met: Mapping[str, Met], plan: EffectPlan) -> Chosen:
    """The same number at every site, so that one with large units does not take all.

    Both kinds of others are of pairs that `met` holds, no pair in two kinds. Order and draws come
    from the plan's seed alone.

    Raises:
        CrosslensError: no pair of the table meets often enough.
    """
    rows: list[tuple[int, str, int]] = []
    for number, site in enumerate(triplets.sites):
        n = plan.pairs // len(triplets.sites) + (number < plan.pairs % len(triplets.sites))
        ranked_Q = _ranked(triplets, number, met[site].n_latents, plan.by)
        rng = np.random.default_rng((plan.seed, number))
        found = _at_site(ranked_Q, _pool(met[site], plan.least), n, rng)
        rows += [(number, kind, int(key)) for kind in CHOICES for key in found[kind]]
    if not rows:
        tokens = max(each.tokens for each in met.values())
        raise CrosslensError(
            f"None of the table's {len(triplets)} pairs meets on {plan.least} of the {tokens} "
            "tokens looked at, so no effect can be measured. Give more text (--tokens)."
        )
    n_latents = met[triplets.sites[0]].n_latents
    key_C = np.array([key for _, _, key in rows], np.int64)
    return Chosen(
        sites=triplets.sites,
        site_C=np.array([number for number, _, _ in rows], np.int64),
        i_C=key_C // n_latents,
        j_C=key_C % n_latents,
        kind_C=np.array([kind for _, kind, _ in rows]),
    )


def _ranked(triplets: Triplets, number: int, n_latents: int, by: Order) -> Ints:
    """Keys of a site's pairs, the highest first."""
    order = triplets.ranked(by)
    order = order[triplets.site_C[order] == number]
    key_Q: Ints = triplets.i_C[order] * n_latents + triplets.j_C[order]
    return key_Q


def _pool(met: Met, least: int) -> _Pool:
    key_U: Ints = met.sums.key_U.cpu().numpy()
    count_U: Ints = met.sums.count_U.cpu().numpy()
    often_U = count_U >= least
    return _Pool(key_U[often_U], count_U[often_U])


def _at_site(ranked_Q: Ints, pool: _Pool, n: int, rng: np.random.Generator) -> dict[str, Ints]:
    """Keys by kind of choice. Nothing where the table has none that is in the pool."""
    top_Q = ranked_Q[np.isin(ranked_Q, pool.key_U)][:n]
    others = pool.without(top_Q).shuffled(rng)
    count_Q = pool.count_U[np.searchsorted(pool.key_U, top_Q)]
    matched_Q = _matched(others, count_Q, rng)
    random_Q = others.without(matched_Q).key_U[: len(top_Q)]
    return {"top": top_Q, "random": random_Q, "cooccurring": matched_Q}


def _matched(others: _Pool, count_Q: Ints, rng: np.random.Generator) -> Ints:
    """For each count a pair with about that count, none twice, as long as there are any.

    Of equal counts the first come in: `others` must be in random order.
    """
    free_U = np.ones(len(others.key_U), np.bool_)
    drawn: list[int] = []
    for count in count_Q[: len(free_U)]:
        distance_U = np.where(free_U, np.abs(np.log(others.count_U / count)), np.inf)
        near = distance_U.argsort(kind="stable")[: min(NEAR, int(free_U.sum()))]
        drawn.append(int(rng.choice(near)))
        free_U[drawn[-1]] = False
    return others.key_U[drawn]

"""Which pairs of latents interact at an MLP, how strongly, and how much of it all the top ones are.

Two passes over the tokens. The first sums cheap measures over every pair that ever meets: what each
has of the interaction of every token, the sound table, the paper's dominance. The second measures
mixed differences in context, token by token, for the pairs that the first ranks high.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from crosslens.device import resolve_dtype
from crosslens.errors import UsageError
from crosslens.interactions.neurons.contributions import SiteChunk
from crosslens.interactions.pairs.contexts import ContextPlan, InContext, Wanted, measure_in_context
from crosslens.interactions.pairs.table import Order, Triplets, triplets
from crosslens.interactions.pairs.totals import Met, meet
from crosslens.interactions.sums import highest

Chunks = Callable[[], Iterable[Mapping[str, SiteChunk]]]
"""Gives the same chunks each time it is called: `partial(site_chunks, source, …)`."""


@dataclass(frozen=True, kw_only=True)
class PairPlan:
    """How pairs are measured."""

    candidates: int = 512
    """Pairs per site that are measured in context."""
    least: int = 8
    """Tokens on which a pair must meet to be chosen for its strength per token."""
    most_keys: int = 1 << 20
    """Pairs that are kept in memory in the first pass, the same for all sites."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Format in which the first pass multiplies what a gate does, where no compiled kernel does it.
    bfloat16 is faster where the processor multiplies it, and rounds `shared` to three digits on
    each token."""
    contexts: ContextPlan = ContextPlan()

    def __post_init__(self) -> None:
        if min(self.candidates, self.least, self.most_keys) < 1:
            raise UsageError("Pairs need at least 1 candidate, 1 token to meet on and 1 key.")
        if self.candidates > self.most_keys:
            raise UsageError(
                f"{self.candidates} candidates cannot be chosen from {self.most_keys} keys: raise "
                "most_keys."
            )
        if min(self.contexts.groups, self.contexts.coalitions, self.contexts.meetings) < 2:
            raise UsageError(
                "Intervals need at least 2 groups of documents and 2 meetings, and the noise of "
                "drawn coalitions at least 2 coalitions."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """What was measured of pairs, at all sites."""

    met: Mapping[str, Met]
    """First pass: sums over every pair that met."""
    in_context: Mapping[str, InContext]
    """Second pass: sums for the candidates."""

    @cached_property
    def triplets(self) -> Triplets:
        """The candidates of all sites, with intervals."""
        return triplets(self.met, self.in_context)

    @property
    def measured(self) -> int:
        """Pairs that met, counted at each site; those whose keys were dropped are not counted."""
        return sum(len(met.sums.key_U) for met in self.met.values())

    def coverage(self, tops: Sequence[int], measure: str = "shared") -> dict[int, float]:
        """Share of all pairs' `shared` (or `coupling`, …) that the k highest have, sites together.

        Where keys were dropped the whole is still the whole, so that this is a lower bound. The
        always-on part and the error are no latents: see `latent_share`.
        """
        whole = sum(met.total(measure) for met in self.met.values())
        heads = [
            met.column(measure).topk(min(max(tops), len(met.sums.key_U))).values.cpu()
            for met in self.met.values()
        ]
        running = torch.cat(heads).sort(descending=True).values.cumsum(0)
        at = [min(k, len(running)) for k in tops]
        return {
            k: float(running[n - 1]) / whole if n and whole > 0 else 0.0
            for k, n in zip(tops, at, strict=True)
        }

    def latent_share(self) -> dict[str, float]:
        """Which part of all `shared` is between latents, which with the always-on part and which
        with the coder's error; all sites together."""
        parts = {
            "latents": sum(met.total("shared") for met in self.met.values()),
            "always": sum(met.always for met in self.met.values()),
            "error": sum(met.error for met in self.met.values()),
        }
        whole = sum(parts.values())
        return {name: part / whole if whole > 0 else 0.0 for name, part in parts.items()}

    @property
    def dropped(self) -> float:
        """Share of all pairs' `shared` that went with dropped keys, the largest of any site."""
        shares = [
            float(met.sums.dropped_M[0]) / met.total("shared")
            for met in self.met.values()
            if met.total("shared") > 0
        ]
        return max(shares, default=0.0)

    def top(self, n: int, by: Order = "product") -> list[dict[str, object]]:
        """The n highest triplets as plain values; an interval that is not known is None."""
        table = self.triplets
        return [
            {
                "i": int(table.i_C[c]),
                "j": int(table.j_C[c]),
                "site": table.sites[table.site_C[c]],
                "strength": float(table.strength_C[c]),
                "frequency": float(table.frequency_C[c]),
                "sign": int(table.sign_C[c]),
                "count": int(table.count_C[c]),
                "ci": _interval(float(table.low_C[c]), float(table.high_C[c])),
            }
            for c in table.ranked(by, n)
        ]


def _interval(low: float, high: float) -> list[float] | None:
    return [low, high] if np.isfinite(low) else None


def measure_pairs(chunks: Chunks, plan: PairPlan = PairPlan()) -> Pairs:
    """Both passes.

    Raises:
        CrosslensError: no two latents are ever active together.
    """
    met = meet(chunks(), plan.most_keys, resolve_dtype(plan.dtype))
    wanted = {site: _wanted(each, plan) for site, each in met.items()}
    return Pairs(met=met, in_context=measure_in_context(chunks(), wanted, plan.contexts))


def _wanted(met: Met, plan: PairPlan) -> Wanted:
    key_C = candidates(met, plan)
    place_C, _ = met.sums.found(key_C)
    share_C = plan.contexts.meetings / met.sums.count_U[place_C]
    return Wanted(key_C, share_C.float())


def candidates(met: Met, plan: PairPlan) -> Int64[Tensor, " c"]:
    """Keys of the pairs that are worth a closer look, ascending.

    Half are the highest by `shared` over all tokens; of the rest a half each the highest by
    `shared` per token on which they meet (at least `least` of them) and by how often they meet.
    What one list has already, the next passes over.
    """
    count_U, shared_U = met.sums.count_U, met.column("shared")
    often_U = (count_U >= plan.least).to(shared_U.dtype)
    lists = [shared_U, shared_U / count_U * often_U, count_U.to(shared_U.dtype)]
    half = -(-plan.candidates // 2)
    quarter = -(-(plan.candidates - half) // 2)
    taken_U = torch.zeros_like(count_U, dtype=torch.bool)
    for score_U, n in zip(lists, (half, quarter, quarter), strict=True):
        free = min(n, plan.candidates - int(taken_U.sum()))
        score_U = score_U.where(~taken_U, -1.0)
        if free:
            taken_U |= highest(score_U, free) & (score_U > 0)
    return met.sums.key_U[taken_U]

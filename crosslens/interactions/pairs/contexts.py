"""Second pass: the mixed differences of chosen pairs, in context, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from crosslens.functional import pairs as F
from crosslens.functional.blocks import split_rows
from crosslens.functional.interactions import Kind
from crosslens.interactions.neurons.contributions import SiteChunk
from crosslens.interactions.pairs.blocks import PairIndex
from crosslens.interactions.pairs.fused import fused_contexts, takes_contexts
from crosslens.interactions.pairs.points import CONTEXTS, Coalition, Drive, Points, points
from crosslens.interactions.pairs.totals import indexed
from crosslens.interactions.sums import places

IN_CONTEXT = (
    *(f"{context}_{what}" for context in CONTEXTS for what in ("size", "signed")),
    "shapley_noise",
    "first_gated",
    "second_gated",
    "first_dominant",
    "second_dominant",
    "ratio",
    "reach",
)
"""Columns: for each context Σ_n ‖w_out‖|Δ| and Σ_n ‖w_out‖Δ; `shapley_noise` the variance that
drawing coalitions leaves in `shapley_signed`; `first_gated` how much of the first's value the
second gates on that token (Σ_n ‖w_out‖|u_i (φ(Σg) − φ(Σg − g_j))|), 0 without a gate;
`first_dominant` the dominance of the first over the second; `ratio` the post's; `reach` bounds the
mixed difference of neurons without a gate in every context (times `LIMITS[kind].smaller`)."""
ELEMENTS = 1 << 18
"""Of a block of pairs × neurons: 1 MB."""
ROWS = 64
"""Tokens that are looked at together."""
MANY_ROWS = 1 << 10
"""The same where a kernel holds what goes into their neurons."""


@dataclass(frozen=True, kw_only=True)
class ContextPlan:
    """How mixed differences are measured."""

    meetings: int = 64
    """Tokens on which a pair is measured, about, drawn at random from those on which it meets."""
    groups: int = 12
    """Documents are dealt into so many groups, one after another; intervals compare groups."""
    coalitions: int = 2
    """Drawn per token for the context `shapley`; at least 2, to know their noise."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class InContext:
    """Sums over tokens for chosen pairs of one site, by group of documents."""

    key_C: Int64[Tensor, " c"]
    met_CG: Int64[Tensor, "c g"]
    """Tokens on which both are active."""
    measured_CG: Int64[Tensor, "c g"]
    """Those of them that were looked at."""
    total_CGM: Float[Tensor, "c g m"]
    """Sums over these, float64, one column for each of `IN_CONTEXT`."""


@dataclass(frozen=True)
class Wanted:
    """Pairs to be measured at one site: keys, ascending, and on which share of their tokens."""

    key_C: Int64[Tensor, " c"]
    share_C: Float[Tensor, " c"]


@dataclass(frozen=True)
class Meetings:
    """Pairs on tokens, by token."""

    row_Q: Tensor
    first_Q: Tensor
    """Entry of the first latent."""
    second_Q: Tensor
    at_Q: Tensor
    """Where the pair's sums are."""

    def some(self, at: Tensor) -> Meetings:
        """Those with these numbers."""
        return Meetings(self.row_Q[at], self.first_Q[at], self.second_Q[at], self.at_Q[at])


class _Site:
    """The sums of one site as they grow."""

    def __init__(self, wanted: Wanted, plan: ContextPlan) -> None:
        size = len(wanted.key_C) * plan.groups
        device = wanted.key_C.device
        self.wanted, self.plan = wanted, plan
        self.total_XM = torch.zeros(size, len(IN_CONTEXT), dtype=torch.float64, device=device)
        self.met_X = torch.zeros(size, dtype=torch.int64, device=device)
        self.measured_X = torch.zeros_like(self.met_X)

    def add(self, chunk: SiteChunk, index: PairIndex, number: int) -> None:
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + number)
        chance_R = torch.rand(chunk.lists.n_items, generator=generator).to(self.met_X.device)
        drawn = [
            Coalition.drawn(chunk.lists.counts_I, generator) for _ in range(self.plan.coalitions)
        ]
        met = self._meetings(chunk, index)
        self.met_X += torch.bincount(met.at_Q, minlength=len(self.met_X))
        share_Q = self.wanted.share_C[met.at_Q // self.plan.groups]
        met = met.some((chance_R[met.row_Q] < share_Q).nonzero().squeeze(-1))
        self.measured_X += torch.bincount(met.at_Q, minlength=len(self.met_X))
        for at_Q, found in _measured(chunk, met, drawn):
            self.total_XM.index_add_(0, at_Q, torch.stack(found).T.double())

    def _meetings(self, chunk: SiteChunk, index: PairIndex) -> Meetings:
        """All meetings of wanted pairs in a chunk, by row."""
        group_R = chunk.document_R.remainder(self.plan.groups).to(self.met_X.device)
        chosen_U, wanted_U = places(self.wanted.key_C, index.key_U)
        parts = []
        for whole in index.blocks:
            block = whole.only(wanted_U[whole.place_Q])
            row_Q = block.row_B[block.token_Q]
            at_Q = chosen_U[block.place_Q] * self.plan.groups + group_R[row_Q]
            parts.append(Meetings(row_Q, *block.entries(), at_Q))
        joined = Meetings(*(torch.cat([vars(p)[name] for p in parts]) for name in vars(parts[0])))
        return joined.some(joined.row_Q.argsort(stable=True))

    def in_context(self) -> InContext:
        shape = len(self.wanted.key_C), self.plan.groups
        return InContext(
            key_C=self.wanted.key_C,
            met_CG=self.met_X.view(shape),
            measured_CG=self.measured_X.view(shape),
            total_CGM=self.total_XM.view(*shape, -1),
        )


@torch.no_grad()
def measure_in_context(
    chunks: Iterable[Mapping[str, SiteChunk]], wanted: Mapping[str, Wanted], plan: ContextPlan
) -> dict[str, InContext]:
    """`IN_CONTEXT` for the wanted pairs of each site, in one pass.

    Every token has a chance of its own, the same for all pairs, and is looked at for those whose
    share is above it: for one pair a draw from its tokens, while few tokens serve many pairs.
    Chances and coalitions come from the seed alone.
    """
    sites = {name: _Site(each, plan) for name, each in wanted.items()}
    for number, (by_site, index) in enumerate(indexed(chunks)):
        for name, chunk in by_site.items():
            sites[name].add(chunk, index, number)
    return {name: site.in_context() for name, site in sites.items()}


def _measured(
    chunk: SiteChunk, met: Meetings, drawn: Sequence[Coalition]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Of some meetings at a time, where their sums are, and `IN_CONTEXT`, one column after another
    [Q]."""
    if takes_contexts(chunk):
        for part, rows_R in _by_rows(met, MANY_ROWS):
            meetings = part.row_Q, part.first_Q, part.second_Q
            yield part.at_Q, fused_contexts(chunk, rows_R, meetings, drawn)
        return
    for part, rows_R in _by_rows(met, ROWS):
        these = points(chunk, rows_R, drawn)
        for some in _parts(part, len(these.w_N)):
            yield some.at_Q, _by_steps(these, some)


def _by_rows(met: Meetings, rows: int) -> Iterator[tuple[Meetings, Tensor]]:
    """Meetings of some rows at a time, their rows renumbered; and these rows."""
    rows_R, place_Q = torch.unique_consecutive(met.row_Q, return_inverse=True)
    edges = torch.arange(0, len(rows_R) + rows, rows, device=rows_R.device)
    edges_P = torch.searchsorted(place_Q, edges).tolist()
    for part, (start, stop) in enumerate(pairwise(edges_P)):
        first, at = part * rows, slice(start, stop)
        row_Q = place_Q[at] - first
        mine = Meetings(row_Q, met.first_Q[at], met.second_Q[at], met.at_Q[at])
        yield mine, rows_R[first : first + rows]


def _parts(met: Meetings, n_neurons: int) -> Iterator[Meetings]:
    """Some meetings at a time."""
    size = max(1, ELEMENTS // n_neurons)
    for at in split_rows(torch.arange(len(met.row_Q), device=met.row_Q.device), size):
        yield met.some(at)


def _by_steps(these: Points, met: Meetings) -> list[Tensor]:
    """`IN_CONTEXT` of some meetings, one column after another [Q]."""
    first, second = these.latents(met.first_Q), these.latents(met.second_Q)
    pairs, w_N = ((met.first_Q, first), (met.second_Q, second)), these.w_N
    sums, gated = [], None
    for context in these.contexts:
        point = context.without(met.row_Q, pairs)
        delta_QN, *parts = _mixed(these.kind, point, first, second)
        sums.append(torch.stack([delta_QN.abs() @ w_N, delta_QN @ w_N]))
        gated = gated or [part.abs() @ w_N for part in parts]  # of the first context, `rest`
    shapley_S2Q = torch.stack(sums[2:])
    noise_Q = shapley_S2Q[:, 1].var(0) / len(shapley_S2Q)
    largest_QN = these.largest_RN.index_select(0, met.row_Q)
    return [
        *sums[0],
        *sums[1],
        *shapley_S2Q.mean(0),
        noise_Q,
        *(gated or torch.zeros_like(sums[0])),
        *F.dominance(first.inner, second.inner, largest_QN, w_N),
        F.ratio(first.inner, second.inner, w_N),
        F.reach(first.inner, second.inner, w_N),
    ]


def _mixed(kind: Kind, point: Drive, first: Drive, second: Drive) -> tuple[Tensor, ...]:
    """Δ at every neuron [Q, N]; where gated, then each one's value through the other's gate."""
    if point.value is None or first.value is None or second.value is None:
        return (F.mixed_difference(kind, point.inner, first.inner, second.inner),)
    found = F.gated_mixed_difference(
        kind,
        F.Gated(point.value, point.inner),
        F.Gated(first.value, first.inner),
        F.Gated(second.value, second.inner),
    )
    return found.total, found.first_by_second, found.second_by_first

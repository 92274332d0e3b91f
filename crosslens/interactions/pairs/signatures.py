"""What pairs do together, taken apart by how they do it: the columns that kinds are told by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from crosslens.errors import UsageError
from crosslens.functional.blocks import split_rows
from crosslens.functional.interactions import Kind, activation
from crosslens.interactions.neurons.contributions import Effective, SiteChunk
from crosslens.interactions.pairs.blocks import PairIndex
from crosslens.interactions.pairs.contexts import ELEMENTS, ContextPlan
from crosslens.interactions.pairs.points import Drive, points
from crosslens.interactions.pairs.table import Triplets
from crosslens.interactions.pairs.totals import indexed
from crosslens.interactions.sums import places

SORTS = ("conjoint", "saturating", "opposed")
SIGNATURE = (*SORTS, *(f"{sort}_by_chance" for sort in SORTS), "context_gated", "norm_mediated")
"""Columns that `signatures` adds, in the unit of `strength`: means over tokens of Σ_n ‖w_out,n‖|…|,
everything else on the token being in place.

Of the mixed difference Δ, neuron by neuron: `conjoint` where both move the neuron the same way and
further together than apart, `saturating` where less far, `opposed` where they move it opposite
ways; these three sum to the strength. `…_by_chance`: the same when what the second brings is dealt
to other neurons (`dealt`), so that the two meet at random. `context_gated`: of c_u·Δφ, the
context's value through the mixed difference of the gate (0 without a gate); with `first_gated` and
`second_gated` the parts that Δ is the sum of. `norm_mediated`: of what is added to Δ when the
norm's scalar is that of the row without those who are out (0 without a norm)."""
MEETINGS = ContextPlan()
"""Those that `measure_pairs` looks at unless told otherwise."""


@dataclass(frozen=True)
class _Meetings:
    """Pairs on tokens, by token."""

    row_Q: Tensor
    first_Q: Tensor
    """Entry of the first latent."""
    second_Q: Tensor
    at_Q: Tensor
    """Which triplet of the site."""

    def some(self, at: Tensor) -> _Meetings:
        """Those with these numbers."""
        return _Meetings(self.row_Q[at], self.first_Q[at], self.second_Q[at], self.at_Q[at])


class _Site:
    """The sums of one site as they grow."""

    def __init__(self, triplets: Triplets, site: str, one: Effective, plan: ContextPlan) -> None:
        device, n_latents = one.out_norm_N.device, len(one.E_LN)
        self.mine_C = triplets.site_C == triplets.sites.index(site)
        i_C, j_C = triplets.i_C[self.mine_C], triplets.j_C[self.mine_C]
        self.key_C = torch.from_numpy(i_C * n_latents + j_C).to(device)
        count_C = torch.from_numpy(triplets.count_C[self.mine_C]).to(device)
        self.seed, self.share_C = plan.seed, (plan.meetings / count_C).float()
        self.measured_C = torch.zeros_like(count_C)
        shape = len(count_C), len(SIGNATURE)
        self.total_CM = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, chunk: SiteChunk, index: PairIndex, number: int) -> None:
        met = self._drawn(chunk, index, number)
        self.measured_C += torch.bincount(met.at_Q, minlength=len(self.measured_C))
        size = max(1, ELEMENTS // len(chunk.effective.out_norm_N))
        for at in split_rows(met.row_Q.argsort(stable=True), size):
            some = met.some(at)
            found_MQ = torch.stack(_measured(chunk, some))
            self.total_CM.index_add_(0, some.at_Q, found_MQ.T.double())

    def _drawn(self, chunk: SiteChunk, index: PairIndex, number: int) -> _Meetings:
        """Meetings to look at: with the seed of `measure_in_context`, those it looked at."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        chance_R = torch.rand(chunk.lists.n_items, generator=generator).to(self.share_C.device)
        at_U, wanted_U = places(self.key_C, index.key_U)
        parts = []
        for whole in index.blocks:
            block = whole.only(wanted_U[whole.place_Q])
            row_Q, at_Q = block.row_B[block.token_Q], at_U[block.place_Q]
            met = _Meetings(row_Q, *block.entries(), at_Q)
            parts.append(met.some((chance_R[row_Q] < self.share_C[at_Q]).nonzero().squeeze(-1)))
        return _Meetings(*(torch.cat([vars(p)[name] for p in parts]) for name in vars(parts[0])))


@torch.no_grad()
def signatures(
    chunks: Iterable[Mapping[str, SiteChunk]],
    triplets: Triplets,
    plan: ContextPlan = MEETINGS,
) -> Triplets:
    """The same triplets with the measures of `SIGNATURE`, in one pass.

    Args:
        chunks: of the same tokens, with the triplets' sites among theirs.
        plan: with the `meetings` and `seed` of the triplets' own, the same tokens are looked at.

    Raises:
        UsageError: there are no chunks, or they lack one of the sites.
    """
    sites: dict[str, _Site] = {}
    for number, (by_site, index) in enumerate(indexed(chunks)):
        missing = [site for site in triplets.sites if site not in by_site]
        if missing:
            raise UsageError(
                f"The triplets are of {', '.join(missing)}, which these tokens were not read at; "
                f"they were at {', '.join(by_site)}."
            )
        if not sites:
            sites = {
                name: _Site(triplets, name, by_site[name].effective, plan)
                for name in triplets.sites
            }
        for name, site in sites.items():
            site.add(by_site[name], index, number)
    if not sites:
        raise UsageError("There are no tokens to tell kinds of interaction by.")
    column_CM = np.full((len(triplets), len(SIGNATURE)), np.nan)
    for site in sites.values():
        column_CM[site.mine_C] = (site.total_CM / site.measured_C[:, None]).cpu().numpy()
    added = dict(zip(SIGNATURE, column_CM.T, strict=True))
    return replace(triplets, measures={**triplets.measures, **added})


def _measured(chunk: SiteChunk, met: _Meetings) -> list[Tensor]:
    """`SIGNATURE` of some meetings, one column after another [Q]."""
    one = chunk.effective
    kind, w_N = one.mlp.kind, one.out_norm_N
    rest, first, second = _drives(chunk, met)
    corners = _corners(rest, first, second)
    out = [_output(kind, corner) for corner in corners]
    order_N = dealt(len(w_N)).to(w_N.device)
    elsewhere = second.turned(lambda y_QN: y_QN[:, order_N])
    chance = [_output(kind, corner) for corner in _corners(rest, first, elsewhere)]
    sums = [*_by_sort(out, w_N), *_by_sort(chance, w_N)]
    gated_Q = mediated_Q = torch.zeros_like(sums[0])
    if rest.value is not None:
        phi = activation(kind)
        gated_Q = (_mixed([phi(corner.inner) for corner in corners]) * rest.value).abs() @ w_N
    if one.norm is not None:
        full_QN = _mixed([_output(kind, each) for each in _rescaled(chunk, met, corners)])
        mediated_Q = (full_QN - _mixed(out)).abs() @ w_N
    return [*sums, gated_Q, mediated_Q]


def dealt(n_neurons: int) -> Int64[Tensor, " n"]:
    """Whose contribution each neuron is given by chance: a permutation, always the same."""
    return torch.randperm(n_neurons, generator=torch.Generator().manual_seed(0))


def _by_sort(out: list[Tensor], w_N: Tensor) -> list[Tensor]:
    """Σ w|Δ| over the neurons of each of `SORTS` [Q]."""
    size_QN = _mixed(out).abs()
    return [(size_QN * each_QN) @ w_N for each_QN in sorted_out(*out)]


def sorted_out(
    neither: Tensor, first: Tensor, second: Tensor, both: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Neurons sorted by how two latents act on them together: conjoint, saturating, opposed (masks;
    exactly one is true).

    What each does is its Shapley value among the two, s_i = ((h_i − h) + (h_ij − h_j))/2; s_i + s_j
    = h_ij − h. Opposed where s_i s_j < 0; else conjoint where Δ has the sign of h_ij − h, so that
    |h_ij − h| exceeds what the two do alone, and saturating where it has not. For a monotone φ
    without a gate s_i has the sign of y_i wherever Δ ≠ 0.

    Args:
        neither, first, second, both: the neuron's output h with these of the two there.
    """
    moved = both - neither
    of_first, of_second = moved + (first - second), moved + (second - first)
    opposed = of_first * of_second < 0
    conjoint = ~opposed & ((both - first - second + neither) * moved > 0)
    return conjoint, ~opposed & ~conjoint, opposed


def _drives(chunk: SiteChunk, met: _Meetings) -> tuple[Drive, Drive, Drive]:
    """What goes into neurons without the two, and what each of them brings."""
    rows_R, row_Q = torch.unique_consecutive(met.row_Q, return_inverse=True)
    these = points(chunk, rows_R, [])
    first, second = these.latents(met.first_Q), these.latents(met.second_Q)
    pairs = ((met.first_Q, first), (met.second_Q, second))
    return these.contexts[0].without(row_Q, pairs), first, second


def _corners(rest: Drive, first: Drive, second: Drive) -> list[Drive]:
    """What goes into neurons without the two, with the first, with the second, with both."""
    with_first = rest.turned(torch.add, first)
    with_both = with_first.turned(torch.add, second)
    return [rest, with_first, rest.turned(torch.add, second), with_both]


def _rescaled(chunk: SiteChunk, met: _Meetings, corners: list[Drive]) -> list[Drive]:
    """The same with the norm's scalar of the row that holds just these members."""
    one = chunk.effective
    assert one.norm is not None
    inner = one.gate or one.value
    fixed = Drive(inner.fixed_N, None if one.gate is None else one.value.fixed_N)
    both_QD, first_QD, second_QD = (
        chunk.input_RD[met.row_Q],
        _written(chunk, met.first_Q),
        _written(chunk, met.second_Q),
    )
    rows = (both_QD - first_QD - second_QD, both_QD - second_QD, both_QD - first_QD, both_QD)
    scalar_Q = chunk.scalar_R[met.row_Q]
    found = []
    for corner, row_QD in zip(corners, rows, strict=True):
        times_Q1 = (one.norm.scalar(row_QD) / scalar_Q)[:, None]
        found.append(corner.turned(lambda x, f, t=times_Q1: (x - f) * t + f, fixed))
    return found


def _written(chunk: SiteChunk, entry_Q: Tensor) -> Tensor:
    """What some entries write into the residual stream [Q, D]."""
    latent_Q = chunk.lists.index_N[entry_Q].long()
    return chunk.effective.decoder_LD[latent_Q] * chunk.value_E[entry_Q, None]


def _output(kind: Kind, drive: Drive) -> Tensor:
    h: Tensor = activation(kind)(drive.inner)
    return h if drive.value is None else h * drive.value


def _mixed(corners: list[Tensor]) -> Tensor:
    """Δ of values without the two, with the first, with the second, with both."""
    neither, first, second, both = corners
    return both - first - second + neither

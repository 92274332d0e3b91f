"""Several trainings of one configuration: which latents come again, and which only once.

A latent of the first run is paired with one latent of another run by the assignment that makes the
sum of cosines largest. Beside every figure stands that of a null, in which the other run's
directions are turned by a random rotation. All within that run is as before (norms per site,
angles between its latents), but it no longer points where the first run does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from crosslens.coder import Coder, dense_decoder, dense_encoder
from crosslens.errors import UsageError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LEVELS = (0.7, 0.9)
_ROWS_AT_ONCE = 1024

Weights = Literal["decoder", "both"]


@dataclass(frozen=True, kw_only=True)
class MatchPlan:
    """How runs are matched."""

    weights: Weights = "decoder"
    """What is compared: the decoders, all sites of all models side by side; or the mean of that
    cosine and the encoders'."""
    threshold: float = 0.7
    """A latent recurs if its partner's cosine is above this, and the partner is exclusive too."""
    entries: int = 64_000_000
    """The largest matrix of cosines to assign, at 12 bytes an entry: 8,000 latents to as many.
    Beyond it, only the first run's exclusive latents are assigned partners, among all latents."""
    seed: int = 0
    """Of the null's rotations."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise UsageError(f"The threshold is a cosine in (0, 1), found {self.threshold}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Seed:
    """One of the trainings."""

    coder: Coder
    alive_L: Bool[Tensor, " l"]
    """Latents that were active on the tokens looked at; the others are left out."""
    exclusive: Mapping[str, Bool[Tensor, " l"]]
    """Kind of exclusive latent, such as `only_b` → the latents of that kind."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Match:
    """Latents of one run and their partners in another."""

    partner_L: Int64[Tensor, " l"]
    """-1 where a latent has none: it is dead, was not assigned any, or there were too few."""
    cosine_L: Float[Tensor, " l"]
    """With the partner; NaN where there is none."""
    best_L: Float[Tensor, " l"]
    """The largest with any latent of the other run, which several may share; NaN if dead."""

    def figures(self) -> dict[str, Any]:
        """`{"matched", "mean", "quantiles", "above", "mmcs"}`, None where there is no match.

        MMCS is the mean of the largest cosines of all alive latents (Sharkey, Braun and Millidge
        2022), which needs no assignment.
        """
        cosine_N = self.cosine_L[self.partner_L >= 0].double()
        levels = torch.tensor(QUANTILES, dtype=torch.float64)
        spread = cosine_N.quantile(levels).tolist() if len(cosine_N) else [None] * len(levels)
        return {
            "matched": len(cosine_N),
            "mean": _mean(cosine_N),
            "quantiles": {f"{q:g}": each for q, each in zip(QUANTILES, spread, strict=True)},
            "above": {f"{level:g}": _mean((cosine_N > level).double()) for level in LEVELS},
            "mmcs": _mean(self.best_L[~self.best_L.isnan()].double()),
        }


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """How often the first run's exclusive latents of one kind come again in the other runs. The
    k-th entry of each list, from 0, is of latents that recur in exactly k of them."""

    exclusive: int
    """Latents of this kind in the first run."""
    counts: tuple[int, ...]
    random_partners: tuple[float, ...]
    """Expected if each latent's partner were drawn at random from the other run's alive latents."""
    random_labels: tuple[float, ...]
    """Expected if partners were as found, but the labels of the other run's alive latents were
    dealt at random."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stability:
    """The first of several runs against each of the others."""

    assigned: Literal["alive", "exclusive"]
    """Which latents of the first run were assigned partners."""
    matches: tuple[Match, ...]
    nulls: tuple[Match, ...]
    recurrence: dict[str, Recurrence]

    def plain(self) -> dict[str, Any]:
        """JSON-able: `{"runs", "assigned", "pairs": [{…, "null": {…}}], "recurrence"}`."""
        pairs = zip(self.matches, self.nulls, strict=True)
        return {
            "runs": len(self.matches) + 1,
            "assigned": self.assigned,
            "pairs": [{**match.figures(), "null": null.figures()} for match, null in pairs],
            "recurrence": {kind: asdict(each) for kind, each in self.recurrence.items()},
        }


@torch.no_grad()
def stability(
    seeds: Sequence[Seed],
    plan: MatchPlan | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Stability:
    """Match the first run with each of the others, and with each of them turned at random.

    Holds the directions of two runs and one matrix of cosines at a time.

    Args:
        progress: hears (runs done, runs in all).

    Raises:
        UsageError: there are fewer than two runs, their sites or kinds of exclusive latents
            differ, one has no alive latent, or too many would have to be assigned.
    """
    plan = plan or MatchPlan()
    _check(seeds)
    first, *others = seeds
    mine = _directions(first, plan.weights)
    assigned = _assigned(seeds, plan.entries)
    matches, nulls, near = [], [], []
    for done, other in enumerate(others, 1):
        theirs = _directions(other, plan.weights)
        matches.append(_match(mine, theirs, first, assigned))
        near.append(_near(mine, theirs, first, other, plan.threshold))
        _turn(theirs, plan.seed + done)
        nulls.append(_match(mine, theirs, first, assigned))
        progress(done, len(others))
    found = tuple(matches)
    recurrence = {
        kind: _recurrence(seeds, kind, found, [each[kind] for each in near], plan.threshold)
        for kind in first.exclusive
    }
    return Stability(assigned=assigned, matches=found, nulls=tuple(nulls), recurrence=recurrence)


@dataclass(frozen=True, eq=False)
class _Directions:
    """A run's alive latents as unit vectors."""

    unit_NX: Tensor
    latent_N: Tensor
    """Their numbers, ascending, on the CPU."""
    widths: tuple[int, ...]
    """Of the sites that lie side by side in a vector."""

    def of(self, mask_L: Tensor) -> Tensor:
        """The vectors of those alive latents that a mask names."""
        return self.unit_NX[mask_L[self.latent_N].to(self.unit_NX.device)]


def _check(seeds: Sequence[Seed]) -> None:
    if len(seeds) < 2:
        raise UsageError(f"Stability needs two runs or more, found {len(seeds)}.")
    first = seeds[0]
    for number, seed in enumerate(seeds, 1):
        wiring, known = seed.coder.wiring, first.coder.wiring
        if (wiring.read, wiring.write) != (known.read, known.write):
            raise UsageError(
                f"Run {number} has other sites or widths than run 1, so their latents cannot be "
                "compared. Take runs that differ in their seed only."
            )
        if set(seed.exclusive) != set(first.exclusive):
            raise UsageError(f"Run {number} names other kinds of exclusive latents than run 1.")
        if not seed.alive_L.any():
            raise UsageError(f"Run {number} has no alive latent, so there is nothing to match.")


def _assigned(seeds: Sequence[Seed], entries: int) -> Literal["alive", "exclusive"]:
    """Which latents of the first run can be assigned partners within so many entries."""
    first, *others = seeds
    widest = max(int(other.alive_L.sum()) for other in others)
    if int(first.alive_L.sum()) * widest <= entries:
        return "alive"
    some = int(_exclusive(first).sum())
    if some * widest > entries:
        raise UsageError(
            f"Assigning {some} exclusive latents to {widest} takes a matrix of "
            f"{some * widest / 1e6:.0f} million cosines, and the limit is {entries / 1e6:.0f}. "
            f"Raise the limit to that ({12 * some * widest / 1e9:.1f} GB) or name fewer latents."
        )
    return "exclusive"


def _exclusive(seed: Seed) -> Tensor:
    """Alive latents of any kind of exclusive ones."""
    masks = [torch.zeros_like(seed.alive_L), *seed.exclusive.values()]
    return torch.stack(masks).any(0) & seed.alive_L


def _directions(seed: Seed, weights: Weights) -> _Directions:
    wiring = seed.coder.wiring
    latent_N = seed.alive_L.nonzero().squeeze(-1)
    parts, widths = [dense_decoder(seed.coder)], wiring.write.widths
    if weights == "both":
        parts.append(dense_encoder(seed.coder))
        widths += wiring.read.widths
    tiny = torch.finfo(torch.float32).tiny
    units = []
    for part_LX in parts:
        unit_NX = part_LX[latent_N.to(part_LX.device)].float()
        unit_NX /= unit_NX.norm(dim=-1, keepdim=True).clamp_min(tiny) * len(parts) ** 0.5
        units.append(unit_NX)
    return _Directions(units[0] if len(units) == 1 else torch.cat(units, -1), latent_N, widths)


def _match(mine: _Directions, theirs: _Directions, first: Seed, assigned: str) -> Match:
    """The assignment of largest sum (Jonker and Volgenant 1987, in scipy)."""
    from scipy.optimize import linear_sum_assignment

    whole = assigned == "alive"
    rows_L = first.alive_L if whole else _exclusive(first)
    rows_NX = mine.unit_NX if whole else mine.of(rows_L)
    cosine_NM = (rows_NX @ theirs.unit_NX.T).cpu()
    row_n, column_n = map(torch.from_numpy, linear_sum_assignment(cosine_NM.numpy(), maximize=True))
    latent_n = rows_L.nonzero().squeeze(-1)[row_n]
    partner_L = torch.full((len(first.alive_L),), -1)
    cosine_L, best_L = torch.full((2, len(first.alive_L)), torch.nan)
    partner_L[latent_n] = theirs.latent_N[column_n]
    cosine_L[latent_n] = cosine_NM[row_n, column_n]
    best_L[mine.latent_N] = _largest(mine, theirs).cpu()
    return Match(partner_L=partner_L, cosine_L=cosine_L, best_L=best_L)


def _largest(mine: _Directions, theirs: _Directions) -> Tensor:
    """Each latent's largest cosine, some latents at a time: all at once may be a gigabyte."""
    blocks = torch.split(mine.unit_NX, _ROWS_AT_ONCE)
    return torch.cat([(block @ theirs.unit_NX.T).amax(1) for block in blocks])


def _turn(directions: _Directions, seed: int) -> None:
    """Turn all sites of one width by one rotation, in place. That it is the same one keeps what a
    latent's directions at several sites and in several models have in common."""
    generator = torch.Generator().manual_seed(seed)
    turns: dict[int, Tensor] = {}
    for part_ND in torch.split(directions.unit_NX, list(directions.widths), dim=-1):
        width = part_ND.shape[-1]
        if width not in turns:
            q_DD, r_DD = torch.linalg.qr(torch.randn(width, width, generator=generator))
            # With these signs every rotation is equally likely (Mezzadri 2007).
            turns[width] = (q_DD * r_DD.diagonal().sign()).to(part_ND.device)
        part_ND.copy_(part_ND @ turns[width])


def _near(
    mine: _Directions, theirs: _Directions, first: Seed, other: Seed, threshold: float
) -> dict[str, Tensor]:
    """For each exclusive latent of the first run, the share of the other run's alive latents that
    would count as its recurrence."""
    found = {}
    for kind, mask_L in first.exclusive.items():
        cosine_NM = mine.of(mask_L) @ theirs.of(other.exclusive[kind]).T
        found[kind] = (cosine_NM > threshold).sum(1).double().cpu() / len(theirs.latent_N)
    return found


def _recurrence(
    seeds: Sequence[Seed],
    kind: str,
    matches: Sequence[Match],
    near: Sequence[Tensor],
    threshold: float,
) -> Recurrence:
    first, *others = seeds
    mine_N = (first.exclusive[kind] & first.alive_L).nonzero().squeeze(-1)
    recurs, by_label = [], []
    for other, match in zip(others, matches, strict=True):
        theirs_L = other.exclusive[kind] & other.alive_L
        close_N = match.cosine_L[mine_N] > threshold
        recurs.append(close_N & theirs_L[match.partner_L[mine_N]])
        by_label.append(close_N.double() * (int(theirs_L.sum()) / int(other.alive_L.sum())))
    times_N = torch.stack(recurs).sum(0)
    return Recurrence(
        exclusive=len(mine_N),
        counts=tuple(torch.bincount(times_N, minlength=len(seeds)).tolist()),
        random_partners=_expected(near),
        random_labels=_expected(by_label),
    )


def _expected(chances: Sequence[Tensor]) -> tuple[float, ...]:
    """Expected number of latents with exactly k = 0, 1, … successes, given each latent's chance
    in each run, all independent (a sum of Poisson binomials)."""
    share_NK = torch.zeros(len(chances[0]), len(chances) + 1, dtype=torch.float64)
    share_NK[:, 0] = 1
    for chance_N in chances:
        hit_NK = share_NK * chance_N[:, None]
        share_NK = share_NK - hit_NK
        share_NK[:, 1:] += hit_NK[:, :-1]
    return tuple(share_NK.sum(0).tolist())


def _mean(value_N: Tensor) -> float | None:
    return float(value_N.mean()) if len(value_N) else None

"""What tiers buy: their Pareto frontier, and how far they are above the baseline.

The baseline runs the model on a part of the data and knows nothing of the rest: a line from what is
known for nothing to the truth at brute force's flops (Gross and Agrawal: the richness of an
explanation is how much it improves on running the model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosslens.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Line:
    """The baseline: from `start` at no flops to `truth` at `brute` flops."""

    start: float
    truth: float
    brute: float

    def __post_init__(self) -> None:
        if not self.brute > 0:
            raise UsageError(f"Brute force takes {self.brute} flops; there is no baseline.")

    def at(self, flops: float) -> float:
        """What that many flops of brute force buy."""
        share = min(1.0, flops / self.brute)
        return self.start + (self.truth - self.start) * share

    def gained(self, flops: float, bound: float) -> float:
        """How far a bound is on the better side of the line, in units of start − truth: at most 1;
        negative where brute force buys more."""
        way = self.start - self.truth
        return (self.at(flops) - bound) / way if way else 0.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One tier on the plane of cost and bound."""

    name: str
    flops: float
    bound: float
    improvement: float
    on_front: bool

    def plain(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """All tiers, in order of cost."""

    line: Line
    points: tuple[Point, ...]

    @property
    def score(self) -> float:
        """The largest improvement over the baseline, 0 where there is none."""
        return max([0.0, *(point.improvement for point in self.points)])

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "baseline": dict(self.line.__dict__),
            "points": [point.plain() for point in self.points],
            "score": self.score,
        }


def frontier(tiers: Sequence[Mapping[str, Any]], line: Line, *, cost: str = "flops") -> Frontier:
    """Points of the tiers as `--json` has them.

    Args:
        tiers: each with `name`, `bound` and the cost's key. Whether small or large bounds are
            better follows from the line: the truth is the best that there is.
        cost: the key of a tier's flops.
    """
    down = line.truth <= line.start
    order = sorted(tiers, key=lambda t: (t[cost], t["bound"] if down else -t["bound"]))
    best: float | None = None
    points = []
    for tier in order:
        bound = float(tier["bound"])
        better = best is None or (bound < best if down else bound > best)
        best = bound if better else best
        flops = float(tier[cost])
        points.append(
            Point(
                name=str(tier["name"]),
                flops=flops,
                bound=bound,
                improvement=line.gained(flops, bound),
                on_front=better,
            )
        )
    return Frontier(line=line, points=tuple(points))


def local_frontier(site: Mapping[str, Any], *, amortised: bool) -> Frontier:
    """Of one site's JSON. Brute force makes f(x̂) itself, so its error is 0; knowing nothing, one is
    left with the weights' cap.

    Args:
        amortised: count what each token costs, and leave out tables that more tokens would share.
    """
    brute = site["brute_per_token"] if amortised else site["flops_brute"]
    cap = next(tier["bound"] for tier in site["tiers"] if tier["name"] == "nothing/cap")
    line = Line(start=float(cap), truth=0.0, brute=float(brute))
    return frontier(site["tiers"], line, cost="flops_per_token" if amortised else "flops")

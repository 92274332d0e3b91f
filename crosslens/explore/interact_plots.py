"""The charts of a run's interactions: numbers in, coordinates and words out. No drawing here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosslens.explore.diff_charts import Ticks
from crosslens.explore.figures import number, percent

KINDS = (
    "conjunction",
    "saturation",
    "cancellation",
    "gating",
    "norm-mediated",
    "split duplicate",
    "binding",
    "mixed",
)
"""Each with a colour and a lane of its own, in this order; others are drawn as the last."""
WIDE, TALL = 620.0, 230.0
"""Of the scatter's plot area."""
BAR = 170.0
"""Length of a site's stacked bar."""
REACH = 150.0
"""Length of the axis of a rank correlation, from −1 to 1."""
DOTS = 1500
"""Dots of one kind, at most."""
_SPREAD = (0.6180339887498949, 0.7548776662466927)
"""Multiples of irrational numbers lie evenly between 0 and 1: where in its lane a pair is."""


@dataclass(frozen=True)
class Stretch:
    """One kind's part of a site's bar."""

    kind: str
    place: int
    """Of its colour."""
    x: float
    wide: float
    words: str


@dataclass(frozen=True)
class Cloud:
    """The triplets of a kind, as a path of points."""

    kind: str
    place: int
    path: str
    count: int
    """More than are drawn where there are too many."""


@dataclass(frozen=True)
class Mark:
    """A triplet with a mark of its own, which leads to its first latent."""

    latent: int
    place: int
    x: float
    y: float
    words: str


@dataclass(frozen=True)
class Scatter:
    """Strength against place, a lane per kind."""

    summary: str
    clouds: tuple[Cloud, ...]
    marks: tuple[Mark, ...]
    ticks_x: Ticks
    edges: tuple[float, ...]
    """Between one site and the next."""
    ticks_y: Ticks


@dataclass(frozen=True)
class Correlation:
    """A rank correlation on an axis from −1 to 1; without a value nothing is drawn."""

    x: float | None
    whisker: str


def place_of(kind: str) -> int:
    """The number of a kind's colour and lane."""
    return KINDS.index(kind) if kind in KINDS else len(KINDS) - 1


def stacked(shares: Mapping[str, float]) -> tuple[Stretch, ...]:
    """A site's kinds side by side, as long together as their shares."""
    found, x = [], 0.0
    for kind in sorted(shares, key=place_of):
        wide = BAR * shares[kind]
        if wide > 0:
            found.append(Stretch(kind, place_of(kind), x, wide, f"{kind}: {percent(shares[kind])}"))
        x += wide
    return tuple(found)


def scatter(
    pairs: Mapping[str, Any], sites: Sequence[str], top: Sequence[Mapping[str, Any]]
) -> Scatter | None:
    """Strength (log) against the site; None where no triplet has a strength above 0.

    Args:
        pairs: columns `site`, `i`, `j`, `kind`, `strength`.
        sites: in order of depth.
        top: the triplets that get a mark.
    """
    strength_C = np.asarray(pairs["strength"], dtype=np.float64)
    inside_C = np.isfinite(strength_C) & (strength_C > 0)
    if not inside_C.any() or not sites:
        return None
    axis = _Log(float(strength_C[inside_C].min()), float(strength_C[inside_C].max()))
    place_C = np.array([place_of(kind) for kind in pairs["kind"]])
    site_C = np.array([sites.index(site) for site in pairs["site"]])
    shown = sorted(set(place_C[inside_C].tolist()))
    lanes = _Lanes(len(sites), shown)
    across_C = _across(np.asarray(pairs["i"]), np.asarray(pairs["j"]))
    x_C = lanes.x(site_C, place_C, across_C)
    y_C = axis.y(np.where(inside_C, strength_C, axis.low))
    clouds = [_cloud(place, x_C, y_C, inside_C & (place_C == place)) for place in shown]
    return Scatter(
        summary=_words(clouds, axis),
        clouds=tuple(clouds),
        marks=tuple(_mark(each, sites, lanes, axis) for each in top if each["strength"] > 0),
        ticks_x=tuple((lanes.wide * (p + 0.5), site) for p, site in enumerate(sites)),
        edges=tuple(lanes.wide * p for p in range(1, len(sites))),
        ticks_y=axis.ticks(),
    )


@dataclass(frozen=True)
class _Log:
    """A logarithmic axis, upwards."""

    low: float
    high: float

    def y(self, value: Any) -> Any:
        span = math.log(self.high / self.low)
        return TALL * (1 - np.log(value / self.low) / (span or 1.0)) - (0 if span else TALL / 2)

    def ticks(self) -> Ticks:
        marks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
        inside = [mark for mark in marks if self.low <= mark <= self.high]
        tens = [mark for mark in inside if f"{mark:e}".startswith("1")]
        return tuple(
            (float(self.y(mark)), number(mark)) for mark in (tens if len(tens) > 2 else inside)
        )


@dataclass(frozen=True)
class _Lanes:
    """A column for each site, in it a lane for each kind that there is."""

    n_sites: int
    shown: Sequence[int]
    """Kinds by the numbers of their colours, ascending."""

    @property
    def wide(self) -> float:
        return WIDE / self.n_sites

    def x(self, site: Any, place: Any, across: Any) -> Any:
        """`across` from 0 to 1 is where in the lane."""
        lane = (np.searchsorted(self.shown, place) + 0.15 + 0.7 * across) / len(self.shown)
        return self.wide * (site + 0.06 + 0.88 * lane)


def _across(i_C: Any, j_C: Any) -> Any:
    return (i_C * _SPREAD[0] + j_C * _SPREAD[1]) % 1


def _cloud(
    place: int, x_C: NDArray[np.float64], y_C: NDArray[np.float64], chosen_C: NDArray[np.bool_]
) -> Cloud:
    every = np.flatnonzero(chosen_C)
    at = every[np.linspace(0, len(every) - 1, min(len(every), DOTS)).round().astype(int)]
    path = "".join(f"M{x:.1f},{y:.1f}h0" for x, y in zip(x_C[at], y_C[at], strict=True))
    return Cloud(KINDS[place], place, path, len(every))


def _mark(each: Mapping[str, Any], sites: Sequence[str], lanes: _Lanes, axis: _Log) -> Mark:
    place = place_of(each["kind"])
    x = lanes.x(sites.index(each["site"]), place, _across(each["i"], each["j"]))
    words = (
        f"Latents {each['i']} and {each['j']} at {each['site']}: {each['kind']}, strength "
        f"{number(each['strength'])}, together on {percent(each['frequency'])} of the tokens"
    )
    return Mark(each["i"], place, float(x), float(axis.y(each["strength"])), words)


def _words(clouds: Sequence[Cloud], axis: _Log) -> str:
    counts = ", ".join(f"{cloud.count} {cloud.kind}" for cloud in clouds)
    return f"Strength of {counts}; from {number(axis.low)} to {number(axis.high)}."


def correlation(value: float | None, ends: Sequence[float | None] | None) -> Correlation:
    """A rank correlation with its interval."""
    if value is None:
        return Correlation(None, "")
    low, high = ends if ends else (None, None)
    known = low is not None and high is not None
    return Correlation(_at(value), f"M{_at(low):.1f},0H{_at(high):.1f}" if known else "")


def _at(value: float | None) -> float:
    return REACH * (min(max(value or 0.0, -1.0), 1.0) + 1) / 2

"""The scaling scatter and the causal curve of a diff, as coordinates and words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosslens.diffing.classes import NAMES
from crosslens.diffing.scaling import NU_ERROR, NU_RECONSTRUCTION
from crosslens.explore.diff_charts import Ticks
from crosslens.explore.diff_read import Diffed
from crosslens.explore.diff_tables import cell
from crosslens.explore.figures import HEIGHT, WIDTH, number

TALL = 220.0
"""Of the scatter's plot area."""
LOW, HIGH = -0.5, 1.5
"""Of both axes of the scatter."""
CLOUD = 1500
"""Dots of one class in the scatter, at most."""
_ACROSS = (("kl_baseline", "no latent"), ("kl_full", "whole difference"))
_DRAWN = ("shared", "other", "only_a", "only_b")


@dataclass(frozen=True)
class Cloud:
    """The dots of a class, as a path of points."""

    kind: str
    path: str
    drawn: int
    inside: int
    """Latents of the class within the axes; more than are drawn where there are too many."""


@dataclass(frozen=True)
class Point:
    """A latent with a mark of its own."""

    latent: int
    x: float
    y: float
    cross: str
    """Path of both its intervals, cut at the axes."""
    words: str


@dataclass(frozen=True)
class Scatter:
    """ν of the error against ν of the reconstruction."""

    summary: str
    clouds: tuple[Cloud, ...]
    points: tuple[Point, ...]
    box: tuple[float, float]
    """Width and top of the corner at the bottom left that counts as specific to b."""
    ticks_x: Ticks
    ticks_y: Ticks
    outside: int
    ranked: int


def scaling_scatter(found: Diffed, ranked_L: NDArray[np.bool_], top: Sequence[int]) -> Scatter:
    """Latents that may be ranked, by class; those of `top` as points with their intervals.

    ν says how much of a latent's direction in b is in a as well, so a latent of a only is at no
    place that means anything.
    """
    columns = found.columns
    error_L, recon_L = columns["nu_error"], columns["nu_reconstruction"]
    inside_L = ranked_L & _within(error_L) & _within(recon_L)
    labels_L = columns["class_minder"]
    clouds = [_cloud(columns, inside_L & (labels_L == kind), kind) for kind in _DRAWN]
    ticks = (-0.5, 0.0, 0.5, 1.0, 1.5)
    return Scatter(
        summary=_scatter_words(found, inside_L, int(ranked_L.sum())),
        clouds=tuple(cloud for cloud in clouds if cloud.inside),
        points=tuple(_point(columns, latent) for latent in top if inside_L[latent]),
        box=(_x(NU_RECONSTRUCTION), _y(NU_ERROR)),
        ticks_x=tuple((_x(t), f"{t:g}") for t in ticks),
        ticks_y=tuple((_y(t), f"{t:g}") for t in ticks),
        outside=int((ranked_L & ~inside_L).sum()),
        ranked=int(ranked_L.sum()),
    )


def _within(value_L: Any) -> NDArray[np.bool_]:
    within: NDArray[np.bool_] = (value_L >= LOW) & (value_L <= HIGH)
    return within


def _x(value: float) -> float:
    return WIDTH * (min(max(value, LOW), HIGH) - LOW) / (HIGH - LOW)


def _y(value: float) -> float:
    return TALL - TALL * (min(max(value, LOW), HIGH) - LOW) / (HIGH - LOW)


def _cloud(columns: Mapping[str, Any], chosen_L: NDArray[np.bool_], kind: str) -> Cloud:
    latents = np.flatnonzero(chosen_L)
    at = latents[np.linspace(0, len(latents) - 1, min(len(latents), CLOUD)).round().astype(int)]
    pairs = zip(columns["nu_reconstruction"][at], columns["nu_error"][at], strict=True)
    path = "".join(f"M{_x(float(x)):.1f},{_y(float(y)):.1f}h0" for x, y in pairs)
    return Cloud(kind, path, len(at), len(latents))


def _point(columns: Mapping[str, Any], latent: int) -> Point:
    x, x_low, x_high = _ends(columns, "nu_reconstruction", latent)
    y, y_low, y_high = _ends(columns, "nu_error", latent)
    across = f"M{_x(x_low):.1f},{_y(y):.1f}H{_x(x_high):.1f}"
    cross = f"{across}M{_x(x):.1f},{_y(y_low):.1f}V{_y(y_high):.1f}"
    words = (
        f"Latent {latent}: ν of the error {between(y, y_low, y_high)}, of the reconstruction "
        f"{between(x, x_low, x_high)}"
    )
    return Point(latent, _x(x), _y(y), cross, words)


def _ends(columns: Mapping[str, Any], name: str, latent: int) -> tuple[float, float, float]:
    value, low, high = (float(columns[f"{name}{end}"][latent]) for end in ("", "_low", "_high"))
    return value, low, high


def between(value: float | None, low: float | None, high: float | None) -> str:
    """`0.50 (0.40 to 0.60)`; without the brackets where there is no interval."""
    told, ends = cell(value, low, high)
    return f"{told} ({ends})" if ends else told


def _scatter_words(found: Diffed, inside_L: NDArray[np.bool_], ranked: int) -> str:
    labels_L = found.columns["class_minder"]
    counts = {kind: int((inside_L & (labels_L == kind)).sum()) for kind in NAMES}
    b = found.facts["pair"]["b"]
    bounds = f"(below {NU_ERROR} and {NU_RECONSTRUCTION})"
    own = found.facts["by_scaling"]
    told = [f"{own} of {ranked} latents are specific to {b} by both ratios {bounds}"]
    told += [
        f"null {name}: {each['by_scaling']}"
        for name, each in found.facts["null"].items()
        if each["by_scaling"] is not None
    ]
    drawn = ", ".join(f"{counts[kind]} {kind.replace('_', ' ')}" for kind in _DRAWN)
    return "; ".join(told) + f". Within the axes: {drawn}."


@dataclass(frozen=True)
class Causal:
    """KL against the share of the latents put in."""

    summary: str
    brief: str
    path: str
    points: tuple[tuple[float, float, str], ...]
    """x, y, words."""
    whiskers: str
    """Path of all intervals."""
    levels: tuple[tuple[float, float, str], ...]
    """y of what is drawn across, y of its name, name: no latent, all that is decoded."""
    bottom: tuple[float, float, str] | None
    """The worse half alone."""
    ticks_x: Ticks
    ticks_y: Ticks


def causal_curve(causal: Mapping[str, Any], b: str) -> Causal | None:
    """The causal figures of a diff; x is a root, so that small shares are seen. None where no
    figure is finite."""
    rows = [row for row in causal["curve"] if row["kl"] is not None]
    if not rows:
        return None
    ends = [end for row in rows for end in row["intervals"].get("kl", ()) if end is not None]
    flat = [causal[f"kl_{name}"] for name in ("baseline", "full", "bottom_half")]
    top = max([*(row["kl"] for row in rows), *ends, *(v for v in flat if v is not None)]) or 1.0

    def y(value: float) -> float:
        return HEIGHT * (1 - max(value, 0.0) / top)

    points = [(WIDTH * math.sqrt(row["share"]), y(row["kl"]), _kl_words(row)) for row in rows]
    bottom = causal["kl_bottom_half"]
    brief = _causal_words(causal, b)
    return Causal(
        summary=f"{brief} Best first: {', '.join(map(_kl_words, rows[1:]))}.",
        brief=brief,
        path="M" + "L".join(f"{x:.1f},{at:.1f}" for x, at, _ in points),
        points=tuple(points),
        whiskers="".join(_whisker(row, y) for row in rows),
        levels=_levels({name: y(causal[key]) for key, name in _ACROSS if causal[key] is not None}),
        bottom=None if bottom is None else (WIDTH * math.sqrt(0.5), y(bottom), number(bottom)),
        ticks_x=tuple((WIDTH * math.sqrt(s), f"{100 * s:g} %") for s in (0, 0.01, 0.1, 0.5, 1)),
        ticks_y=tuple((y(top * share), number(top * share)) for share in (0, 0.5, 1)),
    )


def _levels(at: Mapping[str, float]) -> tuple[tuple[float, float, str], ...]:
    """The name of the upper line stands above it, that of the lower below, if there is room."""
    upper = min(at.values(), default=0.0)
    return tuple(
        (y, y - 4 if y == upper or y > HEIGHT - 14 else y + 11, name) for name, y in at.items()
    )


def _whisker(row: Mapping[str, Any], y: Any) -> str:
    low, high = row["intervals"].get("kl", (None, None))
    if low is None or high is None:
        return ""
    return f"M{WIDTH * math.sqrt(row['share']):.1f},{y(low):.1f}V{y(high):.1f}"


def _kl_words(row: Mapping[str, Any]) -> str:
    told = between(row["kl"], *row["intervals"].get("kl", (None, None)))
    return f"{100 * row['share']:g} % of the latents: {told} nats"


def _causal_words(causal: Mapping[str, Any], b: str) -> str:
    def told(name: str) -> str:
        return between(causal[name], *causal["intervals"].get(name, (None, None)))

    return (
        f"KL to {b}, nats per prediction: {told('kl_baseline')} with no latent put in, "
        f"{told('kl_full')} with the whole decoded difference; better half "
        f"{told('kl_top_half')}, worse half {told('kl_bottom_half')}."
    )

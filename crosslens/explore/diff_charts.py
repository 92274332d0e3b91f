"""The shapes of a diff's charts: numbers in, coordinates and words out. No drawing here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosslens.diffing.classes import DEAD, NAMES, PUBLISHED, SHARED, Bins
from crosslens.explore.diff_read import Diffed
from crosslens.explore.figures import HEIGHT, WIDTH, number

Values = NDArray[np.float64]
Ticks = tuple[tuple[float, str], ...]
BINS = 72
"""Of the relative norm; Minder et al.'s bounds fall between two of them."""
COSINE_BINS = 40
NORM_WIDTH = 244.0
"""Of the relative norm's axis; the dead stand apart, on its right."""
CONVENTIONS = {"minder": "Minder", "kissane": "Kissane"}


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram."""

    x: float
    y: float
    wide: float
    high: float
    kind: str
    """Class of the latents in it."""


@dataclass(frozen=True)
class Segment:
    """A stretch of the axis that a published convention calls one class."""

    x: float
    wide: float
    kind: str
    count: int


@dataclass(frozen=True)
class Histogram:
    """Counts on a logarithmic scale, with the nulls' as outlines."""

    summary: str
    """All of it in words."""
    brief: str
    """The pair alone in words."""
    bars: tuple[Bar, ...]
    outlines: tuple[tuple[str, str], ...]
    """Null, path."""
    ticks_x: Ticks
    ticks_y: Ticks
    bands: tuple[tuple[str, tuple[Segment, ...]], ...] = ()
    """Convention, its classes from left to right."""


def norm_histogram(found: Diffed) -> Histogram:
    """Latents by r = ‖d_b‖ / (‖d_a‖ + ‖d_b‖); those that are dead have a bar of their own."""
    edges = np.linspace(0, 1, BINS + 1)
    nulls = {name: _norm_counts(columns, edges) for name, columns in found.nulls.items()}
    counts = _norm_counts(found.columns, edges)
    height, ticks_y = log_axis(max(int(each.max()) for each in (counts, *nulls.values())))
    step = NORM_WIDTH / BINS
    kinds = [_kind((i + 0.5) / BINS) for i in range(BINS)]
    bars = [
        _bar(i * step, step - 0.5, height(n), kinds[i])
        for i, n in enumerate(counts[:-1].tolist())
        if n
    ]
    if counts[-1]:
        bars.append(_bar(WIDTH - 16, 12.0, height(int(counts[-1])), "dead"))
    outlines = tuple((name, _norm_outline(each, step, height)) for name, each in nulls.items())
    told = _norm_words(found)
    return Histogram(
        summary="By Minder et al.'s bounds: " + "; ".join(told) + ".",
        brief=told[0],
        bars=tuple(bars),
        outlines=outlines,
        ticks_x=(*((NORM_WIDTH * r, f"{r:g}") for r in (0, 0.25, 0.5, 0.75, 1)),
                 (WIDTH - 10, "dead")),
        ticks_y=ticks_y,
        bands=tuple((told, _band(found, bins)) for bins, told in CONVENTIONS.items()),
    )  # fmt: skip


def _norm_counts(columns: Mapping[str, Any], edges: Values) -> Any:
    """Living latents in each bin, then the dead."""
    dead_L = columns["class_minder"] == NAMES[DEAD]
    counts, _ = np.histogram(columns["relative_norm"][~dead_L], edges)
    return np.append(counts, dead_L.sum())


def _norm_outline(counts: Any, step: float, height: Callable[[int], float]) -> str:
    dead = height(int(counts[-1]))
    apart = f"M{WIDTH - 17:.1f},{HEIGHT - dead:.1f}h14" if dead else ""
    return outline(counts[:-1].tolist(), step, height) + apart


def _kind(r: float) -> str:
    """Minder et al.'s class of a latent that is alive."""
    bins, delta = PUBLISHED["minder"], difference_of(r)
    if delta < bins.only_a_below:
        return "only_a"
    if delta > bins.only_b_above:
        return "only_b"
    return "shared" if bins.shared_above < delta < bins.shared_below else "other"


def difference_of(r: float) -> float:
    """Δ of a latent whose relative norm is r."""
    return r / (2 * (1 - r)) if r < 0.5 else 1 - (1 - r) / (2 * r)


def relative_of(delta: float) -> float:
    """r of a latent whose norm difference is Δ."""
    return 2 * delta / (1 + 2 * delta) if delta < 0.5 else 1 / (3 - 2 * delta)


def _band(found: Diffed, name: str) -> tuple[Segment, ...]:
    """Where the convention's classes lie on the axis of r, and how many latents are in each."""
    bins: Bins = PUBLISHED[name]
    bounds = [bins.only_a_below, bins.shared_above, bins.shared_below, bins.only_b_above]
    alive_L = found.columns["class_minder"] != NAMES[DEAD]
    value_N = found.columns[bins.measure][alive_L]
    # A latent on a bound is of the class between, as in `classes`.
    inner = [(value_N >= a) & (value_N <= b) for a, b in (bounds[:2], bounds[2:])]
    shared_N = (value_N > bounds[1]) & (value_N < bounds[2])
    masks = [value_N < bounds[0], inner[0], shared_N, inner[1], value_N > bounds[3]]
    ends = [0.0, *bounds, 1.0]
    if bins.measure == "norm_difference":
        ends = [relative_of(delta) for delta in ends]
    kinds = ("only_a", "other", "shared", "other", "only_b")
    return tuple(
        Segment(NORM_WIDTH * low, NORM_WIDTH * (high - low), kind, int(mask_N.sum()))
        for low, high, kind, mask_N in zip(ends, ends[1:], kinds, masks, strict=False)
        if high > low
    )


def _norm_words(found: Diffed) -> list[str]:
    pair, counts = found.facts["pair"], found.facts["classes"]
    return [
        f"{counts['only_a']} only in {pair['a']}, {counts['shared']} shared, {counts['only_b']} "
        f"only in {pair['b']}, {counts['other']} between, {counts['dead']} dead",
        *(f"null {name}: {each['classes']['only_a']}, {each['classes']['shared']}, "
        f"{each['classes']['only_b']}, {each['classes']['other']}, {each['classes']['dead']}"
        for name, each in found.facts["null"].items()),
    ]  # fmt: skip


def cosine_histogram(found: Diffed) -> Histogram | None:
    """Shared latents by cos(d_a, d_b); None where there is no cosine, the widths being different,
    or nothing is shared."""
    edges = np.linspace(-1, 1, COSINE_BINS + 1)
    cosine_N = shared_cosines(found.columns)
    if not len(cosine_N):
        return None
    nulls = {name: shared_cosines(columns) for name, columns in found.nulls.items()}
    counts = {name: np.histogram(each, edges)[0] for name, each in nulls.items()}
    own, _ = np.histogram(cosine_N, edges)
    height, ticks_y = log_axis(max(int(each.max()) for each in (own, *counts.values())))
    step = WIDTH / COSINE_BINS
    bars = (_bar(i * step, step - 0.8, height(n), "shared") for i, n in enumerate(own.tolist()))
    told = _cosine_words("Shared latents", cosine_N)
    beside = [_cosine_words(f"null {name}", each) for name, each in nulls.items()]
    return Histogram(
        summary="; ".join([told, *beside]) + ".",
        brief=f"{told}.",
        bars=tuple(bar for bar in bars if bar.high),
        outlines=tuple((n, outline(each.tolist(), step, height)) for n, each in counts.items()),
        ticks_x=tuple((WIDTH * (c + 1) / 2, f"{c:g}") for c in (-1, -0.5, 0, 0.5, 1)),
        ticks_y=ticks_y,
    )  # fmt: skip


def shared_cosines(columns: Mapping[str, Any]) -> Values:
    """Decoder cosines of the shared latents, of those that have one, within [−1, 1]."""
    cosine_N: Values = columns["decoder_cosine"][columns["class_minder"] == NAMES[SHARED]]
    return cosine_N[np.isfinite(cosine_N)].clip(-1, 1)


def _cosine_words(name: str, cosine_N: Values) -> str:
    if not len(cosine_N):
        return f"{name}: none"
    low, median = np.quantile(cosine_N, [0.05, 0.5]).tolist()
    told = f"{name}: {len(cosine_N)}, median cosine {number(median)}"
    return f"{told}, one in twenty below {number(low)}"


def log_axis(most: int) -> tuple[Callable[[int], float], Ticks]:
    """Count → height of its bar, from 0 for none, and the marks (y, label). One latent is seen."""
    top = math.log(2 * max(most, 2))

    def height(n: int) -> float:
        return HEIGHT * math.log(2 * n) / top if n else 0.0

    factors = (1, 2, 5) if most < 30 else (1,)
    marks = [f * 10**e for e in range(9) for f in factors if f * 10**e <= most]
    return height, tuple((HEIGHT - height(mark), f"{mark:,}") for mark in marks)


def outline(counts: Sequence[int], step: float, height: Callable[[int], float]) -> str:
    """The path round a histogram."""
    levels = "".join(f"V{HEIGHT - height(n):.1f}h{step:.2f}" for n in counts)
    return f"M0,{HEIGHT:.1f}{levels}V{HEIGHT:.1f}"


def _bar(x: float, wide: float, high: float, kind: str) -> Bar:
    return Bar(x, HEIGHT - high, wide, high, kind)

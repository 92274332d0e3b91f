"""The shapes of a report's charts: numbers in, coordinates and words out. No drawing here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from crosslens.explore.store import LatentStore

WIDTH, HEIGHT = 280.0, 110.0
"""Of a chart's plot area."""
_CELLS = 1500
_MIN_COLUMNS, _MAX_COLUMNS = 40, 200


@dataclass(frozen=True)
class Line:
    """A polyline, with its points where they are few."""

    name: str
    kind: str
    path: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Curve:
    """A quantity over the steps of a training."""

    title: str
    summary: str
    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, str], ...]
    last_step: int


@dataclass(frozen=True)
class Bars:
    """A histogram: (x, y, width, height) of each bar, and labels under it."""

    summary: str
    bars: tuple[tuple[float, float, float, float], ...]
    ticks: tuple[tuple[float, str], ...]
    most: str


@dataclass(frozen=True)
class Strip:
    """Latents from left to right, one row per site: (x, width, share of the largest norm)."""

    summary: str
    rows: tuple[tuple[str, int, float, tuple[tuple[float, float, float], ...]], ...]
    """Site, latents whose norm is largest there, their share, cells."""


def curves(metrics: Sequence[Mapping[str, Any]]) -> tuple[Curve, ...]:
    """Loss, FVU, L0 and dead share over the steps, as far as they were logged."""
    wanted = (("FVU", "fvu", True), ("Loss", "loss", True), ("L0", "l0", True))
    found = [_curve(metrics, *each) for each in (*wanted, ("Dead share", "dead", False))]
    return tuple(curve for curve in found if curve is not None)


def _curve(
    metrics: Sequence[Mapping[str, Any]], title: str, key: str, logarithmic: bool
) -> Curve | None:
    train = _series(metrics, key)
    heldout = _series([{"step": m["step"], **m["heldout"]} for m in metrics if "heldout" in m], key)
    values = [value for _, value in train + heldout]
    if not values:
        return None
    last = max(step for step, _ in train + heldout)
    low, high = min(values), max(values)
    logarithmic = logarithmic and low > 0 and high > 3 * low
    height, ticks = _axis(low if logarithmic else min(low, 0.0), high, logarithmic)
    named = (("training", "train", train), ("held out", "heldout", heldout))
    lines = tuple(
        _line(name, kind, [(x * WIDTH / max(last, 1), height(y)) for x, y in series])
        for name, kind, series in named
        if series
    )
    ends = "; ".join(
        f"{name} from {number(series[0][1])} to {number(series[-1][1])}"
        for name, _, series in named
        if series
    )
    return Curve(title, f"{title} over {last} steps: {ends}.", lines, ticks, last)


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    pairs = [(int(m["step"]), m[key]) for m in metrics if m.get(key) is not None]
    return [(step, float(value)) for step, value in pairs if math.isfinite(value)]


def _line(name: str, kind: str, points: list[tuple[float, float]]) -> Line:
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Line(name, kind, path, tuple(points) if len(points) <= 60 else ())


def _axis(
    low: float, high: float, logarithmic: bool
) -> tuple[Callable[[float], float], tuple[tuple[float, str], ...]]:
    """Value → height on the chart, and the tick marks."""
    if logarithmic:
        bottom, top = math.log(low), math.log(high)
        marks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
    else:
        bottom, top = low, high if high > low else low + 1
        step = 10.0 ** math.floor(math.log10(top - bottom))
        step *= next(f for f in (0.2, 0.5, 1, 2) if (top - bottom) / (f * step) <= 5)
        marks = [low + i * step for i in range(7)]

    def height(value: float) -> float:
        at = math.log(max(value, low)) if logarithmic else value
        return HEIGHT * (1 - (at - bottom) / (top - bottom))

    inside = [mark for mark in marks if low - 1e-12 <= mark <= max(high, top) + 1e-12]
    return height, tuple((height(mark), f"{mark:.4g}") for mark in inside)


def density_histogram(store: LatentStore) -> Bars:
    """Living latents by the share of tokens they are active on, four bins per factor of ten."""
    density = store.density_L[store.alive_L].astype(np.float64)
    if not len(density):
        return Bars("No latent is ever active.", (), (), "0")
    lowest = math.floor(math.log10(1 / store.manifest.tokens))
    edges = np.linspace(lowest, 0, -lowest * 4 + 1)
    counts, _ = np.histogram(np.log10(density).clip(lowest, 0), edges)
    step, most = WIDTH / len(counts), int(counts.max())
    bars = tuple(
        (i * step, HEIGHT * (1 - n / most), step - 1, HEIGHT * n / most)
        for i, n in enumerate(counts.tolist())
        if n
    )
    ticks = tuple((WIDTH * (e - lowest) / -lowest, _power(e)) for e in range(lowest, 1))
    median = percent(float(np.median(density)))
    summary = f"{len(density)} living latents; half are active on at least {median} of the tokens."
    return Bars(summary, bars, ticks, f"{most}")


def norm_strip(store: LatentStore) -> Strip:
    """Where latents write: norms as shares of each latent's largest, latents sorted by the mean
    site of their norm, averaged over neighbours to fit."""
    norm_LP = store.norm_LP[store.alive_L].astype(np.float64)
    sites = store.manifest.sites
    if not len(norm_LP):
        return Strip("No latent is ever active.", ())
    largest_L = norm_LP.max(1, keepdims=True)
    share_LP = norm_LP / np.maximum(largest_L, np.finfo(np.float64).tiny)
    mean_site_L = share_LP @ np.arange(len(sites)) / np.maximum(share_LP.sum(1), 1e-12)
    share_LP = share_LP[np.argsort(mean_site_L, kind="stable")]
    columns = max(_MIN_COLUMNS, min(_MAX_COLUMNS, _CELLS // len(sites), len(share_LP)))
    edges = np.linspace(0, len(share_LP), min(columns, len(share_LP)) + 1).round().astype(int)
    cells_CP = np.stack([share_LP[a:b].mean(0) for a, b in pairwise(edges)])
    peaks_P = np.bincount(norm_LP.argmax(1), minlength=len(sites))
    wide = 2 * WIDTH / len(cells_CP)
    rows = tuple(
        (
            site,
            int(peaks_P[p]),
            float(peaks_P[p] / len(norm_LP)),
            tuple((c * wide, wide, round(float(v), 2)) for c, v in enumerate(cells_CP[:, p])),
        )
        for p, site in enumerate(sites)
    )
    return Strip(_strip_summary(share_LP, sites, peaks_P), rows)


def _strip_summary(share_LP: Any, sites: Sequence[str], peaks_P: Any) -> str:
    wide = float(np.mean((share_LP >= 0.5).sum(1)))
    best = sites[int(np.argmax(peaks_P))]
    return (
        f"On average a latent's decoder norm is at least half its largest at {wide:.1f} of "
        f"{len(sites)} sites; most latents peak at {best}."
    )


def number(value: float) -> str:
    """Three digits that matter."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{digits}f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{number(100 * share)} %"


def _power(exponent: int) -> str:
    return {0: "100 %", -1: "10 %", -2: "1 %", -3: "0.1 %"}.get(exponent, f"1e{exponent}")

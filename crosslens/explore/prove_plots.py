"""The frontier of each site and the recursion over layers, as coordinates and words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosslens.explore.diff_charts import Ticks
from crosslens.explore.figures import HEIGHT, WIDTH, number, percent

SURROGATES = ("additive", "given bias", "linear", "dominance", "nothing")
"""In the order of their colours; a mixture is of the linear surrogate's tiers."""
_LEAST = 1e-6
"""Of brute force's flops: where the axis of costs begins at the earliest."""


@dataclass(frozen=True)
class Dot:
    """A tier on the plane of cost and bound."""

    x: float
    y: float
    place: int
    """Of its surrogate."""
    kind: str
    """`whole`: with the tables; `token`: what each token costs."""
    front: bool
    words: str


@dataclass(frozen=True)
class Plane:
    """Bound against cost at one site, both on log axes."""

    site: str
    summary: str
    brief: str
    dots: tuple[Dot, ...]
    fronts: tuple[tuple[str, str], ...]
    """Kind, and the path along the dots that no cheaper one beats."""
    baseline: str
    """Path."""
    brute_x: float
    ticks_x: Ticks
    ticks_y: Ticks


def plane(site: Mapping[str, Any]) -> Plane:
    """One site's tiers twice: with the tables they need, and by what each token costs."""
    output = site["output"] or 1.0
    whole, token = site["frontier"], site["frontier_per_token"]
    groups = [("whole", whole), ("token", token)]
    shares = [p["flops"] / f["baseline"]["brute"] for _, f in groups for p in f["points"]]
    bounds = [p["bound"] / output for p in whole["points"] if p["bound"] > 0]
    across = _log([max(each, _LEAST) for each in shares if each > 0] + [1.0], 0.0, WIDTH)
    upward = _log([*bounds, 1.0], HEIGHT, 0.0)
    dots = [
        _dot(point, kind, found["baseline"]["brute"], output, (across.at, upward.at))
        for kind, found in groups
        for point in found["points"]
        if point["bound"] > 0
    ]
    return Plane(
        site=site["site"],
        summary=_words(site, whole, token),
        brief=_brief(whole, token),
        dots=tuple(dots),
        fronts=tuple((kind, _front(dots, kind)) for kind, _ in groups),
        baseline=_baseline(whole["baseline"]["start"] / output, across, upward),
        brute_x=across.at(1.0),
        ticks_x=across.ticks(),
        ticks_y=upward.ticks(),
    )


@dataclass(frozen=True)
class Log:
    """A log axis from `low` to `high`, drawn from `first` to `last`."""

    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.first + (self.last - self.first) * share

    def ticks(self) -> Ticks:
        """Powers of ten, few enough to read."""
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        step = max(1, -(-(last - first + 1) // 6))
        return tuple((self.at(10.0**e), _power(e)) for e in range(first, last + 1, step))


def _log(values: Sequence[float], first: float, last: float) -> Log:
    low, high = min(values), max(values)
    return Log(low / 1.3, high * 1.3, first, last)


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -2 <= exponent <= 3 else f"1e{exponent}"


def _dot(
    point: Mapping[str, Any],
    kind: str,
    brute: float,
    output: float,
    at: tuple[Callable[[float], float], Callable[[float], float]],
) -> Dot:
    share, ratio = point["flops"] / brute, point["bound"] / output
    own = "with its tables" if kind == "whole" else "each token, tables apart"
    return Dot(
        x=at[0](max(share, _LEAST)),
        y=at[1](ratio),
        place=place_of(point["name"]),
        kind=kind,
        front=bool(point["on_front"]),
        words=(
            f"{point['name']}: at most {number(ratio)} of ‖f(x̂)‖ for {number(share)} of brute "
            f"force's flops ({own}); improvement {number(point['improvement'])}"
        ),
    )


def _front(dots: Sequence[Dot], kind: str) -> str:
    own = sorted((dot.x, dot.y) for dot in dots if dot.front and dot.kind == kind)
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in own) if own else ""


def place_of(tier: str) -> int:
    """The number of a tier's surrogate."""
    return SURROGATES.index(tier.removeprefix("mixed ").split("/")[0])


def _baseline(start: float, across: Log, upward: Log) -> str:
    """start · (1 − share): a line, bent by the axes."""
    points = []
    for i in range(81):
        share = math.exp(
            math.log(across.low) + (math.log(min(1.0, across.high) / across.low)) * i / 80
        )
        value = start * (1 - share)
        points.append(f"{across.at(share):.1f},{upward.at(max(value, upward.low)):.1f}")
    return "M" + "L".join(points)


def _brief(whole: Mapping[str, Any], token: Mapping[str, Any]) -> str:
    return (
        f"Score {number(whole['score'])} with tables for these tokens alone, "
        f"{number(token['score'])} where many tokens share them."
    )


def _words(site: Mapping[str, Any], whole: Mapping[str, Any], token: Mapping[str, Any]) -> str:
    front = [p["name"] for p in token["points"] if p["on_front"]]
    return (
        f"Bound against cost at {site['site']}, log axes, {len(whole['points'])} tiers. On the "
        f"frontier by what a token costs: {', '.join(front)}. {_brief(whole, token)}"
    )


@dataclass(frozen=True)
class Climb:
    """The recursion: certified error, true error and the row's norm after each step, log axis."""

    summary: str
    brief: str
    certified: str
    truth: str
    norm: str
    sites: tuple[tuple[float, float, str], ...]
    """x, y, words of the coder's sites."""
    ticks_x: Ticks
    ticks_y: Ticks


def climb(found: Mapping[str, Any]) -> Climb:
    """All steps of the recursion, from left to right."""
    steps = found["steps"]
    wide = 2 * WIDTH / max(len(steps) - 1, 1)
    values = [s[key] for s in steps for key in ("after", "true", "norm") if s[key] > 0]
    upward = _log(values or [1.0], HEIGHT, 0.0)
    last = steps[-1]
    brief = (
        f"After the last layer ‖x − r‖ ≤ {number(last['after'])}, truly {number(last['true'])}, "
        f"where ‖x‖ is {number(last['norm'])}. "
        + (
            f"That proves nothing of the loss beyond what the weights alone do, at most "
            f"{number(found['loss'])} nats (guessing: {number(found['loss_uniform'])})."
            if found["vacuous"]
            else f"The weights alone bound the loss by {number(found['loss'])} nats."
        )
    )

    def path(key: str) -> str:
        return "M" + "L".join(
            f"{i * wide:.1f},{upward.at(max(s[key], upward.low)):.1f}" for i, s in enumerate(steps)
        )

    sites = [(i, s) for i, s in enumerate(steps) if s["transition"] > 0]
    marks = [(i, s["name"].split()[-1]) for i, s in enumerate(steps) if s["name"][:4] == "mlp "]
    return Climb(
        summary=f"Error by recursion over {len(steps)} steps, log axis. {brief}",
        brief=brief,
        certified=path("after"),
        truth=path("true"),
        norm=path("norm"),
        sites=tuple((i * wide, upward.at(s["after"]), _site_words(s)) for i, s in sites),
        ticks_x=tuple((i * wide, layer) for i, layer in marks if int(layer) % 5 == 0),
        ticks_y=upward.ticks(),
    )


def _site_words(step: Mapping[str, Any]) -> str:
    grown = step["transition"] / step["after"] if step["after"] else 0.0
    return (
        f"{step['name']}: transition {number(step['transition'])}, {percent(grown)} of the error "
        f"there, {number(step['after'])}"
    )

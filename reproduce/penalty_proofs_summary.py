"""Figures of the sweep over seeds, and beside coders without a penalty that reconstruct as well."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Figures = Mapping[str, Any]
Flat = dict[str, float]

AS_THEY_ARE = ("fvu", "fvu_mid", "fvu_last", "l0", "interaction", "size", "bias", "seconds")
AT_THE_MLP = ("interaction", "size", "local ", "true ", "whole ", "decoded ", "term ")
"""Figures that depend on the crosscoder through the MLP's site. What bounds the model's loss
depends on it through the last, where regions are: all tiers that decode another are vacuous."""


def flat(result: Figures) -> Flat:
    """All figures of one crosscoder by one-word names."""
    found = {name: float(result[name]) for name in AS_THEY_ARE}
    for name, each in result["budgets"].items():
        found[f"loss {name}"] = each["bound"]
    for name, each in result["regions"].items():
        found[name] = each["bound"]
    for name, each in result["recursion"].items():
        found[f"loss {name}"] = each["bound"]
        for term in ("propagation", "interaction", "transition"):
            found[f"term {name} {term}"] = each["terms"][term]
    for name, tier in result["local"]["tiers"].items():
        found[f"local {name}"], found[f"true {name}"] = tier["ratio"], tier["true"]
    found |= {f"whole {name}": value for name, value in result["local"]["whole"].items()}
    return found | {f"decoded {name}": value for name, value in result["decoded"].items()}


def summary(results: Sequence[Figures]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every figure, by family, weight and active latents;
    for those with a penalty also the difference from no penalty at the same reconstruction, seed
    by seed."""
    known = [(result, flat(result)) for result in results]
    ladders: dict[int, list[Flat]] = {}
    for result, own in known:
        if result["family"] == "none":
            ladders.setdefault(result["seed"], []).append(own)
    rows = []
    keys = dict.fromkeys((r["family"], r["weight"], r["active"]) for r in results)
    for family, weight, active in keys:
        mine = [
            (ladders.get(r["seed"], []), own)
            for r, own in known
            if (r["family"], r["weight"], r["active"]) == (family, weight, active)
        ]
        row = {"family": family, "weight": weight, "active": active, "seeds": len(mine)}
        rows.append({
            **row,
            "figures": {name: _spread([own[name] for _, own in mine]) for name in mine[0][1]},
            "matched": None if family == "none" else _matched(mine),
        })  # fmt: skip
    return rows


def _spread(values: Sequence[float]) -> dict[str, float]:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": sd}


def _matched(mine: Sequence[tuple[list[Flat], Flat]]) -> dict[str, dict[str, float]]:
    """Figure → spread of the difference, over the seeds whose ladder reaches that far."""
    found: dict[str, list[float]] = {}
    for ladder, own in mine:
        for name, value in own.items():
            same = at_same(ladder, name, own)
            if same is not None:
                found.setdefault(name, []).append(value - same)
    return {name: {**_spread(values), "seeds": len(values)} for name, values in found.items()}


def at_same(ladder: Sequence[Flat], name: str, own: Flat) -> float | None:
    """What no penalty gives at a crosscoder's FVU at the site that the figure depends on, on lines
    between its own; None beyond them."""
    by = "fvu_mid" if name.startswith(AT_THE_MLP) else "fvu_last"
    for low, high in pairwise(sorted(ladder, key=lambda each: each[by])):
        if low[by] <= own[by] <= high[by] and high[by] > low[by]:
            share = (own[by] - low[by]) / (high[by] - low[by])
            return (1 - share) * low[name] + share * high[name]
    return None

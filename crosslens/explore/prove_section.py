"""The section of a report about layer-local proofs: the table, the frontiers, the recursion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosslens.explore.figures import number
from crosslens.explore.prove_plots import SURROGATES, Climb, Plane, climb, place_of, plane
from crosslens.explore.prove_read import Proved

PLANES = 12
"""Sites whose frontier is drawn, evenly over the layers."""
METHODS = {
    "exact": "exact interaction, written by W_out",
    "neurons": "exact interaction of each neuron",
    "sizes": "sizes of contributions",
    "pairs": "table of pairs",
    "cap": "weights alone",
}
WORDS = {
    "additive": "each latent's own effect",
    "given bias": "each latent's effect beside the biases",
    "linear": "a fitted linear effect of each latent",
    "dominance": "the largest contribution alone",
    "nothing": "no surrogate",
}
"""What each surrogate is."""


@dataclass(frozen=True)
class Row:
    """A tier over all sites: (certified, true) as shares of ‖f(x̂)‖."""

    name: str
    place: int
    cells: tuple[tuple[str, str], ...]
    cost: str
    """Flops of a token without tables, of brute force's: the mean over sites."""


@dataclass(frozen=True)
class Section:
    """All that the page says about proofs."""

    facts: Mapping[str, Any]
    groups: tuple[tuple[str, str, tuple[Row, ...]], ...]
    """Surrogate, what it is, its tiers."""
    others: tuple[Row, ...]
    """The coder's error, the transition, and both steps together."""
    estimates: tuple[Row, ...]
    """Certified, true and estimated of the tier with the best bounds."""
    planes: tuple[Plane, ...]
    legend: tuple[tuple[str, int], ...]
    climb: Climb | None
    no_climb: str
    refused: tuple[str, ...]
    """Sites whose certificate the checker refused."""


def section(found: Proved) -> Section:
    """The shapes and words of a run's layer-local proofs."""
    facts, sites = found.facts, found.facts["sites"]
    recursion = facts["recursion"]
    there = recursion is not None and "steps" in recursion
    return Section(
        facts=facts,
        groups=_groups(sites),
        others=_others(sites),
        estimates=_estimates(sites),
        planes=tuple(plane(site) for site in _spread(sites)),
        legend=tuple((name, place) for place, name in enumerate(SURROGATES)),
        climb=climb(recursion) if there else None,
        no_climb="" if there else _why(recursion),
        refused=tuple(site["site"] for site in sites if not site["checked"]),
    )


def _spread(sites: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    step = max(1, -(-len(sites) // PLANES))
    return list(sites[::step])


def _why(recursion: Mapping[str, Any] | None) -> str:
    return "it was not asked for." if recursion is None else str(recursion["left_out"])


def _groups(sites: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str, tuple[Row, ...]], ...]:
    found: dict[str, list[Row]] = {}
    for place, tier in enumerate(sites[0]["tiers"]):
        surrogate = SURROGATES[place_of(tier["name"])]
        found.setdefault(surrogate, []).append(_row(sites, place))
    return tuple((name, WORDS[name], tuple(rows)) for name, rows in found.items())


def _row(sites: Sequence[Mapping[str, Any]], place: int) -> Row:
    name = sites[0]["tiers"][place]["name"]
    method = name.split("/")[1]
    told = METHODS.get(method, f"the worst {method} exact, the others by neuron")
    cells = [_cell(site["tiers"][place]) for site in sites]
    shares = [site["tiers"][place]["flops_per_token"] / site["brute_per_token"] for site in sites]
    return Row(told, place_of(name), tuple(cells), number(sum(shares) / len(shares)))


def _cell(tier: Mapping[str, Any]) -> tuple[str, str]:
    return _told(tier["ratio"]), _told(tier["true_ratio"])


def _told(value: float | None) -> str:
    return "–" if value is None else number(float(value))


def _others(sites: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    both = [
        (number(site["whole"]["bound"] / site["output"]),
         number(site["whole"]["true"] / site["output"]))
        for site in sites
    ]  # fmt: skip
    return (
        Row("‖x − x̂‖ / ‖x‖", 0, tuple(_cell(site["coder"]) for site in sites), ""),
        Row("‖f(x) − f(x̂)‖ / ‖f(x̂)‖", 0, tuple(_cell(s["transition"]) for s in sites), ""),
        Row("‖f(x) − surrogate‖ / ‖f(x̂)‖", 0, tuple(both), ""),
    )


def _estimates(sites: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    """Per surrogate: the estimate, and the truth it is of."""
    rows = []
    for name in SURROGATES:
        true = {t["name"].split("/")[0]: t["true_ratio"] for t in sites[0]["tiers"]}
        if name not in true or name == "nothing":
            continue
        cells = []
        for site in sites:
            own = {t["name"].split("/")[0]: t["true_ratio"] for t in site["tiers"]}
            cells.append((number(site["estimate"]["interaction"][name]), _told(own[name])))
        rows.append(Row(name, SURROGATES.index(name), tuple(cells), ""))
    return tuple(rows)

"""What the section says of attention heads, of what changed between two models, of clusters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crosslens.explore.figures import number, percent
from crosslens.explore.interact_tables import with_ends

HEADS = 20
"""Heads in the table."""
CHANGED = 15
"""Triplets in the table of changes."""
Columns = tuple[tuple[str, str], ...]
"""Name of a column, and what it is."""
_HEAD_COLUMNS: Columns = (
    ("scores' variance", "Variance of the head's scores over the keys of a query, mean over "
     "drawn queries: how much there is to explain."),
    ("interaction", "Part of that variance which is neither of the key alone, nor of the query "
     "alone, nor of their distance: query × key, centred over keys. 95 % over documents."),
    ("with error", "Part of the variance that involves what the coder does not write."),
    ("binding", "Of what the measured pairs do (strength × frequency), the part of those that draw "
     "attention reliably from the one latent to the other."),
    ("dominance", "Mean bound tanh(osc/4) of the total variation between the head's attention and "
     "that from the one best latent of the query. 1: nothing is known."),
    ("variation", "The total variation itself, which the bound is of."),
)  # fmt: skip
_CHANGE_COLUMNS: Columns = (
    ("strength before", "Mean Σ ‖w_out‖·|Δ| where both are active, in the first model."),
    ("after", "The same in the last model."),
    ("change", "After − before, with its 95 % interval over documents."),
    ("by weights", "What of the change is by decoders and the MLP's weights, the code being kept."),
    ("by code", "What of it is by strengths, the norm's scalar and what the coder misses."),
)


@dataclass(frozen=True)
class HeadRow:
    """One head."""

    name: str
    figures: tuple[tuple[str, str], ...]
    """Figure and interval, one for each column."""
    query: int | None
    key: int | None
    """Of its strongest pair."""


@dataclass(frozen=True)
class HeadTable:
    """The heads in which most of the scores' variance is interaction."""

    columns: Columns
    rows: tuple[HeadRow, ...]
    words: str


@dataclass(frozen=True)
class ChangeRow:
    """One triplet in two models."""

    i: int
    j: int
    site: str
    figures: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ChangeTable:
    """The triplets that changed most."""

    columns: Columns
    rows: tuple[ChangeRow, ...]
    words: str


def head_table(attention: Mapping[str, Mapping[str, Any]]) -> HeadTable | None:
    """The heads, the most interaction first; None where there are none."""

    def amount(head: str) -> float:
        each = attention[head]
        return (each["variance"] or 0.0) * (each["interaction_share"] or 0.0)

    ranked = sorted(attention, key=amount, reverse=True)
    rows = tuple(_head_row(head, attention[head]) for head in ranked[:HEADS])
    first = f"The first {len(rows)} of {len(attention)} heads, by variance × interaction; all are "
    words = (
        f"{first}in interact.json, with their pairs, overlaps of key sets and paths of values. "
        "The strongest pair is query → key, of those measured."
    )
    return HeadTable(_HEAD_COLUMNS, rows, words) if rows else None


def _head_row(head: str, each: Mapping[str, Any]) -> HeadRow:
    dominance, pairs = each["dominance"], each["pairs"]
    figures = (
        with_ends(each["variance"]),
        with_ends(each["interaction_share"], each["interaction_ci"], percent),
        with_ends(each["error_share"], None, percent),
        with_ends(each["by_kind"]["binding"], None, percent),
        with_ends(dominance["bound"]),
        with_ends(dominance["variation"]),
    )
    best = pairs[0] if pairs else {"query": None, "key": None}
    return HeadRow(head, figures, best["query"], best["key"])


def change_table(changes: Mapping[str, Any] | None) -> ChangeTable | None:
    """What changed most; None where it was not asked, or nothing could be compared."""
    if changes is None:
        return None
    rows = tuple(_change_row(each) for each in changes["most"][:CHANGED])
    words = (
        f"The first {len(rows)} of {changes['triplets']:,} pairs that either model's table holds, "
        f"by change of strength × frequency; {changes['near_changed']:,} of them have a latent "
        f"whose decoders differ. {percent(changes['weights_share'])} of all change is by weights, "
        "the rest by the code."
    )
    return ChangeTable(_CHANGE_COLUMNS, rows, words)


def _change_row(each: Mapping[str, Any]) -> ChangeRow:
    before, after = each["strength"]
    named = ((before, None), (after, None), *((each[n], each[f"{n}_ci"]) for n in _PARTS))
    figures = tuple(with_ends(value, ends) for value, ends in named)
    return ChangeRow(each["i"], each["j"], each["sites"][-1], figures)


_PARTS = ("total", "weights", "code")


def clusters_words(clusters: Mapping[str, Mapping[str, Any]] | None) -> str:
    """One sentence for each site."""
    return " ".join(_cluster_words(site, each) for site, each in (clusters or {}).items())


def _cluster_words(site: str, each: Mapping[str, Any]) -> str:
    half = each["half_agreement"]
    halves = "" if half is None else f", between halves of the documents {number(half)}"
    return (
        f"{site}: {each['clusters']} clusters of {each['latents']} latents, modularity "
        f"{number(each['modularity'])} (rewired: {number(each['null_modularity'])}); agreement "
        f"between seeds {number(each['seed_agreement'])}{halves}."
    )


def effects_words(effects: Mapping[str, Mapping[str, Any]] | None) -> str:
    """How the effects were measured, and how large they are."""
    return " ".join(_effect_words(name, each) for name, each in (effects or {}).items())


def _effect_words(name: str, each: Mapping[str, Any]) -> str:
    pairs, sizes = each["pairs"], each["sizes"].get("interaction_abs", {})
    told = ", ".join(f"{count} {_CHOICES.get(kind, kind)}" for kind, count in pairs.items())
    means = ", ".join(
        f"{_CHOICES.get(kind, kind)} {number(found['mean'])}"
        for kind, found in sizes.items()
        if found.get("mean") is not None
    )
    reliable = each["reliability"].get("interaction_abs")
    twice = "" if reliable is None else f" Measured twice, ranks correlate {number(reliable)}."
    return (
        f"{name}: Δloss_ij − Δloss_i − Δloss_j of ablating at the site, {told}, on "
        f"{each['predictions']:,} predictions. Mean size, nats: {means}.{twice}"
    )


_CHOICES = {"top": "of the top", "random": "at random", "cooccurring": "meeting as often"}

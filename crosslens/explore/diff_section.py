"""The section of a report about a diff: tables, charts and the latents that stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosslens.diffing.measures import RARE
from crosslens.explore.diff_charts import Histogram, cosine_histogram, norm_histogram
from crosslens.explore.diff_plots import Causal, Scatter, causal_curve, scaling_scatter
from crosslens.explore.diff_read import Diffed
from crosslens.explore.diff_tables import (
    Cell,
    Planted,
    Table,
    baseline_rows,
    cell,
    class_name,
    counts_table,
    planted_box,
    recurrence_table,
)
from crosslens.explore.diff_timeline import Course, course
from crosslens.explore.figures import number, percent

TOP = 8
"""Latents of each class that are shown with examples."""
NULLS = {
    "self": "the first model against itself",
    "noop": "the first model against a fine-tune on its own text",
    "shuffled": "the two models exchanged on a random half of the tokens",
}


@dataclass(frozen=True)
class Top:
    """A latent that stands out, in figures."""

    latent: int
    figures: tuple[tuple[str, str, str], ...]
    """Name, figure, interval."""


@dataclass(frozen=True)
class TopClass:
    """The first latents of a class."""

    kind: str
    name: str
    order: str
    ranked: int
    """How many of the class may be ranked; where there is none, the nearest to it are shown."""
    tops: tuple[Top, ...]


@dataclass(frozen=True)
class Section:
    """All that the page says about a diff."""

    a: str
    b: str
    facts: Mapping[str, Any]
    nulls: tuple[tuple[str, str], ...]
    """Name and what it is."""
    counts: Table
    norms: Histogram
    cosines: Histogram | None
    scaling: Scatter | None
    causal: Causal | None
    planted: Planted | None
    course: Course | None
    """Through all models of the run; None where they are two."""
    recurrence: Table | None
    """Which exclusive latents other seeds find as well; None where there are no other seeds."""
    baselines: tuple[tuple[str, Cell, Cell, str], ...]
    """Name, AUROC, AUROC against the same text, what else it says."""
    tops: tuple[TopClass, ...]

    @property
    def latents(self) -> list[int]:
        """Those that the section speaks of by number."""
        found = [top.latent for each in self.tops for top in each.tops]
        born = (
            [latent for _, latents in self.course.born for latent in latents] if self.course else ()
        )
        return sorted({*found, *born, *(self.planted.top if self.planted else ())})


def section(found: Diffed) -> Section:
    """The shapes and words of a diff."""
    facts, columns = found.facts, found.columns
    a, b = facts["pair"]["a"], facts["pair"]["b"]
    ranked_L = (columns["tokens"] >= RARE) & ~columns["near_start"].astype(bool)
    tops = _tops(columns, ranked_L, a, b)
    exclusive = [top.latent for each in tops if each.kind == "only_b" for top in each.tops]
    scaled = facts["by_scaling"] is not None
    return Section(
        a=a,
        b=b,
        facts=facts,
        nulls=tuple((name, NULLS.get(name, "")) for name in facts["null"]),
        counts=counts_table(facts, a, b),
        norms=norm_histogram(found),
        cosines=cosine_histogram(found),
        scaling=scaling_scatter(found, ranked_L, exclusive) if scaled else None,
        causal=causal_curve(facts["causal"], b) if facts["causal"] else None,
        planted=planted_box(facts["planted"], a, b) if facts["planted"] else None,
        course=course(found),
        recurrence=recurrence_table(facts, a, b),
        baselines=baseline_rows(facts),
        tops=tops,
    )


def latent_facts(found: Diffed, latents: Sequence[int]) -> dict[str, Any]:
    """JSON-able: what the view of a single latent says of it."""
    columns, pair = found.columns, found.facts["pair"]
    at = np.asarray(latents, dtype=np.int64)

    def told(name: str) -> list[str]:
        return [number(float(value)) for value in columns[name][at]]

    return {
        "class": [class_name(kind, pair["a"], pair["b"]) for kind in columns["class_minder"][at]],
        "difference": told("norm_difference"),
        "cosine": told("decoder_cosine"),
    }


def _tops(
    columns: Mapping[str, Any], ranked_L: NDArray[np.bool_], a: str, b: str
) -> tuple[TopClass, ...]:
    """The latents furthest to either side, and those that both models write most alike."""
    delta_L = columns["norm_difference"]
    orders = {
        "only_b": (-delta_L, "highest Δ first"),
        "only_a": (delta_L, "lowest Δ first"),
        "shared": (np.abs(delta_L - 0.5), "Δ nearest to ½ first"),
    }
    found = []
    for kind, (order_L, told) in orders.items():
        own = np.flatnonzero(ranked_L & (columns["class_minder"] == kind))
        latents = own if len(own) else np.flatnonzero(ranked_L)
        best = latents[np.argsort(order_L[latents], kind="stable")][:TOP].tolist()
        tops = tuple(Top(latent, _figures(columns, latent)) for latent in best)
        found.append(TopClass(kind, class_name(kind, a, b), told, len(own), tops))
    return tuple(found)


def _figures(columns: Mapping[str, Any], latent: int) -> tuple[tuple[str, str, str], ...]:
    def value(name: str) -> float:
        return float(columns[name][latent])

    told = [
        ("Δ", number(value("norm_difference")), ""),
        ("r", number(value("relative_norm")), ""),
        ("cosine", number(value("decoder_cosine")), ""),
        ("density", percent(value("density")), ""),
        ("on template", percent(value("template_share")), ""),
    ]
    for name, title in (("nu_error", "ν error"), ("nu_reconstruction", "ν reconstruction")):
        if name in columns:
            told.append((title, *cell(value(name), value(f"{name}_low"), value(f"{name}_high"))))
    if "tied" in columns and columns["tied"][latent]:
        told.append(("planted", "tied to it", ""))
    return tuple(each for each in told if each[1] not in ("–", "– %"))

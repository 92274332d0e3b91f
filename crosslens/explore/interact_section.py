"""The section of a report about interactions: tables, charts, and the pairs that stand out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosslens.explore.interact_findings import (
    ChangeTable,
    HeadTable,
    change_table,
    clusters_words,
    effects_words,
    head_table,
)
from crosslens.explore.interact_plots import KINDS, Scatter, place_of, scatter
from crosslens.explore.interact_read import Interacted
from crosslens.explore.interact_tables import (
    GLOSSARY,
    TOP,
    UNMET,
    MetricRow,
    PairRow,
    SiteRow,
    metric_rows,
    pair_rows,
    site_rows,
)

PARTNERS = 6
"""Pairs that the view of one latent tells of."""


@dataclass(frozen=True)
class Section:
    """All that the page says about interactions; what was not measured is empty or None."""

    facts: Mapping[str, Any]
    sites: tuple[SiteRow, ...]
    legend: tuple[tuple[str, int], ...]
    """Kinds that there are, each with the number of its colour."""
    pairs: tuple[PairRow, ...]
    scatter: Scatter | None
    metrics: tuple[MetricRow, ...]
    effects_words: str
    heads: HeadTable | None
    unmet: tuple[Mapping[str, Any], ...]
    changes: ChangeTable | None
    clusters_words: str
    glossary: Mapping[str, str]

    @property
    def latents(self) -> list[int]:
        """Those that the section speaks of by number."""
        rows: list[tuple[int | None, int | None]] = [(row.i, row.j) for row in self.pairs]
        rows += [(each["i"], each["j"]) for each in self.unmet]
        rows += [(row.i, row.j) for row in (self.changes.rows if self.changes else ())]
        rows += [(row.query, row.key) for row in (self.heads.rows if self.heads else ())]
        return sorted({latent for row in rows for latent in row if latent is not None})


def section(found: Interacted) -> Section:
    """The shapes and words of a run's interactions."""
    facts = found.facts
    top = [] if facts["pairs"] is None else facts["pairs"]["top"][:TOP]
    shares = [item for each in facts["sites"].values() for item in each["by_kind"].items()]
    kinds = {place_of(kind) for kind, share in shares if share > 0}
    return Section(
        facts=facts,
        sites=site_rows(facts["sites"]),
        legend=tuple((KINDS[place], place) for place in sorted(kinds)),
        pairs=pair_rows(top),
        scatter=scatter(found.pairs, list(facts["sites"]), top) if found.pairs else None,
        metrics=metric_rows(facts["prediction"]),
        effects_words=effects_words(facts["effects"]),
        heads=head_table(facts["attention"]),
        unmet=tuple(facts["screen"][:UNMET]),
        changes=change_table(facts["changes"]),
        clusters_words=clusters_words(facts["clusters"]),
        glossary=GLOSSARY,
    )


def partners(found: Interacted, latents: Collection[int]) -> dict[str, list[list[Any]]]:
    """JSON-able: of each latent, with whom it interacts most: the other, site, kind, strength."""
    pairs = found.pairs
    if not pairs:
        return {}
    shown, told = set(latents), dict[str, list[list[Any]]]()
    for c in np.argsort(-pairs["product"], kind="stable").tolist():
        i, j, strength = int(pairs["i"][c]), int(pairs["j"][c]), float(pairs["strength"][c])
        for own, other in ((i, j), (j, i)):
            rows = told.setdefault(str(own), [])
            if own in shown and len(rows) < PARTNERS and np.isfinite(strength):
                rows.append([other, str(pairs["site"][c]), str(pairs["kind"][c]), strength])
    return {own: rows for own, rows in told.items() if rows}

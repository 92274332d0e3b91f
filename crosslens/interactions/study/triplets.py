"""Parts of a table of triplets: of some sites, of half of the documents."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from crosslens.interactions.pairs.contexts import InContext
from crosslens.interactions.pairs.measure import Pairs
from crosslens.interactions.pairs.table import Triplets, triplets


def triplets_at(table: Triplets, sites: tuple[str, ...]) -> Triplets:
    """The triplets of some sites, in their order."""
    numbers = np.array([table.sites.index(site) for site in sites])
    mine_C = np.flatnonzero(np.isin(table.site_C, numbers))
    columns = {
        each.name: getattr(table, each.name)[mine_C]
        for each in fields(table)
        if each.name.endswith("_C")
    }
    place = np.full(len(table.sites), -1)
    place[numbers] = np.arange(len(numbers))
    columns["site_C"] = place[columns["site_C"]]
    measures = {name: column[mine_C] for name, column in table.measures.items()}
    return replace(table, sites=sites, measures=measures, **columns)


def halves_of(pairs: Pairs) -> tuple[Triplets, Triplets]:
    """The same triplets measured on the even groups of documents and on the odd ones. They were
    chosen on all documents; a mean per meeting of `shared` and the like is that of all."""
    first, second = ({site: _half(each, half) for site, each in pairs.in_context.items()}
                     for half in (0, 1))  # fmt: skip
    return triplets(pairs.met, first), triplets(pairs.met, second)


def _half(found: InContext, half: int) -> InContext:
    return InContext(
        key_C=found.key_C,
        met_CG=found.met_CG[:, half::2],
        measured_CG=found.measured_CG[:, half::2],
        total_CGM=found.total_CGM[:, half::2],
    )

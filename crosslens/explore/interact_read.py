"""What `crosslens interact` left of a run, if it is whole, and of the run's coder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslens.diffing.tables import Columns
from crosslens.errors import CrosslensError
from crosslens.explore.saved import Unreadable, load_columns, load_facts, read_saved
from crosslens.explore.shapes import Each, Maybe, misfit

REQUIRED = ("site", "i", "j", "kind", "count", "strength", "product")
"""Columns of `pairs.parquet` that the section draws; more may be there."""
_FIGURE = Maybe(float)
_ENDS = Maybe([_FIGURE])
_SITE = {
    "layer": int,
    "interaction_share": float,
    "ci": _ENDS,
    "output_share": float,
    "norm_mediated_share": float,
    "error_share": float,
    "by_kind": Each(float),
}
_PAIR = {"i": int, "j": int, "site": str, "kind": str, "strength": float, "frequency": float,
         "sign": int, "ci": _ENDS}  # fmt: skip
_PAIRS = {
    "measured": int,
    "candidates": int,
    "by": str,
    "top": [_PAIR],
    "coverage": Each(float),
    "latent_share": Each(float),
    "dropped": float,
}
_UNMET = {"i": int, "j": int, "site": str, "bound": float, "met": int}
_HEAD = {
    "variance": _FIGURE,
    "interaction_share": _FIGURE,
    "interaction_ci": _ENDS,
    "error_share": _FIGURE,
    "dominance": {"bound": _FIGURE, "variation": _FIGURE},
    "by_kind": {"binding": float},
    "pairs": [{"query": int, "key": int}],
}
_CLUSTERS = {
    **dict.fromkeys(("latents", "clusters"), int),
    **dict.fromkeys(("modularity", "null_modularity", "seed_agreement"), float),
    "half_agreement": _FIGURE,
}
_EFFECTS = {
    "pairs": Each(int),
    "predictions": int,
    "sizes": Each(Each({"mean": _FIGURE})),
    "reliability": Each(_FIGURE),
}
_PARTS = ("total", "weights", "code")
_CHANGES = {
    **dict.fromkeys(("triplets", "near_changed"), int),
    "weights_share": float,
    "most": [
        {
            **dict.fromkeys(("i", "j"), int),
            "sites": [str],
            "strength": (_FIGURE, _FIGURE),
            **dict.fromkeys(_PARTS, _FIGURE),
            **{f"{name}_ci": _ENDS for name in _PARTS},
        }
    ],
}
SHAPE: dict[str, Any] = {
    "coder": str,
    "models": [str],
    "tokens": int,
    "sites": Each(_SITE),
    "pairs": Maybe(_PAIRS),
    "prediction": Each({"spearman": _FIGURE, "ci": _ENDS}),
    "attention": Each(_HEAD),
    "screen": [_UNMET],
    "clusters": Maybe(Each(_CLUSTERS)),
    "effects": Maybe(Each(_EFFECTS)),
    "changes": Maybe(_CHANGES),
    "left_out": Each(str),
}
"""What the section of a report asks of `interact.json`; more may be there."""


@dataclass(frozen=True)
class Interacted:
    """Interactions as they lie on disk."""

    facts: Mapping[str, Any]
    """`interact.json`."""
    pairs: Columns
    """`pairs.parquet`, one value per triplet and column; empty where no pairs were measured."""


def read_interact(run_folder: Path, coder: str) -> Interacted | Unreadable | None:
    """What there is in RUN/interact; None where `interact.json` is not there.

    Args:
        coder: the hash of the run's coder, which the interactions must be of.
    """
    return read_saved(
        run_folder, "interact/interact.json", "interact", lambda path: _read(path, coder)
    )


def _read(path: Path, coder: str) -> Interacted:
    facts = load_facts(path, coder, "interact", lambda found: misfit(found, SHAPE, "it"))
    if facts["pairs"] is None:
        return Interacted(facts, {})
    return Interacted(facts, _table(path.with_name("pairs.parquet"), facts))


def _table(path: Path, facts: Mapping[str, Any]) -> Columns:
    columns = load_columns(path, REQUIRED)
    rows, sites = len(columns["i"]), set(columns["site"].tolist())
    if rows != facts["pairs"]["candidates"] or not sites <= set(facts["sites"]):
        raise CrosslensError(f"{path} and the interact.json beside it are not of one measurement.")
    return columns

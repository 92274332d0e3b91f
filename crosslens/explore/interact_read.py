"""What `crosslens interact` left of a run, if it is whole, and of the run's coder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslens.diffing.tables import Columns, load_table
from crosslens.errors import CrosslensError
from crosslens.explore.diff_read import Unreadable
from crosslens.explore.shapes import Each, Maybe, misfit
from crosslens.storage import load_json

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
    folder = run_folder / "interact"
    if not (folder / "interact.json").exists():
        return None
    try:
        return _read(folder, coder)
    except CrosslensError as error:
        return Unreadable(f"{error} `crosslens interact {run_folder}` makes it anew.")


def _read(folder: Path, coder: str) -> Interacted:
    path = folder / "interact.json"
    facts = load_json(path)
    if wrong := misfit(facts, SHAPE, "it"):
        raise CrosslensError(f"{path} is not as `crosslens interact` writes it: {wrong}.")
    if facts["coder"] != coder:
        raise CrosslensError(f"{path} is of another coder than the one that this run has now.")
    if facts["pairs"] is None:
        return Interacted(facts, {})
    return Interacted(facts, _table(folder / "pairs.parquet", facts))


def _table(path: Path, facts: Mapping[str, Any]) -> Columns:
    try:
        columns = load_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise CrosslensError(f"{path} is missing or damaged.") from error
    if missing := [name for name in REQUIRED if name not in columns]:
        raise CrosslensError(f"{path} lacks the column {missing[0]}.")
    rows, sites = len(columns["i"]), set(columns["site"].tolist())
    if rows != facts["pairs"]["candidates"] or not sites <= set(facts["sites"]):
        raise CrosslensError(f"{path} and the interact.json beside it are not of one measurement.")
    return columns

"""What `crosslens diff` left of a run, if it is whole, of one diff, and of the run's coder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosslens.diffing.classes import NAMES, PUBLISHED
from crosslens.diffing.tables import Columns
from crosslens.errors import CrosslensError
from crosslens.explore.saved import Unreadable, load_columns, load_facts, read_saved
from crosslens.explore.shapes import Each, Maybe, misfit

REQUIRED = ("latent", "tokens", "density", "relative_norm", "norm_difference", "decoder_cosine",
            "template_share", "near_start", "class_minder")  # fmt: skip
SCALING = tuple(
    f"{nu}{end}" for nu in ("nu_error", "nu_reconstruction") for end in ("", "_low", "_high")
)
_FIGURE = Maybe(float)
_ENDS = Each((_FIGURE, _FIGURE))
_COUNTS: dict[str, Any] = {
    "classes": dict.fromkeys(NAMES, int),
    "conventions": {
        bins: {**dict.fromkeys(NAMES, int), "interval": dict.fromkeys(NAMES, (float, float))}
        for bins in PUBLISHED
    },
    "exclusive": {
        **dict.fromkeys(("only_a", "only_b"), int),
        "interval": dict.fromkeys(("only_a", "only_b"), (float, float)),
    },
    "by_scaling": Maybe(int),
    "near_start": int,
    "rare": int,
}
_CAUSAL = {
    **{f"kl_{name}": _FIGURE for name in ("baseline", "full", "top_half", "bottom_half")},
    "intervals": _ENDS,
    "curve": [{"share": float, "kl": _FIGURE, "intervals": _ENDS}],
    "predictions": int,
    "sites": [str],
}
_RECURRENCE = {
    "exclusive": int,
    "counts": [int],
    "random_labels": [float],
    "random_partners": [float],
}
SHAPE: dict[str, Any] = {
    **_COUNTS,
    "coder": str,
    "pair": {"a": str, "b": str, "sites": [str], "same_weights": bool},
    "tokens": int,
    "l0": float,
    "latents": int,
    "null": Each(_COUNTS),
    "fvu": Each(_FIGURE),
    "causal": Maybe(_CAUSAL),
    "planted": Maybe({"behaviour": str, "top": [int]}),
    "baselines": Each({}),
    "stability": Maybe({"runs": int, "recurrence": Each(_RECURRENCE)}),
}
"""What the section of a report asks of `diff.json`; more may be there."""
_DETECTION = {
    **dict.fromkeys(("auroc", "precision_at_20", "ranking_auroc"), _FIGURE),
    "intervals": _ENDS,
    "controls": {
        **dict.fromkeys(("same_text_base", "base_sees_trigger"), _FIGURE),
        **dict.fromkeys(("same_text_noop", "noop_sees_trigger"), _FIGURE),
        "intervals": _ENDS,
    },
    "tied": int,
    "prompts": [int],
}
_CARRIED = {"sites": [str], "b_with_a": _FIGURE, "a_with_b": _FIGURE, "intervals": _ENDS}
_REMOVED = {"rate": _FIGURE, "loss_change": _FIGURE, "intervals": _ENDS}
_ABLATION = {
    "before": {"rate": _FIGURE, "intervals": _ENDS},
    "top": _REMOVED,
    "random": [_REMOVED],
}
_CHECKPOINT = {
    "model": str,
    **dict.fromkeys(("present", "births", "deaths"), int),
    "interval": dict.fromkeys(("births", "deaths"), (float, float)),
    "turned": Maybe({"latents": int, "mean_cosine": float, "low_cosine": float}),
}
_TIMELINE = {
    "interrupted": int,
    "lives": [dict.fromkeys(("birth", "death", "latents"), int)],
    "checkpoints": [_CHECKPOINT],
}
_COURSE = ("birth", "death")
"""Columns of a table that a timeline goes with."""


@dataclass(frozen=True)
class Diffed:
    """A diff as it lies on disk."""

    facts: Mapping[str, Any]
    """`diff.json`."""
    columns: Columns
    """`latents.parquet`: one value per latent and column."""
    nulls: Mapping[str, Columns] = field(default_factory=dict)
    """The same tables of the nulls, of those that have one."""


def read_diff(run_folder: Path, coder: str) -> Diffed | Unreadable | None:
    """What there is of a diff in RUN/diff; None where `diff.json` is not there.

    Args:
        coder: the hash of the run's coder, which the diff must be of.
    """
    return read_saved(run_folder, "diff/diff.json", "diff", lambda path: _read(path, coder))


def _read(path: Path, coder: str) -> Diffed:
    folder = path.parent
    facts = load_facts(path, coder, "diff", _wrong)
    columns = _table(folder / "latents.parquet", facts)
    nulls = {
        name: _table(folder / "nulls" / name / "latents.parquet", found)
        for name, found in facts["null"].items()
        if (folder / "nulls" / name / "latents.parquet").is_file()
    }
    return Diffed(facts, columns, nulls)


def _wrong(facts: Any) -> str | None:
    if wrong := misfit(facts, SHAPE, "it"):
        return wrong
    planted = facts["planted"] or {}
    parts = {
        "auroc": (planted, _DETECTION),
        "ablation": (planted.get("ablation"), _ABLATION),
        "carried": (planted.get("carried"), _CARRIED),
    }
    found = [misfit(value, shape, "planted") for key, (value, shape) in parts.items()
             if key in planted]  # fmt: skip
    sides = (facts, *facts["null"].values())
    found += [misfit(each.get("timeline"), Maybe(_TIMELINE), "timeline") for each in sides]
    return next(filter(None, found), None)


def _table(path: Path, facts: Mapping[str, Any]) -> Columns:
    """A table of latents; refused unless it has the columns and the counts of its `facts`."""
    needed = REQUIRED if facts["by_scaling"] is None else REQUIRED + SCALING
    columns = load_columns(path, needed + _COURSE if facts.get("timeline") else needed)
    counts = Counter(columns["class_minder"].tolist())
    if any(counts[name] != facts["classes"][name] for name in NAMES):
        raise CrosslensError(f"{path} and the diff.json beside it are not of one diff.")
    return columns

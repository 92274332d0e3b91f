"""What `crosslens prove local` left of a run, if it is whole, and of the run's coder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslens.explore.saved import Unreadable, load_facts, read_saved
from crosslens.explore.shapes import Each, Maybe, misfit

_FIGURE = Maybe(float)
_TIER = {
    "name": str,
    **dict.fromkeys(("bound", "flops", "bits", "true", "flops_fixed", "flops_per_token"), float),
    **dict.fromkeys(("ratio", "true_ratio"), _FIGURE),
}
_FRONTIER = {
    "baseline": dict.fromkeys(("start", "truth", "brute"), float),
    "points": [
        {"name": str, "flops": float, "bound": float, "improvement": float, "on_front": bool}
    ],
    "score": float,
}
_SITE = {
    "site": str,
    "layer": int,
    "kind": str,
    "gated": bool,
    **dict.fromkeys(("tokens", "latents", "most_active"), int),
    **dict.fromkeys(("output", "row_norm", "flops_brute", "brute_per_token"), float),
    "tiers": [_TIER],
    "transition": _TIER,
    "coder": _TIER,
    "whole": {"surrogate": str, "bound": float, "true": float},
    "claim": str,
    "checked": bool,
    "estimate": {
        "is_bound": bool,
        "interaction": Each(float),
        "transition": float,
        "whole": Each(float),
        "bins": int,
        "draws": int,
    },
    "frontier": _FRONTIER,
    "frontier_per_token": _FRONTIER,
}
_TERMS = ("before", "propagation", "interaction", "transition", "after", "true", "norm")
_STEPS = {
    "steps": [{"name": str, **dict.fromkeys(_TERMS, float), "log10_after": _FIGURE}],
    "loss": float,
    "loss_uniform": float,
    "vacuous": bool,
}
SHAPE: dict[str, Any] = {
    "coder": str,
    "model": str,
    "tokens": int,
    "tier": str,
    "sites": [_SITE],
    "recursion": Maybe({}),
}
"""What the section of a report asks of `local.json`; more may be there."""


@dataclass(frozen=True)
class Proved:
    """Layer-local proofs as they lie on disk."""

    facts: Mapping[str, Any]
    """`local.json`."""


def read_prove(run_folder: Path, coder: str) -> Proved | Unreadable | None:
    """What there is in RUN/prove; None where `local.json` is not there.

    Args:
        coder: the hash of the run's coder, which the proofs must be of.
    """
    command = "prove local"
    return read_saved(
        run_folder,
        "prove/local.json",
        command,
        lambda path: Proved(load_facts(path, coder, command, _wrong)),
    )


def _wrong(facts: Any) -> str | None:
    if wrong := misfit(facts, SHAPE, "it"):
        return wrong
    if not facts["sites"]:
        return "it has no site"
    names = [[tier["name"] for tier in site["tiers"]] for site in facts["sites"]]
    if any(each != names[0] for each in names):
        return "its sites have other tiers than each other"
    found = facts["recursion"]
    if found is None or "left_out" in found:
        return None
    return misfit(found, _STEPS, "recursion") or (None if found["steps"] else "it has no steps")

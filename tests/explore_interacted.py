"""Interactions to show, made of random numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from crosslens.diffing.tables import save_table
from crosslens.explore.interact_read import Interacted
from crosslens.storage import load_json, save_json

SITES = ("resid_mid.5", "resid_mid.10", "resid_mid.25")
KINDS = ("gating", "conjunction", "saturation", "cancellation", "mixed")

CLUSTERS = {
    "latents": 40,
    "clusters": 7,
    "modularity": 0.512,
    "null_modularity": 0.234,
    "seed_agreement": 0.876,
    "half_agreement": 0.345,
}
EFFECTS = {
    "pairs": {"top": 20, "random": 20, "cooccurring": 19},
    "predictions": 4321,
    "sizes": {"interaction_abs": {"top": {"mean": 0.0321}, "random": {"mean": 0.00123}}},
    "reliability": {"interaction_abs": 0.789},
}
CHANGES = {
    "triplets": 2345,
    "near_changed": 12,
    "weights_share": 0.357,
    "most": [
        {
            "i": 3,
            "j": 7,
            "sites": ["base/resid_mid.5", "chat/resid_mid.5"],
            "strength": [1.25, None],
            "total": 0.456,
            "total_ci": [0.1, 0.9],
            "weights": -0.111,
            "weights_ci": None,
            "code": 0.567,
            "code_ci": None,
        }
    ],
}


def head(variance: float, share: float) -> dict[str, Any]:
    """One head's figures."""
    return {
        "variance": variance,
        "interaction_share": share,
        "interaction_ci": [share - 0.05, share + 0.05],
        "error_share": 0.25,
        "dominance": {"bound": 0.9, "variation": None},
        "by_kind": {"binding": 0.471, "mixed": 0.529},
        "pairs": [{"query": 4, "key": 9}],
    }


def toy(latents: int = 48, pairs: int = 40, seed: int = 0) -> Interacted:
    """As `crosslens interact` leaves it; the table and the top agree."""
    random = np.random.default_rng(seed)
    n = pairs * len(SITES)
    i = random.integers(0, latents - 1, n)
    columns: dict[str, Any] = {
        "site": np.repeat(np.array(SITES, dtype=object), pairs),
        "i": i,
        "j": np.array([random.integers(a + 1, latents) for a in i]),
        "kind": np.array(KINDS, dtype=object)[random.integers(0, len(KINDS), n)],
        "count": random.integers(1, 900, n),
        "strength": random.lognormal(0.0, 1.0, n),
    }
    columns["frequency"] = columns["count"] / 5000
    columns["product"] = columns["strength"] * columns["frequency"]
    columns["sign"] = random.integers(-1, 2, n)
    facts: dict[str, Any] = {
        "coder": "c0de",
        "models": ["base"],
        "tokens": 5000,
        "latents": latents,
        "sites": {site: _site(columns, site) for site in SITES},
        "pairs": {
            "measured": 12345,
            "candidates": n,
            "by": "product",
            "top": _top(columns),
            "coverage": {"10": 0.0123, "100": 0.0876, "1000": 0.314},
            "dropped": 0.0,
            "latent_share": {"latents": 0.55, "always": 0.15, "error": 0.3},
        },
        "prediction": {
            "strength": {"spearman": 0.61, "ci": [0.5, 0.7]},
            "decoder_cosine": {"spearman": -0.72, "ci": None},
            "random": {"spearman": None, "ci": None},
        },
        "attention": {"L6.H0": head(0.5, 0.1), "L6.H1": head(0.2, 0.6)},
        "clusters": {SITES[0]: CLUSTERS},
        "effects": {"base": EFFECTS},
        "screen": [{"i": 1, "j": 2, "site": SITES[0], "bound": 0.5, "met": 0}],
        "changes": None,
        "left_out": {},
    }
    return Interacted(facts, columns)


def _site(columns: dict[str, Any], site: str) -> dict[str, Any]:
    mine = columns["site"] == site
    product, kind = columns["product"][mine], columns["kind"][mine]
    shares = {name: float(product[kind == name].sum() / product.sum()) for name in KINDS}
    return {
        "layer": int(site.split(".")[1]),
        "mlp": "gated silu",
        "interaction_share": 0.0312,
        "ci": [0.029, 0.033],
        "output_share": 0.67,
        "norm_mediated_share": 0.24,
        "error_share": 0.41,
        "by_kind": {**shares, "split duplicate": 0.0},
    }


def _top(columns: dict[str, Any]) -> list[dict[str, Any]]:
    order = np.argsort(-columns["product"], kind="stable")[:25].tolist()
    told = []
    for c in order:
        row = {name: columns[name][c] for name in ("site", "kind")}
        row |= {name: int(columns[name][c]) for name in ("i", "j", "sign", "count")}
        row |= {name: float(columns[name][c]) for name in ("strength", "frequency")}
        row["ci"] = [row["strength"] * 0.8, row["strength"] * 1.2]
        told.append(row)
    told[1]["ci"] = None
    return told


def leave(found: Interacted, run: Path, **facts: Any) -> None:
    """Write interactions into a run as `crosslens interact` does, perhaps with other facts."""
    folder = run / "interact"
    shutil.rmtree(folder, ignore_errors=True)
    save_table(folder, "pairs", found.pairs)
    save_json(folder / "interact.json", {**found.facts, **facts})


def change(run: Path, **facts: Any) -> None:
    """Put other facts into the interact.json of a run."""
    path = run / "interact" / "interact.json"
    save_json(path, {**load_json(path), **facts})

"""A study of interactions as plain data and as tables, and on disk."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosslens.diffing.intervals import clustered_ratio
from crosslens.diffing.tables import Columns, save_table
from crosslens.interactions.effects.prediction import prediction
from crosslens.interactions.neurons.exact import SiteInteraction
from crosslens.interactions.pairs.kinds import by_kind
from crosslens.interactions.pairs.table import Triplets
from crosslens.interactions.study.measure import Interactions
from crosslens.storage import replace_folder, save_json

COVERAGE = (10, 100, 1000)
"""How many of the strongest pairs their share of the whole is told of."""
UNMET = 50
"""Pairs of the screen that `interact.json` tells of."""


def plain(found: Interactions) -> dict[str, Any]:
    """What `interact.json` holds but for the coder's hash; numbers that are not finite are None."""
    told = {
        "models": list(found.models),
        "tokens": found.tokens,
        "latents": found.latents,
        "sites": _sites(found),
        "pairs": _pairs(found),
        "prediction": _prediction(found),
        "attention": _attention(found),
        "clusters": None if found.clusters is None else found.clusters.plain(),
        "effects": {name: each.plain() for name, each in found.effects.items()} or None,
        "screen": _screen(found),
        "changes": None if found.changes is None else found.changes.plain(),
        "left_out": dict(found.left_out),
    }
    return dict(_finite(told))


def tables(found: Interactions) -> dict[str, Columns]:
    """The tables of what was measured, by name: a value per row and column."""
    named: dict[str, Columns] = {}
    if found.sites:
        named |= {"neurons": _neurons(found), "documents": _documents(found)}
    if found.triplets is not None:
        named["pairs"] = _pair_columns(found, found.triplets)
    if found.clusters is not None:
        named["clusters"] = found.clusters.columns()
    named |= {
        name: _by_model(of)
        for name, of in (("effects", found.effects), ("attention", found.attention))
        if of
    }
    if found.screen:
        named["screen"] = _screened(found)
    if found.changes is not None:
        named["changes"] = found.changes.columns()
    return named


def save(found: Interactions, folder: Path, coder: str) -> dict[str, Any]:
    """Write `interact.json` and a Parquet and a CSV file of each table; returns the former.

    The folder is written beside and moved into place as a whole, replacing the one there.

    Args:
        coder: the coder's hash.
    """
    told = {"coder": coder, **plain(found)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        temporary.chmod(0o755)
        for name, columns in tables(found).items():
            save_table(temporary, name, columns)
        save_json(temporary / "interact.json", told)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return told


def _sites(found: Interactions) -> dict[str, Any]:
    kinds = {}
    if found.triplets is not None and found.kind_C is not None:
        kinds = by_kind(found.triplets, found.kind_C)
    return {
        site: {
            "layer": each.layer,
            "mlp": f"gated {each.kind}" if each.gated else each.kind,
            "interaction_share": each.interaction_share,
            "ci": _interval(each),
            "output_share": each.output_share,
            "by_kind": kinds.get(site, {}),
            "norm_mediated_share": each.norm_mediated_share,
            "error_share": each.error_share,
            "slack_share": each.slack_share,
        }
        for site, each in found.sites.items()
    }


def _interval(each: SiteInteraction) -> list[float]:
    """95 %, of the interaction share, over documents."""
    there_G = each.mass_by_document > 0
    mass_GL = each.mass_by_document[there_G, None]
    estimate = clustered_ratio(each.interaction_by_document[there_G, None], mass_GL, mass_GL)
    return [float(estimate.low_L), float(estimate.high_L)]


def _neurons(found: Interactions) -> Columns:
    names = ("interaction_N", "mass_N", "output_N", "of_error_N", "mediated_N", "direct_N",
             "share_N")  # fmt: skip
    sites = found.sites.values()
    counts = [len(each.mass_N) for each in sites]
    columns: Columns = {
        "site": np.repeat([each.site for each in sites], counts),
        "layer": np.repeat([each.layer for each in sites], counts),
        "neuron": np.concatenate([np.arange(n) for n in counts]),
    }
    for name in names:
        column = torch.cat([getattr(each, name) for each in sites])
        columns[name.removesuffix("_N")] = column.cpu().numpy()
    return columns


def _documents(found: Interactions) -> Columns:
    n, sites = len(found.documents), found.sites.values()
    return {
        "site": np.repeat([each.site for each in sites], n),
        "document": np.tile(np.array(found.documents, dtype=object), len(sites)),
        "interaction": torch.cat([each.interaction_by_document for each in sites]).numpy(),
        "mass": torch.cat([each.mass_by_document for each in sites]).numpy(),
    }


def _pairs(found: Interactions) -> dict[str, Any] | None:
    pairs, table = found.pairs, found.triplets
    if pairs is None or table is None:
        return None
    return {
        "measured": pairs.measured,
        "candidates": len(table),
        "by": found.plan.by,
        "top": _top(found, table),
        "coverage": {str(k): share for k, share in pairs.coverage(COVERAGE).items()},
        "latent_share": pairs.latent_share(),
        "dropped": pairs.dropped,
    }


def _top(found: Interactions, table: Triplets) -> list[dict[str, Any]]:
    kind_C = [] if found.kind_C is None else found.kind_C.tolist()
    return [
        {
            "i": int(table.i_C[c]),
            "j": int(table.j_C[c]),
            "site": table.sites[table.site_C[c]],
            "kind": kind_C[c],
            "strength": float(table.strength_C[c]),
            "frequency": float(table.frequency_C[c]),
            "sign": int(table.sign_C[c]),
            "count": int(table.count_C[c]),
            "ci": _ends(float(table.low_C[c]), float(table.high_C[c])),
        }
        for c in table.ranked(found.plan.by, found.plan.top).tolist()
    ]


def _ends(low: float, high: float) -> list[float] | None:
    return [low, high] if math.isfinite(low) and math.isfinite(high) else None


def _prediction(found: Interactions) -> dict[str, Any]:
    """Metrics by name; with the model's, where there are several."""
    told: dict[str, Any] = {}
    for name, each in found.effects.items():
        assert found.triplets is not None
        of_model = prediction(each, found.triplets)
        told |= {_named(found, name, metric): value for metric, value in of_model.items()}
    return told


def _attention(found: Interactions) -> dict[str, Any]:
    """Heads by name; with the model's, where there are several."""
    return {
        _named(found, name, head): value
        for name, each in found.attention.items()
        for head, value in each.plain().items()
    }


def _named(found: Interactions, model: str, name: str) -> str:
    return f"{model}/{name}" if len(found.models) > 1 else name


def _screen(found: Interactions) -> list[dict[str, Any]]:
    """The highest bounds of all sites."""
    columns = _screened(found)
    order = np.argsort(-columns["bound"], kind="stable")[:UNMET].tolist()
    return [{name: column[c].item() for name, column in columns.items()} for c in order]


def _screened(found: Interactions) -> Columns:
    """One row for each pair and site of the screens."""
    every = found.screen.values()
    empty = torch.zeros(0, dtype=torch.int64)
    named = {"i": "i_C", "j": "j_C", "bound": "bound_C", "met": "met_C"}
    columns: Columns = {
        name: torch.cat([empty, *(getattr(each, key).cpu() for each in every)]).numpy()
        for name, key in named.items()
    }
    counts = [len(each.bound_C) for each in every]
    return {"site": np.repeat(np.array(list(found.screen), dtype=np.str_), counts), **columns}


def _pair_columns(found: Interactions, table: Triplets) -> Columns:
    columns = {**table.columns(), "kind": found.kind_C}
    return columns if found.clusters is None else columns | {"cluster": found.clusters.of(table)}


def _by_model(of: Mapping[str, Any]) -> Columns:
    """The columns of each model's table, one under another, with the model's name."""
    parts = {name: each.columns() for name, each in of.items()}
    lengths = [len(next(iter(columns.values()))) for columns in parts.values()]
    first = next(iter(parts.values()))
    joined = {name: np.concatenate([each[name] for each in parts.values()]) for name in first}
    return {"model": np.repeat(np.array(list(parts), dtype=np.str_), lengths), **joined}


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinities."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

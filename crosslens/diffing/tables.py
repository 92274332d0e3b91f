"""A diff's table of latents, as columns and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from crosslens.diffing.classes import NAMES, PUBLISHED
from crosslens.diffing.intervals import Estimate
from crosslens.diffing.measures import Measures
from crosslens.diffing.planted import Planted
from crosslens.diffing.timeline import Timeline
from crosslens.storage import void, write_atomic

Columns = dict[str, Any]


def latent_columns(
    found: Measures, planted: Planted | None, course: Timeline | None = None
) -> Columns:
    """One value per latent and column; NaN where a latent has none.

    With a course through several models, `birth` and `death` are the first model of a latent's life
    and the first after it, by number; -1 where it has none.
    """
    norms, active = found.norms, found.activity
    columns: Columns = {
        "latent": np.arange(len(active.count_L)),
        "tokens": _plain(active.count_L),
        "density": _plain(active.density_L),
        "norm_a": _plain(norms.a_L),
        "norm_b": _plain(norms.b_L),
        "relative_norm": _plain(norms.relative_norm_L),
        "norm_difference": _plain(norms.norm_difference_L),
        "decoder_cosine": _plain(norms.cosine_L),
        "strength_a": _plain(active.strength_a_L),
        "strength_b": _plain(active.strength_b_L),
        "template_share": _plain(active.marked_share_L),
        "near_start": _plain(found.still_L),
    }
    for name in PUBLISHED:
        columns[f"class_{name}"] = [NAMES[i] for i in found.classes(name).label_L.tolist()]
    if found.agreement is not None:
        columns["encoder_cosine"] = _plain(found.agreement.cosine_L)
        columns["encoder_correlation"] = _plain(found.agreement.correlation_L)
    if found.scaling is not None:
        for name in ("nu_error", "nu_reconstruction", "beta_error_a", "beta_error_b"):
            columns |= _estimate(name, getattr(found.scaling, name))
    if planted is not None:
        columns["tied"] = _plain(planted.tied_L)
        columns |= {f"auroc_{name}": _plain(v) for name, v in planted.against_L.items()}
    if course is not None:
        columns |= {"birth": _plain(course.birth_L), "death": _plain(course.death_L)}
    return columns


def _estimate(name: str, found: Estimate) -> Columns:
    return {
        name: _plain(found.value_L),
        f"{name}_low": _plain(found.low_L),
        f"{name}_high": _plain(found.high_L),
        f"{name}_half_1": _plain(found.halves_HL[0]),
        f"{name}_half_2": _plain(found.halves_HL[1]),
    }


def _plain(value_L: Tensor) -> Any:
    return value_L.detach().cpu().numpy()


def save_table(folder: Path, name: str, columns: Mapping[str, Any]) -> None:
    """Write `name`.parquet and `name`.csv, each atomically."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(dict(columns))
    write_atomic(folder / f"{name}.parquet", lambda path: void(parquet.write_table(table, path)))
    write_atomic(folder / f"{name}.csv", lambda path: void(csv.write_csv(table, path)))


def load_table(path: Path) -> Columns:
    """The columns of a Parquet file that `save_table` wrote."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}

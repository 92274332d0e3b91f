"""Triplets (latent, latent, place) and what was measured of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crosslens.functional import pairs as F
from crosslens.functional.blocks import split_rows
from crosslens.interactions.intervals import mean_interval
from crosslens.interactions.neurons.contributions import Effective
from crosslens.interactions.pairs.bounds import bounds_of
from crosslens.interactions.pairs.contexts import IN_CONTEXT, InContext
from crosslens.interactions.pairs.totals import Met
from crosslens.storage import void, write_atomic

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Order = Literal["strength", "frequency", "product"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Triplets:
    """Pairs of latents i < j at sites, by site, then i, then j.

    Means are over the tokens on which both are active, or over those drawn from them. Intervals are
    95 %, over groups of documents, NaN where all those tokens are of one group.
    """

    sites: tuple[str, ...]
    tokens: int
    site_C: Ints
    """Index into `sites`."""
    i_C: Ints
    j_C: Ints
    count_C: Ints
    """Tokens on which both are active."""
    measured_C: Ints
    """Those of them on which mixed differences were measured."""
    strength_C: Floats
    """Mean Σ_n ‖w_out,n‖|Δ_ij,n| in the context of everything else on the token."""
    low_C: Floats
    high_C: Floats
    signed_C: Floats
    """Mean Σ_n ‖w_out,n‖ Δ_ij,n: above 0 they do more together than alone."""
    signed_low_C: Floats
    signed_high_C: Floats
    measures: Mapping[str, Floats]
    """Means of everything else, by name; NaN where a site does not have it."""

    def __len__(self) -> int:
        return len(self.i_C)

    @property
    def frequency_C(self) -> Floats:
        """Share of tokens on which both are active."""
        return self.count_C / self.tokens

    @property
    def product_C(self) -> Floats:
        """Strength × frequency: the mean over all tokens."""
        return self.strength_C * self.frequency_C

    @property
    def sign_C(self) -> Ints:
        """1 or −1 where the interval of `signed_C` leaves out 0, else 0."""
        above, below = self.signed_low_C > 0, self.signed_high_C < 0
        return above.astype(np.int64) - below.astype(np.int64)

    def ranked(self, by: Order = "product", n: int | None = None) -> Ints:
        """The numbers of the n highest triplets, the highest first; of equal ones the first by
        site, i and j."""
        values: dict[Order, Floats] = {
            "strength": self.strength_C,
            "frequency": self.frequency_C,
            "product": self.product_C,
        }
        return np.argsort(-values[by], kind="stable")[:n]

    def columns(self) -> dict[str, Any]:
        """Everything, by name, as columns of one length."""
        return {
            "site": np.array(self.sites)[self.site_C],
            "i": self.i_C,
            "j": self.j_C,
            "count": self.count_C,
            "measured": self.measured_C,
            "frequency": self.frequency_C,
            "strength": self.strength_C,
            "strength_low": self.low_C,
            "strength_high": self.high_C,
            "product": self.product_C,
            "sign": self.sign_C,
            "signed": self.signed_C,
            "signed_low": self.signed_low_C,
            "signed_high": self.signed_high_C,
            **self.measures,
        }

    def save(self, path: Path) -> None:
        """Write a Parquet file, atomically, with the number of tokens in its metadata."""
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table(self.columns()).replace_schema_metadata({"tokens": str(self.tokens)})
        write_atomic(path, lambda p: void(pyarrow.parquet.write_table(table, p)))


def triplets(met: Mapping[str, Met], found: Mapping[str, InContext]) -> Triplets:
    """One table of the pairs measured in context at all sites."""
    parts = [_columns(met[site], found[site]) for site in found]
    names = list(dict.fromkeys(name for part in parts for name in part))
    column = {name: _stacked(parts, name) for name in names}
    sizes = [len(each.key_C) for each in found.values()]
    whole = {name: column.pop(name).astype(np.int64) for name in ("i", "j", "count", "measured")}
    return Triplets(
        sites=tuple(found),
        tokens=max(each.tokens for each in met.values()),
        site_C=np.repeat(np.arange(len(sizes)), sizes),
        i_C=whole["i"],
        j_C=whole["j"],
        count_C=whole["count"],
        measured_C=whole["measured"],
        strength_C=column.pop("rest_size"),
        low_C=column.pop("rest_size_low"),
        high_C=column.pop("rest_size_high"),
        signed_C=column.pop("rest_signed"),
        signed_low_C=column.pop("rest_signed_low"),
        signed_high_C=column.pop("rest_signed_high"),
        measures=column,
    )


def _columns(met: Met, found: InContext) -> dict[str, Tensor]:
    """What is known of a site's pairs, by name; means per token on which both are active."""
    n_latents = len(met.effective.E_LN)
    measured_CG = found.measured_CG
    count_C, measured_C = found.met_CG.sum(1), measured_CG.sum(1)
    i_C, j_C = found.key_C // n_latents, found.key_C % n_latents
    columns = {"i": i_C, "j": j_C, "count": count_C, "measured": measured_C}
    means_CM = found.total_CGM.sum(1) / measured_C[:, None]
    columns |= {name: means_CM[:, m] for m, name in enumerate(IN_CONTEXT)}
    for name in ("rest_size", "rest_signed"):
        total_CG = found.total_CGM[:, :, IN_CONTEXT.index(name)]
        _, columns[f"{name}_low"], columns[f"{name}_high"] = mean_interval(total_CG, measured_CG)
    noise_C = columns.pop("shapley_noise")
    columns["shapley_error"] = noise_C.div(measured_C).sqrt()
    columns["hadamard"] = _hadamard(met.effective, i_C, j_C)
    place_C, _ = met.sums.found(found.key_C)
    met_C = met.sums.count_U[place_C]
    columns |= {name: met.column(name)[place_C] / met_C for name in met.columns}
    if "coupling" not in columns:
        columns["coupling"] = columns["gram"] * bounds_of(met.effective, i_C, j_C)
    return columns


def _hadamard(effective: Effective, i_C: Tensor, j_C: Tensor) -> Tensor:
    E_LN, w_N = (effective.gate or effective.value).E_LN, effective.out_norm_N
    parts = zip(split_rows(i_C, 1024), split_rows(j_C, 1024), strict=True)
    return torch.cat([F.hadamard(E_LN[i], E_LN[j], w_N) for i, j in parts])


def _stacked(parts: Sequence[dict[str, Tensor]], name: str) -> Floats:
    blank = [torch.full((len(part["i"]),), torch.nan, dtype=torch.float64) for part in parts]
    found = [part.get(name, each) for part, each in zip(parts, blank, strict=True)]
    return np.concatenate([each.double().cpu().numpy() for each in found])

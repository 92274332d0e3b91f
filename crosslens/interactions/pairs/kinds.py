"""What kind of interaction a pair's is: conditions on what was measured, tried in a fixed order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from crosslens.errors import UsageError
from crosslens.interactions.neurons.effective import Effective
from crosslens.interactions.pairs.signatures import SIGNATURE, SORTS
from crosslens.interactions.pairs.table import Floats, Triplets

Labels: TypeAlias = NDArray[Any]
"""One str or int for each triplet."""
KINDS = (
    "split duplicate",
    "norm-mediated",
    "gating",
    "cancellation",
    "conjunction",
    "saturation",
    "mixed",
)
"""Of pairs at an MLP, in the order in which they are tried; what meets no condition is `mixed`."""
HEAD_KINDS = ("binding", "mixed")
"""Of pairs at a head: see `binding`."""

LEAST_SPREAD = 0.01
"""Below this a deviation is taken to be this: of few triplets it may come out as 0 by chance."""


@dataclass(frozen=True, kw_only=True)
class KindPlan:
    """From where on a pair is of a kind."""

    duplicate: float = 0.9
    """Cosine of the decoders, and of the columns of weights to the neurons."""
    mediated: float = 0.5
    """Share of what goes through the norm's scalar, of that and the mixed difference together."""
    one_way: float = 2 / 3
    """Share of one direction, of all three parts of a gated mixed difference."""
    beyond: float = 3.0
    """By how many standard deviations the share of one sort of neuron is above chance."""
    reliable: float = 0.5
    """Share of the mean, of the mean size of what a pair brings to a head's score (`binding`)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "beyond" and not 0.5 <= value <= 1:
                raise UsageError(
                    f"{field.name} of kinds is a share that must be at least 0.5 and at most 1; "
                    f"found {value}."
                )
        if not self.beyond > 0:
            raise UsageError(f"beyond of kinds must be above 0; found {self.beyond}.")


def kinds(
    triplets: Triplets, effectives: Mapping[str, Effective], plan: KindPlan = KindPlan()
) -> Labels:
    """The kind of each triplet: the first of `KINDS` whose condition it meets.

    split duplicate: decoders and weights to the neurons (value and gate) point the same way.
    norm-mediated: more goes through the norm's scalar than through neurons. gating: one's value
    through the other's gate is most of Δ. cancellation, conjunction, saturation: more of |Δ| than
    by chance is at neurons that the two move opposite ways, the same way and further together than
    apart, the same way and less far; of several that which is furthest beyond chance. Definitions:
    docs/interactions_kinds.md.

    Args:
        triplets: with the measures that `signatures` adds.

    Raises:
        UsageError: these measures, or a site's weights, are missing.
    """
    missing = [name for name in SIGNATURE if name not in triplets.measures]
    if missing:
        raise UsageError(
            f"Kinds are told by {', '.join(missing)}, which this table does not have; measure them "
            "with `signatures(chunks, triplets)`."
        )
    of = triplets.measures
    size_C, norm_C = sum_of_sorts(triplets), of["norm_mediated"]
    one_way_C = np.fmax(of["first_gated"], of["second_gated"])
    parts_C = of["first_gated"] + of["second_gated"] + of["context_gated"]
    beyond_SC = beyond_chance(triplets)
    furthest_SC = (beyond_SC > plan.beyond) & (beyond_SC == beyond_SC.max(0))
    conjoint_C, saturating_C, opposed_C = furthest_SC
    met = {
        "split duplicate": alike(triplets, effectives) >= plan.duplicate,
        "norm-mediated": norm_C > plan.mediated * (norm_C + size_C),
        "gating": one_way_C > plan.one_way * parts_C,
        "cancellation": opposed_C,
        "conjunction": conjoint_C,
        "saturation": saturating_C,
    }
    return np.select(list(met.values()), list(met), default="mixed")


def sum_of_sorts(triplets: Triplets, suffix: str = "") -> Floats:
    """Mean Σ ‖w_out‖|Δ| over the tokens that `signatures` looked at."""
    first_C, second_C, third_C = (triplets.measures[f"{sort}{suffix}"] for sort in SORTS)
    return first_C + second_C + third_C


def beyond_chance(triplets: Triplets) -> NDArray[np.float64]:
    """How far the share of each of `SORTS` in |Δ| is above chance, in standard deviations [3, C].

    Chance is the mean and deviation of that share over all triplets of the site, with the second
    latent's contributions dealt to other neurons. (At random about half of |Δ| is at opposed
    neurons: a majority says nothing.) NaN where nothing was measured.
    """
    share_SC, chance_SC = (
        np.stack([_ratio(triplets.measures[f"{sort}{suffix}"], size_C) for sort in SORTS])
        for suffix in ("", "_by_chance")
        for size_C in [sum_of_sorts(triplets, suffix)]
    )
    found_SC = np.full_like(share_SC, np.nan)
    for number in range(len(triplets.sites)):
        mine_C = triplets.site_C == number
        known_SC = chance_SC[:, mine_C & ~np.isnan(chance_SC[0])]
        if known_SC.shape[1]:
            mean_S1 = known_SC.mean(1, keepdims=True)
            spread_S1 = known_SC.std(1, keepdims=True).clip(min=LEAST_SPREAD)
            found_SC[:, mine_C] = (share_SC[:, mine_C] - mean_S1) / spread_S1
    return found_SC


def _ratio(part_C: Floats, whole_C: Floats) -> Floats:
    found_C = np.full(len(part_C), np.nan)
    there_C = whole_C > 0
    found_C[there_C] = part_C[there_C] / whole_C[there_C]
    return found_C


@torch.no_grad()
def alike(triplets: Triplets, effectives: Mapping[str, Effective]) -> Floats:
    """How alike the two latents of each triplet are, from weights alone: the smaller of the cosine
    of their decoders and that of their weights to the neurons (times ‖w_out‖; where gated, value
    and gate side by side); NaN where one of these is 0.

    Raises:
        UsageError: a site's weights are missing.
    """
    found_C = np.full(len(triplets), np.nan)
    for number, site in enumerate(triplets.sites):
        if site not in effectives:
            raise UsageError(
                f"The triplets are of {site}, whose weights were not given; given were those of "
                f"{', '.join(effectives)}."
            )
        mine_C = triplets.site_C == number
        i_C, j_C = (torch.from_numpy(x_C[mine_C]) for x_C in (triplets.i_C, triplets.j_C))
        cosines = [_cosine(rows_LX, i_C, j_C) for rows_LX in _rows(effectives[site])]
        found_C[mine_C] = torch.stack(cosines).amin(0).numpy()  # NaN is least
    return found_C


def _rows(one: Effective) -> list[torch.Tensor]:
    """All by which a latent acts on a site's neurons."""
    branches = [branch.E_LN for branch in (one.value, one.gate) if branch is not None]
    return [one.decoder_LD, torch.cat([E_LN * one.out_norm_N for E_LN in branches], -1)]


def _cosine(rows_LX: torch.Tensor, i_C: torch.Tensor, j_C: torch.Tensor) -> torch.Tensor:
    first_CX, second_CX = (rows_LX[at.to(rows_LX.device)].double() for at in (i_C, j_C))
    lengths = torch.linalg.vector_norm(first_CX, dim=-1) * second_CX.norm(dim=-1)
    cosine_C: torch.Tensor = (first_CX * second_CX).sum(-1) / lengths
    return cosine_C.cpu()


def binding(columns: Mapping[str, Any], plan: KindPlan = KindPlan()) -> Labels:
    """`binding` or `mixed` of each pair of a query's latent and a key's latent at a head.

    What such a pair brings to the score is a product of both strengths: nothing without either, so
    that all of it is mixed difference. It is binding where it draws attention from the one to the
    other reliably: centred over keys, its mean is above 0 by its interval over documents, and more
    than `plan.reliable` of its mean size.

    Args:
        columns: `signed`, `signed_low` and `strength`, as of `Attention.columns`.
    """
    signed_C, low_C, size_C = (np.asarray(columns[n]) for n in ("signed", "signed_low", "strength"))
    return np.where((low_C > 0) & (signed_C > plan.reliable * size_C), "binding", "mixed")


def by_kind(triplets: Triplets, kinds: Labels) -> dict[str, dict[str, float]]:
    """Site → kind → its share of what the site's triplets do (strength × frequency), every kind
    told; all 0 where they do nothing."""
    found = {}
    for number, site in enumerate(triplets.sites):
        mine_C = triplets.site_C == number
        found[site] = shares_of(triplets.product_C[mine_C], kinds[mine_C], KINDS)
    return found


def shares_of(product_C: Floats, kind_C: Labels, names: Sequence[str]) -> dict[str, float]:
    """What pairs of each kind do (strength × frequency) of what all of them do, every name told;
    all 0 where they do nothing."""
    product_C = np.nan_to_num(product_C)
    whole = float(product_C.sum())
    parts = {name: float(product_C[kind_C == name].sum()) for name in names}
    return {name: part / whole if whole else 0.0 for name, part in parts.items()}

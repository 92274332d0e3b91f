"""Triplets under the code and the weights of either model: the four corners of a change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from crosslens.errors import UsageError
from crosslens.interactions.intervals import jackknife_reach
from crosslens.interactions.neurons.contributions import Effective, SiteChunk
from crosslens.interactions.pairs.contexts import (
    IN_CONTEXT,
    ContextPlan,
    InContext,
    Wanted,
    measure_in_context,
)
from crosslens.interactions.pairs.measure import Chunks

CORNERS = ("aa", "ab", "ba", "bb")
"""Whose code, then whose weights."""
CHANGES: Mapping[str, tuple[float, ...]] = {
    "total": (-1.0, 0.0, 0.0, 1.0),
    "weights": (-0.5, 0.5, -0.5, 0.5),
    "code": (-0.5, -0.5, 0.5, 0.5),
}
"""What each change is of the corners. The last two are the Shapley values of two players, the mean
over both orders of changing them, and sum to the first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A site of each model, at the same place, and the pairs to be measured there."""

    sites: tuple[str, str]
    weights: tuple[Effective, Effective]
    key_C: Int64[Tensor, " c"]
    """i·L + j, ascending."""
    count_XC: Int64[Tensor, "2 c"]
    """Tokens on which both are active in either model's code, about: for how many to draw."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Corners:
    """Sums of Σ_n ‖w_out,n‖|Δ_n| over tokens at one place, by corner and group of documents."""

    total_KCG: Float[Tensor, "4 c g"]
    measured_KCG: Int64[Tensor, "4 c g"]
    met_KC: Int64[Tensor, "4 c"]
    """Tokens on which both are active."""

    @property
    def strength_KC(self) -> Float[Tensor, "4 c"]:
        """Mean per meeting; NaN where the two never meet."""
        return self.total_KCG.sum(-1) / self.measured_KCG.sum(-1)

    def change(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """One of `CHANGES` of the strength: its value, and the low and high end of a 95 % interval
        over documents."""
        weight_K = torch.tensor(CHANGES[name], dtype=torch.float64, device=self.total_KCG.device)
        return ratios_interval(self.total_KCG, self.measured_KCG, weight_K)


def ratios_interval(
    total_KCG: Float[Tensor, "k c g"], count_KCG: Int64[Tensor, "k c g"], weight_K: Tensor
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Σ_k weight_k · (Σ total_k / Σ count_k), and its 95 % interval, leaving out one group of
    documents at a time (`pair_intervals.mean_interval`, of several means at once).

    Returns:
        Value, low, high; low and high are NaN where a mean rests on one group only.
    """
    count_KCG = count_KCG.to(total_KCG.dtype)
    total_KC1, count_KC1 = total_KCG.sum(-1, keepdim=True), count_KCG.sum(-1, keepdim=True)
    value_C = weight_K @ (total_KC1 / count_KC1)[..., 0]
    without_KCG = (total_KC1 - total_KCG) / (count_KC1 - count_KCG)
    there_CG = (count_KCG > 0).any(0)
    theta_CG = torch.einsum("k,kcg->cg", weight_K, without_KCG)
    reach_C = jackknife_reach(value_C, theta_CG, there_CG)
    return value_C, value_C - reach_C, value_C + reach_C


def corners_of(
    places: Sequence[Place], chunks: tuple[Chunks, Chunks], plan: ContextPlan
) -> list[Corners]:
    """All corners of each place. Where both models' chunks come from one walk, all are measured in
    it, on the same tokens; else the two of each code in a walk of its own.

    Raises:
        UsageError: the models differ in width or the coders in latents, or chunks lack a site.
    """
    for place in places:
        _check(place)
    if chunks[0] is chunks[1]:
        found = _measured(places, chunks[0](), "ab", plan)
    else:
        found = _measured(places, chunks[0](), "a", plan)
        found |= _measured(places, chunks[1](), "b", plan)
    size = IN_CONTEXT.index("rest_size")
    corners = []
    for number in range(len(places)):
        parts = [found[f"{number} {corner}"] for corner in CORNERS]
        corners.append(
            Corners(
                total_KCG=torch.stack([part.total_CGM[..., size] for part in parts]),
                measured_KCG=torch.stack([part.measured_CG for part in parts]),
                met_KC=torch.stack([part.met_CG.sum(-1) for part in parts]),
            )
        )
    return corners


def _measured(
    places: Sequence[Place],
    chunks: Iterable[Mapping[str, SiteChunk]],
    codes: str,
    plan: ContextPlan,
) -> dict[str, InContext]:
    wanted = {}
    for number, place in enumerate(places):
        for code in codes:
            share_C = (plan.meetings / place.count_XC["ab".index(code)]).float()
            for weights in "ab":
                wanted[f"{number} {code}{weights}"] = Wanted(place.key_C, share_C)
    return measure_in_context(_exchanged(places, chunks, codes), wanted, plan)


def _exchanged(
    places: Sequence[Place], chunks: Iterable[Mapping[str, SiteChunk]], codes: str
) -> Iterator[dict[str, SiteChunk]]:
    """Chunks as each model's weights see them. What is of the token stays: the strengths, the
    norm's scalar, what the coder missed."""
    for by_site in chunks:
        found = {}
        for number, place in enumerate(places):
            for code in codes:
                site = place.sites["ab".index(code)]
                if site not in by_site:
                    raise UsageError(
                        f"These tokens were not read at {site}; they were at {', '.join(by_site)}."
                    )
                for weights, one in zip("ab", place.weights, strict=True):
                    found[f"{number} {code}{weights}"] = replace(by_site[site], effective=one)
        yield found


def _check(place: Place) -> None:
    a, b = (one.decoder_LD.shape for one in place.weights)
    if a[1] != b[1]:
        raise UsageError(
            f"{place.sites[0]} is {a[1]} wide and {place.sites[1]} {b[1]}: models of different "
            "widths cannot be given each other's weights, so their changes cannot be split."
        )
    if a[0] != b[0]:
        raise UsageError(
            f"{a[0]} latents are compared with {b[0]}: changes are told of the same latents in two "
            "models."
        )

"""The same triplets in two models on the same tokens: which changed, and through what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from crosslens.diffing.norms import cosines_of_rows, relative_norm
from crosslens.errors import UsageError
from crosslens.interactions.changes.corners import CHANGES, CORNERS, Corners, Place, corners_of
from crosslens.interactions.neurons.effective import Effective
from crosslens.interactions.pairs.contexts import ContextPlan
from crosslens.interactions.pairs.measure import Chunks
from crosslens.interactions.pairs.table import Floats, Ints, Triplets

Measure = Literal["strength", "product"]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ChangePlan:
    """How changes are measured, and which latents count as changed."""

    contexts: ContextPlan = ContextPlan(meetings=32)
    """Meetings per triplet and code, groups of documents, seed."""
    cosine: float = 0.95
    """A latent has changed at a place if its two decoders have a lower cosine there,"""
    norm: float = 0.2
    """or if r = ‖d_b‖/(‖d_a‖ + ‖d_b‖), in raw units, is further from ½. .2: Kissane's bins."""

    def __post_init__(self) -> None:
        if not (-1 <= self.cosine <= 1 and 0 <= self.norm <= 0.5):
            raise UsageError(
                "Latents count as changed by a cosine between -1 and 1 and a distance of r from "
                f"0.5 between 0 and 0.5; found {self.cosine} and {self.norm}."
            )
        if min(self.contexts.groups, self.contexts.coalitions, self.contexts.meetings) < 2:
            raise UsageError(
                "Changes need at least 2 groups of documents, 2 meetings and 2 coalitions."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Changes:
    """What became of each triplet that either model's table has, place by place."""

    places: tuple[tuple[str, str], ...]
    """A site of either model."""
    place_C: Ints
    i_C: Ints
    j_C: Ints
    frequency_XC: Floats
    """Share of tokens on which both are active, in either model's code [2, C]."""
    strength_KC: Floats
    """Mean Σ_n ‖w_out,n‖|Δ_n| per meeting at each of `CORNERS` [4, C]; NaN where the two never meet
    in that code."""
    interval_C: Mapping[str, tuple[Floats, Floats]]
    """95 % interval of each of `CHANGES` of the strength, over documents; NaN where unknown."""
    cosine_IC: Floats
    """Of the first and of the second latent's decoders in the two models [2, C]."""
    norm_IC: Floats
    """Their r [2, C]."""
    changed_IC: Flags
    """Whether they count as changed."""

    def __len__(self) -> int:
        return len(self.i_C)

    def change(self, name: str = "total", by: Measure = "strength") -> Floats:
        """`total`, or of it what is by `weights` or by the `code`; of the strength, or of strength
        × frequency, which is 0 where the two never meet."""
        value_KC = self.strength_KC
        if by == "product":
            value_KC = np.nan_to_num(value_KC) * self.frequency_XC.repeat(2, axis=0)
        return np.array(CHANGES[name]) @ value_KC

    def most(self, n: int, by: Measure = "product", near: bool | None = None) -> Ints:
        """The numbers of the n triplets that changed most, the largest |total| first.

        Args:
            near: only those with a latent that changed (True), or with none (False).
        """
        size_C = np.nan_to_num(np.abs(self.change("total", by)))
        if near is not None:
            size_C = np.where(self.changed_IC.any(0) == near, size_C, -1.0)
        order_C = np.argsort(-size_C, kind="stable")[:n]
        return order_C[size_C[order_C] >= 0]

    def weights_share(self, place: int | None = None) -> float:
        """Σ|weights| / (Σ|weights| + Σ|code|) of strength × frequency, at a place or at all."""
        mine_C = slice(None) if place is None else self.place_C == place
        sizes = [
            float(np.abs(self.change(name, "product")[mine_C]).sum())
            for name in ("weights", "code")
        ]
        return sizes[0] / sum(sizes) if sum(sizes) else 0.0

    def columns(self) -> dict[str, NDArray[Any]]:
        """Everything, by name, as columns of one length."""
        names = np.array(self.places).reshape(-1, 2)[self.place_C]
        columns = {"site_a": names[:, 0], "site_b": names[:, 1], "i": self.i_C, "j": self.j_C}
        columns |= {f"frequency_{x}": row for x, row in zip("ab", self.frequency_XC, strict=True)}
        columns |= {f"strength_{k}": x for k, x in zip(CORNERS, self.strength_KC, strict=True)}
        for name, (low_C, high_C) in self.interval_C.items():
            columns |= {name: self.change(name), f"{name}_low": low_C, f"{name}_high": high_C}
        for at, latent in enumerate("ij"):
            columns[f"{latent}_cosine"] = self.cosine_IC[at]
            columns[f"{latent}_relative_norm"] = self.norm_IC[at]
            columns[f"{latent}_changed"] = self.changed_IC[at]
        return columns

    def plain(self, n: int = 20) -> dict[str, object]:
        """Figures as JSON has them, with the n triplets that changed most: of all, and of those
        with and without a latent that changed."""
        return {
            "triplets": len(self),
            "near_changed": int(self.changed_IC.any(0).sum()),
            "weights_share": self.weights_share(),
            "places": {
                b: {
                    "triplets": int((self.place_C == at).sum()),
                    "weights_share": self.weights_share(at),
                    "change": float(self.change("total", "product")[self.place_C == at].sum()),
                }
                for at, (_, b) in enumerate(self.places)
            },
            "most": [self._told(c) for c in self.most(n).tolist()],
            "most_near_changed": [self._told(c) for c in self.most(n, near=True).tolist()],
            "most_unchanged": [self._told(c) for c in self.most(n, near=False).tolist()],
        }

    def _told(self, c: int) -> dict[str, object]:
        """One triplet as JSON has it."""
        ends_I = np.array([self.i_C[c], self.j_C[c]])
        told: dict[str, object] = {
            "i": int(self.i_C[c]),
            "j": int(self.j_C[c]),
            "sites": list(self.places[self.place_C[c]]),
            "strength": [_number(self.strength_KC[at, c]) for at in (0, 3)],
            "frequency": self.frequency_XC[:, c].tolist(),
            "changed": ends_I[self.changed_IC[:, c]].tolist(),
        }
        for name, (low_C, high_C) in self.interval_C.items():
            ends = [float(low_C[c]), float(high_C[c])]
            told[name] = _number(self.change(name)[c])
            told[f"{name}_ci"] = ends if np.isfinite(ends).all() else None
        return told


def changes(
    triplets_a: Triplets,
    triplets_b: Triplets,
    effectives_a: Mapping[str, Effective],
    effectives_b: Mapping[str, Effective],
    chunks: tuple[Chunks, Chunks],
    plan: ChangePlan = ChangePlan(),
) -> Changes:
    """Every triplet of either table under the code and the weights of either model.

    Weights are decoders and all matrices of the MLP and its norm; the code is all that is of the
    token: strengths, the norm's scalar, what the coder misses. Where both models share one code,
    its part of the change is that of the scalar and of what is missed. docs/interactions_kinds.md.

    Args:
        effectives_a, effectives_b: by site, in order of depth: the n-th of `a` is compared with the
            n-th of `b`. Latent i of the one is latent i of the other.
        chunks: what gives the chunks of a's sites, and of b's: of the tables' own tokens. The same
            object twice where one walk gives both.

    Raises:
        UsageError: the models have different numbers of sites, widths or latents; the chunks are of
            other tokens or sites than the tables.
    """
    if len(effectives_a) != len(effectives_b):
        raise UsageError(
            f"{len(effectives_a)} sites are compared with {len(effectives_b)}; changes need as "
            "many of each model."
        )
    tables = (triplets_a, triplets_b)
    pairs = zip(effectives_a.items(), effectives_b.items(), strict=True)
    places = [_place(tables, (a, b), (one, other)) for (a, one), (b, other) in pairs]
    found = corners_of(places, chunks, plan.contexts)
    for place, corners in zip(places, found, strict=True):
        _check_tokens(tables, place, corners)
    return _joined(places, found, (triplets_a.tokens, triplets_b.tokens), plan)


def _place(
    tables: tuple[Triplets, Triplets], sites: tuple[str, str], ones: tuple[Effective, Effective]
) -> Place:
    """The pairs that either table has at its site."""
    n_latents = len(ones[0].E_LN)
    counts = [_counts(table, site, n_latents) for table, site in zip(tables, sites, strict=True)]
    keys = sorted(counts[0] | counts[1])
    either = counts[1] | counts[0], counts[0] | counts[1]
    device = ones[0].out_norm_N.device
    return Place(
        sites=sites,
        weights=ones,
        key_C=torch.tensor(keys, dtype=torch.int64, device=device),
        count_XC=torch.tensor([[one[key] for key in keys] for one in either], device=device),
    )


def _counts(table: Triplets, site: str, n_latents: int) -> dict[int, int]:
    """Key → tokens on which both are active."""
    if site not in table.sites:
        return {}
    mine_C = table.site_C == table.sites.index(site)
    keys = table.i_C[mine_C] * n_latents + table.j_C[mine_C]
    return dict(zip(keys.tolist(), table.count_C[mine_C].tolist(), strict=True))


def _check_tokens(tables: tuple[Triplets, Triplets], place: Place, corners: Corners) -> None:
    n_latents = len(place.weights[0].E_LN)
    for table, site, met_C in zip(tables, place.sites, corners.met_KC[[0, 3]], strict=True):
        found = dict(zip(place.key_C.tolist(), met_C.tolist(), strict=True))
        wrong = [
            (n, found[key]) for key, n in _counts(table, site, n_latents).items() if found[key] != n
        ]
        if wrong:
            raise UsageError(
                f"At {site} a pair meets on {wrong[0][0]} tokens by its table and on {wrong[0][1]} "
                "of these: changes need the same tokens that the tables were measured on."
            )


def _joined(
    places: list[Place], found: list[Corners], tokens: tuple[int, int], plan: ChangePlan
) -> Changes:
    latents = [_latents(place) for place in places]
    cosine_IC, norm_IC = (np.concatenate(each, -1) for each in zip(*latents, strict=True))
    met_XC = torch.cat([corners.met_KC[[0, 3]] for corners in found], -1).cpu().numpy()
    intervals = {name: [corners.change(name)[1:] for corners in found] for name in CHANGES}
    keys = [np.divmod(p.key_C.cpu().numpy(), len(p.weights[0].E_LN)) for p in places]
    i_C, j_C = (np.concatenate(each) for each in zip(*keys, strict=True))
    return Changes(
        places=tuple(place.sites for place in places),
        place_C=np.repeat(np.arange(len(places)), [len(place.key_C) for place in places]),
        i_C=i_C,
        j_C=j_C,
        frequency_XC=met_XC / np.array(tokens)[:, None],
        strength_KC=torch.cat([corners.strength_KC for corners in found], -1).cpu().numpy(),
        interval_C={name: _ends(ends) for name, ends in intervals.items()},
        cosine_IC=cosine_IC,
        norm_IC=norm_IC,
        changed_IC=(cosine_IC < plan.cosine) | (np.abs(norm_IC - 0.5) > plan.norm),
    )


def _ends(ends: Sequence[tuple[torch.Tensor, ...]]) -> tuple[Floats, Floats]:
    low_C, high_C = (torch.cat(each).cpu().numpy() for each in zip(*ends, strict=True))
    return low_C, high_C


def _latents(place: Place) -> tuple[Floats, Floats]:
    """Cosine and r of both latents of each pair [2, C]."""
    a_LD, b_LD = (one.decoder_LD for one in place.weights)
    cosine_L = cosines_of_rows(a_LD, b_LD)
    norm_L = relative_norm(*(x.double().norm(dim=-1).cpu() for x in (a_LD, b_LD)))
    latent_IC = torch.stack([place.key_C // len(a_LD), place.key_C % len(a_LD)]).cpu()
    return cosine_L[latent_IC].numpy(), norm_L[latent_IC].numpy()


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

"""Latents through a sequence of models, such as checkpoints of one training: when they appear, when
they are gone, and how far they turn in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from crosslens.coder import Coder, dense_decoder
from crosslens.diffing.pair import Pair, pair_of
from crosslens.errors import UsageError
from crosslens.functional.shares import wilson
from crosslens.lm import split_site


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """Each latent's course over models M, in the order in which the coder has them.

    A latent is present in a model where its share is above `least_share`. Its life is its longest
    unbroken presence, of equally long ones the first: a single checkpoint that falls out of line
    neither starts nor ends it.
    """

    models: tuple[str, ...]
    least_share: float
    alive_L: Bool[Tensor, " l"]
    """Latents that are active at all and write something; the others have no course."""
    share_LM: Float[Tensor, "l m"]
    """RelDec_m = ‖d^m‖ / Σ_m' ‖d^m'‖ in scaled units (2509.05291); 0 where a latent writes
    nothing."""
    birth_L: Int64[Tensor, " l"]
    """The first model of its life; 0: there from the start. -1 of dead latents."""
    death_L: Int64[Tensor, " l"]
    """The first model after it; M: there to the end. -1 of dead latents."""
    cosine_LS: Float[Tensor, "l steps"]
    """Between its decoders in each model and the next; NaN where one of them is 0, or the models
    have different widths."""

    @property
    def present_LM(self) -> Bool[Tensor, "l m"]:
        """Where a latent is present, also outside its life."""
        return (self.share_LM > self.least_share) & self.alive_L[:, None]

    @property
    def living_LM(self) -> Bool[Tensor, "l m"]:
        """Models from birth to death; none of dead latents."""
        number_M = torch.arange(len(self.models))
        return (number_M >= self.birth_L[:, None]) & (number_M < self.death_L[:, None])

    def plain(self) -> dict[str, Any]:
        """JSON-able: `{"latents", "unused", "least_share", "interrupted", "lives": [{"birth",
        "death", "latents"}], "checkpoints": [{"model", "present", "births", "deaths", "interval":
        {"births", "deaths"}, "turned": {"latents", "mean_cosine", "low_cosine"}}]}`.

        Births at the first model are latents that were there from the start. `interrupted` are
        those present outside their life too. `lives` counts each birth and death that goes
        together, the commonest first. Intervals are Wilson's, of counts out of the latents that
        have a course. `turned` compares latents that live both in a model and in the one before
        with themselves (`low_cosine`: one in twenty is below); None at the first and where there
        are none.
        """
        outside_LM = self.present_LM & ~self.living_LM
        return {
            "latents": len(self.alive_L),
            "unused": int((~self.alive_L).sum()),
            "least_share": self.least_share,
            "interrupted": int(outside_LM.any(1).sum()),
            "lives": self._lives(),
            "checkpoints": [self._checkpoint(m) for m in range(len(self.models))],
        }

    def _lives(self) -> list[dict[str, int]]:
        ends = zip(self.birth_L.tolist(), self.death_L.tolist(), strict=True)
        counts = Counter(both for both in ends if both[0] >= 0)
        order = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
        return [{"birth": birth, "death": death, "latents": n} for (birth, death), n in order]

    def _checkpoint(self, m: int) -> dict[str, Any]:
        total = int(self.alive_L.sum())
        counts = {
            name: int((end_L == m).sum())
            for name, end_L in (("births", self.birth_L), ("deaths", self.death_L))
        }
        return {
            "model": self.models[m],
            "present": int(self.present_LM[:, m].sum()),
            **counts,
            "interval": {
                name: [round(total * end, 1) for end in wilson(n, total)]
                for name, n in counts.items()
            },
            "turned": self._turned(m) if m else None,
        }

    def _turned(self, m: int) -> dict[str, Any] | None:
        both_L = self.living_LM[:, m] & self.living_LM[:, m - 1]
        cosine_N = self.cosine_LS[both_L, m - 1].double()
        cosine_N = cosine_N[~cosine_N.isnan()]
        if not len(cosine_N):
            return None
        return {
            "latents": len(cosine_N),
            "mean_cosine": float(cosine_N.mean()),
            "low_cosine": float(cosine_N.quantile(0.05)),
        }


@torch.no_grad()
def timeline(
    coder: Coder, alive_L: Bool[Tensor, " l"] | None = None, presence: float = 0.5
) -> Timeline:
    """The course of every latent over all models that the coder writes.

    Args:
        alive_L: latents that are active on some tokens; by default all that write something.
        presence: least share of a latent that is present, as a multiple of the even share 1/M.
            Below 1, so that every latent is present somewhere.

    Raises:
        UsageError: the coder does not write two models or more separately and at the same places,
            or `presence` is not in (0, 1).
    """
    if not 0 < presence < 1:
        raise UsageError(f"presence is a multiple of the even share, in (0, 1), found {presence}.")
    models = _models(coder)
    pairs = [pair_of(coder, a, b) for a, b in pairwise(models)]
    norm_LM = _norms(coder, models)
    total_L = norm_LM.sum(1)
    alive_L = total_L > 0 if alive_L is None else alive_L & (total_L > 0)
    share_LM = norm_LM / total_L.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    least = presence / len(models)
    birth_L, death_L = _longest_run(share_LM > least)
    return Timeline(
        models=models,
        least_share=least,
        alive_L=alive_L,
        share_LM=share_LM,
        birth_L=birth_L.where(alive_L, -1),
        death_L=death_L.where(alive_L, -1),
        cosine_LS=_cosines(coder, pairs),
    )


def _models(coder: Coder) -> tuple[str, ...]:
    """The models of a coder that writes several, in order."""
    pair_of(coder)  # refuses what is of one model, or of none in particular
    names = [split_site(site)[0] for site in coder.wiring.write.sites]
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _norms(coder: Coder, models: Sequence[str]) -> Tensor:
    """‖d^m‖ of each latent over all sites of a model [L, M], on the CPU."""
    norm_LP = coder.decoder_norms().cpu()
    of_P = [split_site(site)[0] for site in coder.wiring.write.sites]
    mine = [[name == model for name in of_P] for model in models]
    return torch.stack([norm_LP[:, torch.tensor(m)].norm(dim=-1) for m in mine], -1)


def _cosines(coder: Coder, pairs: Sequence[Pair]) -> Tensor:
    """Cosine of each latent's decoders in the two models of each pair [L, pairs], on the CPU."""
    W_LY = dense_decoder(coder)
    none_L = torch.full((len(W_LY),), torch.nan)
    columns = []
    for pair in pairs:
        if pair.same_width:
            a_LY, b_LY = W_LY[:, pair.columns_a], W_LY[:, pair.columns_b]
            norms_L = a_LY.norm(dim=-1) * b_LY.norm(dim=-1)
            columns.append(((a_LY * b_LY).sum(-1) / norms_L).cpu())  # 0/0 is NaN, as it should
        else:
            columns.append(none_L)
    return torch.stack(columns, -1)


def _longest_run(present_LM: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end (the first place after it) of the longest run of each row, the first of
    several as long."""
    run_L, best_L, end_L = torch.zeros(3, len(present_LM), dtype=torch.int64)
    for m, present_L in enumerate(present_LM.unbind(1)):
        run_L = (run_L + 1) * present_L
        longer_L = run_L > best_L
        best_L = run_L.where(longer_L, best_L)
        end_L = end_L.masked_fill(longer_L, m + 1)
    return end_L - best_L, end_L

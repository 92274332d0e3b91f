"""What ablating both latents of a pair does beyond what ablating each alone does, measured.

To ablate a latent is to take a_i d_i (raw units) away from the model's own activation at one site,
wherever the latent is active: what the coder misses stays, and so does everything else. With L the
loss of a prediction, Δ_i = L(without i) − L, and

    Δ_ij − Δ_i − Δ_j = L(without both) − L(without i) − L(without j) + L,

the mixed difference of the loss: 0 where the two act independently of one another. The same of
KL(the model as it is ‖ without), and of logits (`effects_runs.FIGURES`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from crosslens.activations import Source
from crosslens.coder import Coder
from crosslens.diffing.resampling import LEAST
from crosslens.diffing.stream import Progress, quiet
from crosslens.errors import UsageError
from crosslens.interactions.effects.choice import CHOICES, Chosen, EffectPlan, choose
from crosslens.interactions.effects.runs import FIGURES, Bench, Summed, measure, widened
from crosslens.interactions.effects.statistics import compared, correlated
from crosslens.interactions.effects.visits import Code, code_of, told_documents, visits
from crosslens.interactions.intervals import mean_interval
from crosslens.interactions.neurons.contributions import SiteChunk, effective, site_chunks
from crosslens.interactions.pairs.contexts import ContextPlan, Wanted, measure_in_context
from crosslens.interactions.pairs.table import Floats, Triplets
from crosslens.interactions.pairs.table import triplets as table_of
from crosslens.interactions.pairs.totals import Met, meet
from crosslens.lm import LanguageModel

__all__ = ["FIGURES", "EffectPlan", "Effects", "effects"]

BOUNDED = ("interaction", "interaction_abs", "kl_interaction", "kl_interaction_abs")
"""Figures that come with an interval over documents; `kl_from_additive` too."""
SIZES = ("interaction_abs", "kl_interaction_abs", "kl_from_additive")
PLAN = EffectPlan()


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """What ablating pairs does: means of `FIGURES` over the predictions at which both latents are
    active, and (`later_`) over those after the first of them in the same document and block, at
    which not both are."""

    chosen: Chosen
    here: Summed
    later: Summed
    cosine_C: Floats
    """Of the two decoders at the site."""
    cooccurrence_C: Floats
    """Of the tokens on which either is active, the share on which both are."""
    size_C: Floats
    """Mean of ‖a_i d_i‖·‖a_j d_j‖ over the tokens on which both are active, raw units squared."""
    others: Triplets | None
    """The measures of chosen pairs that the given table does not hold."""

    def columns(self) -> dict[str, Any]:
        """Everything, by name, as columns of one length. Intervals are 95 %, by the jackknife over
        documents (`pair_intervals.mean_interval`: a pair is measured in few documents, for which a
        bootstrap's are too narrow); NaN for a pair measured in one document."""
        chosen = self.chosen
        return {
            "site": np.array(chosen.sites)[chosen.site_C],
            "i": chosen.i_C,
            "j": chosen.j_C,
            "kind_of_choice": chosen.kind_C,
            **_columns(self.here),
            **{f"later_{name}": column for name, column in _columns(self.later).items()},
            "cooccurrence": self.cooccurrence_C,
            "decoder_cosine": self.cosine_C,
            "size_product": self.size_C,
        }

    def sizes(self, figure: str = "interaction_abs") -> dict[str, dict[str, object]]:
        """A figure's mean for each kind of choice, and its ratio to that of random pairs, with
        intervals over pairs (`effects_statistics.compared`)."""
        column = self.columns()[figure]
        return compared(column, self.chosen.kind_C, baseline="random")

    def reliability(self, figure: str = "interaction_abs") -> float | None:
        """How well a figure is measured: its rank correlation, within sites, between even and odd
        documents, over sites with 5 pairs or more that are measured in both halves. None where
        there is no such site: two pairs have a rank correlation of 1 or −1 whatever they are."""
        total_CG, count_CG = self.here.total(figure), self.here.count_CG
        even, odd = (
            (total_CG[:, half::2].sum(1) / count_CG[:, half::2].sum(1)).numpy() for half in (0, 1)
        )
        site_C, known_C = self.chosen.site_C, np.isfinite(even) & np.isfinite(odd)
        enough_C = np.bincount(site_C[known_C], minlength=site_C.max() + 1)[site_C] >= LEAST
        found = correlated(np.where(enough_C, even, np.nan), odd, site_C)
        return None if found is None else found.value

    def plain(self, top: int = 20) -> dict[str, object]:
        """For JSON: what was measured, sizes beside random pairs, and the `top` largest."""
        return {
            "pairs": {kind: int((self.chosen.kind_C == kind).sum()) for kind in CHOICES},
            "predictions": int(self.here.count_CG.sum()),
            "later_predictions": int(self.later.count_CG.sum()),
            "sizes": {
                name: self.sizes(name) for figure in SIZES for name in (figure, f"later_{figure}")
            },
            "reliability": {figure: self.reliability(figure) for figure in SIZES},
            "largest": self._largest(top),
        }

    def _largest(self, n: int) -> list[dict[str, object]]:
        columns = self.columns()
        size_C = columns["interaction_abs"]
        order = np.argsort(-np.nan_to_num(size_C, nan=-1.0), kind="stable")[:n]
        return [{name: _plain(column[c]) for name, column in columns.items()} for c in order]


def _plain(value: Any) -> object:
    """A Python number or string; None for what is not finite."""
    value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _columns(sums: Summed) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "tokens": sums.count_CG.sum(1).numpy(),
        "documents": (sums.count_CG > 0).sum(1).numpy(),
    }
    columns |= {name: sums.mean(name).numpy() for name in FIGURES}
    for name in (*BOUNDED, "kl_from_additive"):
        _, low_C, high_C = mean_interval(sums.total(name), sums.count_CG)
        columns |= {f"{name}_low": low_C.numpy(), f"{name}_high": high_C.numpy()}
    return columns


@torch.no_grad()
def effects(
    source: Source,
    coder: Coder,
    model: LanguageModel,
    triplets: Triplets,
    plan: EffectPlan = PLAN,
    report: Progress = quiet,
) -> Effects:
    """The effects of the table's top pairs, and of pairs to compare them with, at its sites.

    The model computes in float32 meanwhile. Passes start at the layer of the site.

    Args:
        report: hears (pairs × blocks done, in all).

    Raises:
        UsageError: the table is empty, its sites are not the coder's and this model's, or the model
            cuts text otherwise than the source's first.
        CrosslensError: none of the table's pairs meets often enough in this text, or what
            `site_chunks` raises.
    """
    if not len(triplets):
        raise UsageError("The table holds no pairs, so there is nothing whose effect to measure.")
    if model.name in source.blocks.others:
        raise UsageError(
            f"{model.name!r} cuts text otherwise than the source's first model; effects are "
            "measured of a model whose tokens are those of the rows. Give the first model's."
        )
    with widened(model):
        bench, chosen, others = _prepared(
            _spread(source, plan.positions), coder, model, triplets, plan
        )
        todo = visits(bench.code, chosen, bench.told_NT, plan)
        here, later = measure(bench, chosen, todo, plan.at_once, report)
    return _effects(bench, chosen, here, later, others)


def _spread(source: Source, positions: int) -> Source:
    """Every so-many-th block of the source: documents that are far apart."""
    n_blocks = max(1, positions // source.block_length)
    step = max(1, len(source.blocks.tokens_NT) // n_blocks)
    return replace(source, blocks=source.blocks.some(slice(0, n_blocks * step, step)))


def _prepared(
    source: Source, coder: Coder, model: LanguageModel, triplets: Triplets, plan: EffectPlan
) -> tuple[Bench, Chosen, Triplets | None]:
    """What the passes need, and none of the much larger tables that it is made from."""
    effectives = {site: effective(coder, model, site) for site in triplets.sites}
    chunks = list(site_chunks(source, coder, model, effectives))
    met = meet(chunks)
    chosen = choose(triplets, met, plan)
    bench = Bench(
        model=model,
        blocks=source.blocks,
        told_NT=told_documents(source.blocks),
        code=code_of(chunks),
        decoders={site: one.decoder_LD for site, one in effectives.items()},
    )
    return bench, chosen, _others(chunks, met, chosen, triplets, plan.contexts)


def _effects(
    bench: Bench, chosen: Chosen, here: Summed, later: Summed, others: Triplets | None
) -> Effects:
    code: Code = bench.code
    pairs = list(zip(chosen.i_C.tolist(), chosen.j_C.tolist(), strict=True))
    decoders = [bench.decoders[chosen.sites[number]] for number in chosen.site_C.tolist()]
    rows_C2D = [d_LD[list(ij)].double().cpu() for d_LD, ij in zip(decoders, pairs, strict=True)]
    norms_C = np.array([float(rows_2D.norm(dim=1).prod()) for rows_2D in rows_C2D])
    inner_C = np.array([float(d_i_D @ d_j_D) for d_i_D, d_j_D in rows_C2D])
    return Effects(
        chosen=chosen,
        here=here,
        later=later,
        cosine_C=inner_C / norms_C,
        cooccurrence_C=np.array([code.jaccard(*ij) for ij in pairs]),
        size_C=norms_C * np.array([code.mean_product(*ij) for ij in pairs]),
        others=others,
    )


def _others(
    chunks: Sequence[dict[str, SiteChunk]],
    met: dict[str, Met],
    chosen: Chosen,
    triplets: Triplets,
    plan: ContextPlan,
) -> Triplets | None:
    """The table's measures for chosen pairs that it does not hold, on the tokens looked at."""
    wanted: dict[str, Wanted] = {}
    for number, (site, one) in enumerate(met.items()):
        at_site = triplets.site_C == number
        held = triplets.i_C[at_site] * one.n_latents + triplets.j_C[at_site]
        key_C = chosen.keys(one.n_latents)[chosen.site_C == number]
        key_C = torch.from_numpy(np.setdiff1d(key_C, held)).to(one.sums.key_U.device)
        if len(key_C):
            place_C, _ = one.sums.found(key_C)
            wanted[site] = Wanted(key_C, (plan.meetings / one.sums.count_U[place_C]).float())
    if not wanted:
        return None
    some = [{site: by_site[site] for site in wanted} for by_site in chunks]
    return table_of({site: met[site] for site in wanted}, measure_in_context(some, wanted, plan))

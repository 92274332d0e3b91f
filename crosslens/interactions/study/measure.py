"""The whole study of a coder's interactions: for any coder and any supported models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from crosslens.activations import Source
from crosslens.coder import Coder
from crosslens.diffing.stream import Progress
from crosslens.errors import CrosslensError
from crosslens.interactions.attention.measure import Attention, attention
from crosslens.interactions.changes.measure import Changes, changes
from crosslens.interactions.clusters.measure import Clusters, clusters
from crosslens.interactions.effects.measure import Effects, effects
from crosslens.interactions.neurons.effective import Effective, mlp_sites
from crosslens.interactions.neurons.exact import SiteInteraction
from crosslens.interactions.pairs.kinds import Labels, kinds
from crosslens.interactions.pairs.measure import Pairs, measure_pairs
from crosslens.interactions.pairs.screen import Screened, screen
from crosslens.interactions.pairs.signatures import signatures
from crosslens.interactions.pairs.table import Triplets
from crosslens.interactions.study.offers import offering
from crosslens.interactions.study.plan import DEFAULT, InteractPlan
from crosslens.interactions.study.sites import (
    Sites,
    chosen_models,
    chosen_sites,
    comparable,
    effectives_of,
)
from crosslens.interactions.study.triplets import halves_of, triplets_at
from crosslens.interactions.study.walk import Report, Walks
from crosslens.lm import LanguageModel
from crosslens.training import silent


@dataclass(frozen=True, kw_only=True, eq=False)
class Interactions:
    """All that a study found; what was not asked for is empty or None."""

    plan: InteractPlan
    models: tuple[str, ...]
    latents: int
    documents: tuple[str, ...]
    tokens: int = 0
    """Those that count; 0 where no MLP was looked at."""
    sites: Mapping[str, SiteInteraction] = field(default_factory=dict)
    pairs: Pairs | None = None
    triplets: Triplets | None = None
    """Those of `pairs`, with the measures that kinds are told by."""
    kind_C: Labels | None = None
    """Of each triplet."""
    clusters: Clusters | None = None
    effects: Mapping[str, Effects] = field(default_factory=dict)
    """By model."""
    attention: Mapping[str, Attention] = field(default_factory=dict)
    """By model."""
    screen: Mapping[str, Screened] = field(default_factory=dict)
    """By site."""
    changes: Changes | None = None
    """Between the first and the last model."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """What could not be measured though the rest could (parts, or `intervals`), and why."""


@dataclass(frozen=True, eq=False)
class _Study:
    """What all parts look at."""

    source: Source
    coder: Coder
    models: Mapping[str, LanguageModel]
    plan: InteractPlan
    report: Report

    def progress(self, stage: str, name: str) -> Progress:
        """Hears how far one stage of a model is."""
        said = self.said_of(name)
        return lambda done, total: said(stage, done, total, {})

    def said_of(self, name: str) -> Report:
        """Reports of one model's stages, with its name where there are several."""
        if len(self.models) == 1:
            return self.report
        return lambda stage, *told: self.report(f"{stage}, {name}", *told)


@dataclass(frozen=True, eq=False)
class _MLPs:
    """What the parts about MLPs rest on."""

    sites: Sites
    effectives: Mapping[str, Effective]
    walks: Walks
    pairs: Pairs
    triplets: Triplets

    def of(self, name: str) -> tuple[Triplets, dict[str, Effective]]:
        """One model's triplets and sites."""
        own = {site: self.effectives[site] for site in self.sites[name]}
        return triplets_at(self.triplets, tuple(own)), own


def interact(
    source: Source,
    coder: Coder,
    plan: InteractPlan = DEFAULT,
    report: Report = silent,
) -> Interactions:
    """Measure the interactions of a coder's latents in the models that it writes.

    What rests on the MLPs' pairs, and attention beside them, is left out with the reason where it
    cannot be measured.

    Args:
        source: tokens and models; its sites are the coder's. All its tokens are taken.
        report: hears how far each stage is.

    Raises:
        UsageError: the coder writes no site before an MLP, or none that `plan` names; an MLP is of
            no supported kind; the coder or the source is of other models.
        CrosslensError: nothing is active, no two latents ever meet, or numbers are not finite.
    """
    study = _Study(source, coder, chosen_models(coder, source.models, plan.model), plan, report)
    found = Interactions(
        plan=plan,
        models=tuple(study.models),
        latents=coder.wiring.n_latents,
        documents=tuple(source.blocks.documents),
        left_out=_no_intervals(source),
    )
    todo: dict[str, Callable[[], Any]] = {}
    if "mlp" in plan.parts:
        mlps = _mlps(study)
        found = replace(
            found,
            tokens=mlps.triplets.tokens,
            sites=mlps.walks.interactions(),
            pairs=mlps.pairs,
            triplets=mlps.triplets,
            kind_C=kinds(mlps.triplets, mlps.effectives),
        )
        todo |= {
            "clusters": lambda: clusters(mlps.triplets, plan.clusters, halves_of(mlps.pairs)),
            "screen": lambda: _screen(plan, mlps),
            "changes": lambda: _changes(plan, mlps),
            "effects": lambda: _effects(study, mlps),
        }
    todo["attention"] = lambda: _attention(study)
    for part in plan.parts:
        found = _with(found, part, todo[part]) if part in todo else found
    return found


def _no_intervals(source: Source) -> dict[str, str]:
    documents = set(source.blocks.docs_NT.flatten().tolist()) - {-1}
    if len(documents) > 1:
        return {}
    return {
        "intervals": "They compare documents, and the text looked at is of one only. Give more text"
        " (--tokens)."
    }


def _with(found: Interactions, part: str, measure: Callable[[], Any]) -> Interactions:
    try:
        return replace(found, **{part: measure()})
    except CrosslensError as error:
        if not found.sites:
            raise
        # What one part cannot say should not cost what was measured before it.
        return replace(found, left_out={**found.left_out, part: str(error)})


def _mlps(study: _Study) -> _MLPs:
    coder, models = study.coder, study.models
    with offering(coder, models):
        known = {name: mlp_sites(coder, model) for name, model in models.items()}
    sites = chosen_sites(coder, known, study.plan.sites)
    with offering(coder, models, sites):
        effectives = effectives_of(coder, models, sites)
    model = next(iter(models.values()))
    walks = Walks(study.source, study.coder, model, effectives, study.report)
    pairs = measure_pairs(walks, study.plan.pairs)
    triplets = signatures(walks(), pairs.triplets, study.plan.pairs.contexts)
    return _MLPs(sites, effectives, walks, pairs, triplets)


def _screen(plan: InteractPlan, mlps: _MLPs) -> dict[str, Screened]:
    strengths = mlps.walks.strengths()
    return {
        site: screen(one, plan.screen, strength_L=strengths[site], met=mlps.pairs.met[site].sums)
        for site, one in mlps.effectives.items()
    }


def _changes(plan: InteractPlan, mlps: _MLPs) -> Changes | None:
    if not comparable(mlps.sites, mlps.effectives):
        return None
    names = list(mlps.sites)
    (before, sites_a), (after, sites_b) = mlps.of(names[0]), mlps.of(names[-1])
    return changes(before, after, sites_a, sites_b, (mlps.walks, mlps.walks), plan.changes)


def _effects(study: _Study, mlps: _MLPs) -> dict[str, Effects]:
    found = {}
    for name in mlps.sites:
        report, own = study.progress("ablate pairs", name), mlps.of(name)[0]
        model, plan = study.models[name], study.plan.effects
        found[name] = effects(study.source, study.coder, model, own, plan, report)
    return found


def _attention(study: _Study) -> dict[str, Attention]:
    source, coder, plan = study.source, study.coder, study.plan.attention
    return {
        name: attention(source, coder, model, plan, study.said_of(name))
        for name, model in study.models.items()
    }

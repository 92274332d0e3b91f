"""What was planted in the changed model, and how far the crosscoder's exclusive latents are it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crosslens.diffing.ablation import Ablated, Ablation, Trial, ablation, matched_sets
from crosslens.diffing.carried import Carried, carried
from crosslens.diffing.measures import Measures
from crosslens.diffing.nulls import NOOP, with_noop
from crosslens.diffing.planted import Conditions, Planted, conditions, planted
from crosslens.diffing.prompts import prompt_sets
from crosslens.diffing.study import Study, clean_blocks
from crosslens.diffing.told import finite, told
from crosslens.errors import UsageError
from crosslens.lm import LanguageModel
from crosslens.lm.adapter_base import RECORD
from crosslens.lm.opening import open_models
from crosslens.storage import load_json
from crosslens.text.documents import Messages
from crosslens.text.planted import BEHAVIOURS, Behaviour, behaviour_named, prompts

CONTROLS = 5
"""Random sets of latents, as large and as active as the one that is taken out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Traced:
    """A planted behaviour, looked for."""

    behaviour: Behaviour
    seen: Conditions
    """The prompts through the models."""
    found: Planted
    ablation: Ablation | None
    """None where no clean text was to be read, or no latent is exclusive enough to be taken out."""
    carried: Carried | None
    """None where no clean text was to be read, or where the models' widths differ."""

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        top = {"behaviour": self.behaviour.name, "top": list(self.found.top)}
        facts: dict[str, Any] = top | _detection(self.found)
        if self.ablation is not None:
            facts |= _ablation(self.ablation)
        if self.carried is not None:
            facts["carried"] = {
                "sites": list(self.carried.sites),
                **told({"b_with_a": self.carried.b_with_a, "a_with_b": self.carried.a_with_b}),
            }
        return facts


def behaviour_of(study: Study) -> Behaviour | None:
    """What was planted in `b`, as the plan or its adapter's record says; None where nothing was.

    Raises:
        UsageError: there is no behaviour of the name that the plan gives.
    """
    asked = study.plan.planted
    if asked == "none":
        return None
    if asked is not None:
        return behaviour_named(asked)
    adapter = study.run.config().models[study.pair.b].adapter
    if adapter is None:
        return None
    record = Path(adapter).expanduser() / RECORD
    if record.is_file():
        adapter = str(load_json(record).get("behaviour", {}).get("name"))
    # The one in which nothing was planted has nothing to be looked for.
    return BEHAVIOURS.get(adapter) if adapter != NOOP else None


def traced(study: Study, found: Measures, behaviour: Behaviour) -> Traced:
    """Run the prompts through the models, judge the ranking of exclusive latents, take the best
    out.

    Raises:
        UsageError: there are too few prompts for an interval.
    """
    sets = prompt_sets(behaviour, study.plan.prompts, study.plan.seed)
    study.report("running the planted behaviour's prompts", 0, 0, {})
    seen = conditions(study.source, study.pair, sets, _noop(study))
    judged = planted(study.pair, seen, found.score_L(), found.more_of_b_L, study.plan.seed)
    done, passing = None, None
    if study.plan.causal_tokens:
        asked = tuple(prompts(behaviour, study.plan.prompts, study.plan.seed, "heldout", True))
        if study.pair.same_width:
            study.report("exchanging activations", 0, 0, {})
            passing = carried(study.source, study.pair, behaviour, asked)
        if judged.top:
            done = _without(study, found, behaviour, judged.top, asked)
    return Traced(behaviour=behaviour, seen=seen, found=judged, ablation=done, carried=passing)


def _noop(study: Study) -> LanguageModel | None:
    """The fine-tune in which nothing was planted, where there is one."""
    spec = study.run.config().models[study.pair.a]
    with suppress(UsageError):  # no such adapter is at hand: one control fewer
        return open_models({"noop": with_noop(spec, study.plan.noop)})["noop"]
    return None


def _without(
    study: Study,
    found: Measures,
    behaviour: Behaviour,
    top: tuple[int, ...],
    asked: tuple[Messages, ...],
) -> Ablation:
    plan = study.plan
    trial = Trial(
        source=replace(study.source, blocks=clean_blocks(study)),
        pair=study.pair,
        behaviour=behaviour,
        prompts=asked,
        tokens=plan.causal_tokens,
    )
    activity_L = found.activity.strength_b_L * found.activity.density_L
    sets = matched_sets(activity_L.where(found.ranked_L, torch.nan), top, CONTROLS, plan.seed)
    return ablation(trial, top, sets, study.progress("ablate"))


def _detection(found: Planted) -> dict[str, Any]:
    detected = found.detection
    return {
        **told(
            {
                "auroc": detected.auroc,
                "precision_at_20": found.precision_at_20,
                "ranking_auroc": found.ranking_auroc,
            }
        ),
        "controls": told(
            {
                "same_text_base": detected.against_base,
                "same_text_noop": detected.against_noop,
                "base_sees_trigger": detected.base_sees,
                "noop_sees_trigger": detected.noop_sees,
            }
        ),
        "tied": int(found.tied_L.sum()),
        "prompts": list(found.prompts),
    }


def _ablation(found: Ablation) -> dict[str, Any]:
    return {
        "behaviour_rate_before": finite(found.behaviour_rate_before.value),
        "after_ablation": finite(found.ablated.behaviour_rate.value),
        "clean_loss_change": finite(found.ablated.loss_change.value),
        "ablation": {
            "before": told({"rate": found.behaviour_rate_before}),
            "top": _ablated(found.ablated),
            "random": [_ablated(each) for each in found.controls],
        },
    }


def _ablated(found: Ablated) -> dict[str, Any]:
    return told({"rate": found.behaviour_rate, "loss_change": found.loss_change})

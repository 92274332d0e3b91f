"""The whole diff of a run: measures, causal checks, nulls, what was planted, baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from crosslens.coder import coder_hash
from crosslens.diffing.causal import CausalPlan, causal
from crosslens.diffing.contest import contest
from crosslens.diffing.measures import Measures
from crosslens.diffing.nulls import Null, null_config, null_run
from crosslens.diffing.stability import Seed, stability
from crosslens.diffing.study import DiffPlan, Report, Study, open_study, same_weights
from crosslens.diffing.tables import latent_columns, save_table
from crosslens.diffing.timeline import Timeline, timeline
from crosslens.diffing.told import finite, told
from crosslens.diffing.traced import behaviour_of, traced
from crosslens.storage import save_json
from crosslens.training import Run, TrainConfig, open_run

EXCLUSIVE = ("only_a", "only_b")


def diff(run: Run, plan: DiffPlan, report: Report) -> dict[str, Any]:
    """Diff two models of a run. Writes tables and `diff.json` in RUN/diff; returns the latter.

    What takes a training of its own (nulls, the diff-SAE, the stage-wise SAE) is a run in RUN/diff,
    trained once.

    Raises:
        UsageError: the run is not of two models, or the plan does not fit it.
        CrosslensError: training has not finished.
    """
    study = open_study(run, plan, report)
    behaviour = behaviour_of(study)
    # Refused, if at all, before hours of work.
    nulls = {null: _null_config(study, null) for null in plan.nulls}
    others = [open_study(open_run(folder), plan, report, study.models) for folder in plan.seeds]
    found = study.measured()
    seen = None if behaviour is None else traced(study, found, behaviour)
    fidelity = found.fidelity.items()
    course = _course(study, found)
    result = {
        **_facts(study, found),
        **found.plain(),
        "null": {null: _null(study, null, config) for null, config in nulls.items()},
        "fvu": {name: finite(each.fvu.value) for name, each in fidelity},
        "fidelity": {
            name: told({"fvu": each.fvu, "explained_variance": each.explained_variance})
            for name, each in fidelity
        },
        "causal": _causal(study, found),
        "planted": None if seen is None else seen.plain(),
        "baselines": contest(study, seen),
        "stability": _stability(study, found, others),
        "timeline": None if course is None else course.plain(),
    }
    columns = latent_columns(found, seen.found if seen else None, course)
    save_table(study.folder, "latents", columns)
    save_json(study.folder / "diff.json", result)
    return result


def _facts(study: Study, found: Measures) -> dict[str, Any]:
    pair = study.pair
    return {
        "coder": coder_hash(pair.coder),
        "pair": {
            "a": pair.a,
            "b": pair.b,
            "sites": list(found.norms.places),
            "same_weights": same_weights(study),
        },
        "tokens": found.activity.tokens,
        "l0": float(found.activity.density_L.sum()),
        "latents": len(found.activity.count_L),
    }


def _null_config(study: Study, null: Null) -> TrainConfig:
    pair = study.pair
    return null_config(study.run.config(), null, pair.a, pair.b, study.plan.noop)


def _null(study: Study, null: Null, config: TrainConfig) -> dict[str, Any]:
    """The same counts of the same training where there is nothing, or nothing of note, to find."""
    folder = study.folder / "nulls" / null
    run, models = null_run(folder, config, study.report)
    # Its pair is the study's, also where that is not of the first and the last model.
    plan = replace(study.plan, a=study.pair.a, b=study.pair.b)
    opened = open_study(run, plan, study.report, models)
    found = opened.measured()
    course = _course(opened, found)
    save_table(folder, "latents", latent_columns(found, None, course))
    return {
        **found.plain(),
        "fvu": {k: finite(v.fvu.value) for k, v in found.fidelity.items()},
        "timeline": None if course is None else course.plain(),
    }


def _causal(study: Study, found: Measures) -> dict[str, Any] | None:
    plan, source = study.plan, study.source
    if not plan.causal_tokens or not study.pair.same_width:
        return None
    special_NT = source.blocks.special_NT
    template_NT = special_NT if bool((special_NT & ~source.blocks.bos_NT).any()) else None
    done = causal(
        source,
        study.pair,
        found.score_L(),
        template_NT,
        CausalPlan(tokens=plan.causal_tokens, seed=plan.seed),
        study.progress("causal"),
    )
    names = ("baseline", "top_half", "bottom_half", "full", "gap")
    more = ("top_replaced", "bottom_replaced", "template", "template_full")
    return {
        **told({f"kl_{name}": getattr(done, f"kl_{name}") for name in names + more}),
        "curve": [{"share": share, **told({"kl": each})} for share, each in done.curve],
        "predictions": done.predictions,
        "sites": list(done.sites),
    }


def _stability(study: Study, found: Measures, others: Sequence[Study]) -> dict[str, Any] | None:
    if not others:
        return None
    seeds = [_seed(study, found), *(_seed(other, other.measured()) for other in others)]
    return stability(seeds, progress=study.progress("match seeds")).plain()


def _seed(study: Study, found: Measures) -> Seed:
    labels = found.classes()
    return Seed(
        coder=study.pair.coder,
        alive_L=found.activity.count_L > 0,
        exclusive={name: labels.mask(name) & found.ranked_L for name in EXCLUSIVE},
    )


def _course(study: Study, found: Measures) -> Timeline | None:
    """Through all models of the run, of the latents that a ranking may hold; None of two models,
    where it says what the classes do."""
    if len(study.models) < 3:
        return None
    return timeline(study.pair.coder, found.ranked_L.cpu())

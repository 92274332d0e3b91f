"""The baselines: each made on the run's own text, and judged on the prompts of the planted
behaviour as the crosscoder is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from crosslens.diffing.baselines import (
    Baseline,
    Moments,
    StagewisePlan,
    Task,
    diff_sae,
    diff_sae_config,
    judged,
    mean_difference,
    moments,
    pca,
    places,
    read_kl,
    stagewise,
    steering,
    token_kl,
    train_stages,
)
from crosslens.diffing.nulls import null_run
from crosslens.diffing.planted import Conditions
from crosslens.diffing.study import BASELINES, Study, clean_text, run_coder
from crosslens.diffing.traced import Traced
from crosslens.errors import CrosslensError, UsageError, suggestion
from crosslens.text.planted import prompts
from crosslens.training import run_source

Made = Iterator[Baseline]


def parse_baselines(names: str) -> tuple[str, ...]:
    """`pca,token_kl` → the baselines meant; `all` and `none` are understood.

    Raises:
        UsageError: a name that is none of them.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if asked in (["all"], ["none"]):
        return BASELINES if asked == ["all"] else ()
    for name in asked:
        if name not in BASELINES:
            raise UsageError(
                f"There is no baseline {name!r}.{suggestion(name, BASELINES)} They are "
                f"{', '.join(BASELINES)}; `all` and `none` are understood."
            )
    return tuple(name for name in BASELINES if name in asked)


def contest(study: Study, traced: Traced | None) -> dict[str, Any]:
    """Name → what each baseline says and, where something was planted, how well it finds it.

    A baseline that cannot be had for this pair is told of with the reason.
    """
    asked = study.plan.baselines
    made: dict[str, Any] = {}
    makers: dict[str, Callable[[], Made]] = {
        "token_kl": lambda: _token_kl(study),
        "diff_sae": lambda: _diff_sae(study),
        "stagewise": lambda: _stagewise(study),
    }
    if "mean_difference" in asked or "pca" in asked:
        makers = {"moments": lambda: _of_moments(study, traced), **makers}
    seen = None if traced is None else traced.seen
    for name, make in makers.items():
        if name != "moments" and name not in asked:
            continue
        try:
            for baseline in make():
                made[baseline.name] = _told(baseline, seen, study.plan.seed)
        except CrosslensError as error:
            for each in ("mean_difference", "pca") if name == "moments" else (name,):
                if each in asked:
                    made[each] = {"left_out": str(error)}
    return made


def _told(baseline: Baseline, seen: Conditions | None, seed: int) -> dict[str, Any]:
    return baseline.figures if seen is None else judged(baseline, seen, seed)


def _of_moments(study: Study, traced: Traced | None) -> Made:
    """Of the deepest place: what has gathered there is what earlier places wrote."""
    place = places(study.pair)[-1]
    found = moments(study.source, [place], study.progress("mean difference"))[place.site]
    model = study.models[study.pair.b]
    if "mean_difference" in study.plan.baselines:
        baseline = mean_difference(found, model)
        if traced is not None:
            baseline = replace(baseline, figures=_steered(study, found, baseline, traced))
        yield baseline
    if "pca" in study.plan.baselines:
        yield pca(found, model)


def _steered(study: Study, found: Moments, baseline: Baseline, traced: Traced) -> dict[str, Any]:
    """Adds how often the behaviour shows when the difference is added to the base, on requests
    that do not call for it, and taken from the changed model on those that do."""
    plan, pair = study.plan, study.pair
    rates = {}
    for name, model, triggered in (("to_base", pair.a, False), ("to_changed", pair.b, True)):
        asked = prompts(traced.behaviour, plan.prompts, plan.seed, "heldout", triggered)
        task = Task(behaviour=traced.behaviour, prompts=asked)
        # A base model often has no chat template; its tokens are the same.
        asked_model = replace(study.models[model], tokenizer=study.models[pair.b].tokenizer)
        rates[name] = steering(asked_model, found, task)
    return {**baseline.figures, "steering": rates}


def _token_kl(study: Study) -> Made:
    a, b = study.pair.a, study.pair.b
    found = read_kl(study.source, a, b, study.progress("token KL"))
    yield token_kl(found, study.source, a, b)


def _diff_sae(study: Study) -> Made:
    config = diff_sae_config(study.run.config())
    run, _ = null_run(study.folder / "diff_sae", config, study.report)
    source = run_source(run, study.models, study.source.blocks)
    yield diff_sae(run_coder(run), source, study.models, study.progress("diff-SAE"))


def _stagewise(study: Study) -> Made:
    config, pair = study.run.config(), study.pair
    plan = StagewisePlan(
        before=clean_text(config), changed=config.text, steps=max(1, config.fit.steps // 2)
    )
    folder = study.folder / "stagewise"
    yield stagewise(train_stages(folder, config, (pair.a, pair.b), plan, study.report), pair)

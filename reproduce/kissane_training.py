"""The trainings of the replication, each judged as soon as it is done, and never done twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crosslens.cli.stages import Stages
from crosslens.coder import load, save
from crosslens.config import to_plain
from crosslens.device import resolve_dtype
from crosslens.diffing.nulls import null_config, null_run
from crosslens.diffing.pair import Pair, pair_of
from crosslens.diffing.study import DiffPlan, open_study
from crosslens.lm import ModelSpec, open_models
from crosslens.storage import load_json, save_json
from crosslens.training import TrainConfig
from reproduce.kissane_judging import judged, with_examples
from reproduce.kissane_rows import Held, against_itself, held
from reproduce.kissane_setup import (
    BASE,
    CHANGED,
    Sizes,
    adam,
    aim,
    at_published_rate,
    changes,
    middle,
    published,
    small,
    start_norm,
)
from reproduce.scheme_table import with_weight
from reproduce.scheme_training import Match, Rows, Trained, matched, train

SHOWN = 6
"""Strongest examples of a latent on the page."""


@dataclass(frozen=True)
class Results:
    """What the page tells."""

    columns: dict[str, dict[str, Any]]
    """`published`, `fitted` (of the small pair) and `null` -> figures."""
    facts: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """The small pair in memory."""

    config: TrainConfig
    """At our scale and rate, with the published λ."""
    pair: Held
    null: Held
    work: Path
    splice_tokens: int


def prepare(specs: dict[str, ModelSpec], sizes: Sizes, work: Path, splice_tokens: int) -> Bench:
    """Open the models and harvest their rows."""
    models = open_models(specs)
    config = small(specs, middle(models[BASE].n_layers), sizes)
    pair = held(models, config, work / "harvest")
    null = against_itself(pair, work / "harvest-null")
    return Bench(config, pair, null, work, splice_tokens)


def small_pair(bench: Bench, trials: int) -> Results:
    """With the published values, with λ searched, and against itself."""
    config, l0 = bench.config, aim(bench.config.coder.latents)
    theirs = at_published_rate(config)
    key = {"config": to_plain(config), "l0": l0, "trials": trials}
    columns = {
        "published": _kept(
            bench, "published", {"config": to_plain(theirs)}, lambda: _trained(bench, theirs)
        ),
        "fitted": _kept(bench, "fitted", key, lambda: _searched(bench, l0, trials)),
    }
    fitted = with_weight(config, "l1", columns["fitted"]["weight"])
    nothing = replace(bench, pair=bench.null)
    columns["null"] = _kept(
        bench, "null", {"config": to_plain(fitted)}, lambda: _trained(nothing, fitted)
    )
    record = load_json(bench.work / "harvest" / "harvest.json")
    facts = {
        "models": {k: model.identity() for k, model in bench.pair.source.models.items()},
        "width": bench.pair.harvest.layout.widths[0],
        "corpora": record["corpora"],
        "rows": bench.pair.harvest.counts,
        "harvest_tokens_per_s": record["tokens_per_s"],
        "aim": l0,
        "changes": changes(fitted),
        "steps": fitted.fit.steps,
        "batch": fitted.fit.batch,
        "rate": adam(fitted).lr,
    }
    return Results(columns, facts)


def _kept(
    bench: Bench, name: str, asked: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What was made before with the same settings, or what is made now."""
    key = {
        **asked,
        "text": bench.pair.harvest.fingerprint,
        "splice_tokens": bench.splice_tokens,
    }
    file = bench.work / name / "result.json"
    if file.is_file() and load_json(file)["key"] == key:
        print(f"{name}: done before", flush=True)
    else:
        save_json(file, {"key": key, "figures": make()})
    figures: dict[str, Any] = load_json(file)["figures"]
    print(_line(name, figures), flush=True)
    return figures


def _line(name: str, figures: Mapping[str, Any]) -> str:
    counts = figures["conventions"]["kissane"]
    fvu = ", ".join(f"{k} {each['fvu']:.3f}" for k, each in figures["models"].items())
    return (
        f"{name}: λ {figures['weight']:.3g}  L0 {figures['l0']:.1f}  FVU {fvu}  only base "
        f"{counts['only_a']}  only changed {counts['only_b']}  shared {counts['shared']}  dead "
        f"{counts['dead']}"
    )


def _trained(bench: Bench, config: TrainConfig) -> dict[str, Any]:
    trained = train(config, _rows(bench))
    return _figures(bench, config, trained, _as_saved(bench, trained, config))


def _searched(bench: Bench, l0: int, trials: int) -> dict[str, Any]:
    """Whole trainings in search of λ; the nearest is the one that is told of."""
    found = matched(bench.config, _rows(bench), "l1", l0, trials)
    config, trained = with_weight(bench.config, "l1", found[-1].weight), found[-1].trained
    pair = _as_saved(bench, trained, config)
    figures = _figures(bench, config, trained, pair)
    return {
        **figures,
        "picked": with_examples(pair, bench.pair.source, figures["picked"], SHOWN),
        "tried": [_trial(each) for each in sorted(found, key=lambda each: each.weight)],
    }


def _trial(match: Match) -> dict[str, Any]:
    curve = match.trained.fvu_curve
    return {"weight": match.weight, "l0": match.l0, "train_fvu": curve[-1] if curve else None}


def _rows(bench: Bench) -> Rows:
    harvest = bench.pair.harvest
    return Rows(harvest, harvest.layout.sites, True)


def _as_saved(bench: Bench, trained: Trained, config: TrainConfig) -> Pair:
    """The coder as it is when it is opened again, computing in the format it was trained in."""
    # The rows' folder tells the pair's coders from those of the model against itself.
    rate, weight = adam(config).lr, config.objective.l1.weight
    folder = bench.pair.harvest.folder / f"coder-{weight:g}-{rate:g}"
    save(trained.coder, folder, {"recipe": "kissane_diff"})
    coder = load(folder)
    coder.compute_dtype = resolve_dtype(config.fit.dtype)
    return pair_of(coder, BASE, CHANGED)


def _figures(bench: Bench, config: TrainConfig, trained: Trained, pair: Pair) -> dict[str, Any]:
    return {
        **judged(pair, bench.pair.source, start_norm(config), bench.splice_tokens),
        **_training(config),
        "train_seconds": trained.seconds,
        "fvu_curve": trained.fvu_curve,
    }


def _training(config: TrainConfig) -> dict[str, Any]:
    return {
        "weight": config.objective.l1.weight,
        "lr": adam(config).lr,
        "rows_read": config.fit.steps * config.fit.batch,
    }


def gemma_pair(work: Path, splice_tokens: int) -> Results:
    """The recipe as it was published, and on the base model against itself; each is a run of
    `crosslens train`, so that a stop costs at most the steps since its last checkpoint."""
    config = published()
    trainings = {"published": config, "null": null_config(config, "self", BASE, CHANGED)}
    columns: dict[str, dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    for name, each in trainings.items():
        with Stages(rows_per_step=each.fit.batch) as stages:
            run, models = null_run(work / name, each, stages)
            plan = DiffPlan(tokens=each.text.heldout, a=BASE, b=CHANGED)
            study = open_study(run, plan, stages, models)
            figures = judged(study.pair, study.source, start_norm(each), splice_tokens)
            if name == "published":
                picked = with_examples(study.pair, study.source, figures["picked"], SHOWN)
                figures |= {"picked": picked}
        columns[name] = figures | _training(each)
        print(_line(name, columns[name]), flush=True)
        record = run.record()
        facts.setdefault("models", record["models"])
        facts.setdefault("corpora", record["text"]["corpora"])
    facts |= {"width": models[BASE].d_model, "changes": changes(config)}
    facts |= {"steps": config.fit.steps, "batch": config.fit.batch, "rate": adam(config).lr}
    return Results(columns, facts)

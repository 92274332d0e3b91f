"""The same training where nothing, or nothing of interest, differs: what a count is told beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from crosslens.errors import CrosslensError, UsageError, suggestion
from crosslens.lm import LanguageModel, ModelSpec
from crosslens.training import Run, TrainConfig, create_run, open_models, open_run, train

Null = Literal["self", "noop", "shuffled"]
"""A model against itself; against a fine-tune on its own text; the pair with the two models'
activations exchanged on a random half of the tokens."""
NULLS: tuple[Null, ...] = get_args(Null)
NOOP = "noop"
"""The fine-tune of the built-in model on what it wrote itself."""
BUILT_IN = "smollm2"
Report = Callable[[str, int, int, Mapping[str, float]], None]


def parse_nulls(names: str) -> tuple[Null, ...]:
    """`self,noop` → the nulls meant; `none` is no null at all.

    Raises:
        UsageError: a name that is none of them.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if asked == ["none"]:
        return ()
    for name in asked:
        if name not in NULLS:
            raise UsageError(
                f"There is no null {name!r}.{suggestion(name, NULLS)} They are {', '.join(NULLS)}; "
                "`none` runs none."
            )
    return tuple(null for null in NULLS if null in asked)


def null_config(
    config: TrainConfig, null: Null, a: str, b: str, noop: str | None = None
) -> TrainConfig:
    """The training of `config` with that null in place of the pair (a, b); all else is the same,
    the text and its order included, and where there are more models than two, their number.

    Args:
        noop: adapter of `a` that was trained on its own text; the shipped one for the built-in
            model.

    Raises:
        UsageError: the models are not one of two, or there is no such adapter.
    """
    base, changed = config.models[a], config.models[b]
    match null:
        case "self":
            return replace(config, models={name: replace(base) for name in config.models})
        case "noop":
            others = dict.fromkeys(config.models, with_noop(base, noop))
            return replace(config, models={**others, a: base})
        case "shuffled":
            return replace(config, models={a: base, b: changed}, shuffle_models=True)


def with_noop(base: ModelSpec, noop: str | None) -> ModelSpec:
    """The fine-tune of `base` that changes nothing of interest."""
    if noop is None and (base.path != BUILT_IN or base.adapter is not None):
        raise UsageError(
            f"There is no fine-tune of {base.path} on its own text at hand. Make one with "
            "`crosslens organism noop` and name it with --noop FOLDER, or leave that null out: "
            "--nulls self,shuffled."
        )
    return replace(base, adapter=noop or NOOP)


def null_run(
    folder: Path, config: TrainConfig, report: Report
) -> tuple[Run, dict[str, LanguageModel]]:
    """The run in `folder`, trained now as far as it is not yet, and its models.

    Raises:
        CrosslensError: the folder holds a training with other settings.
    """
    if (folder / "run.json").is_file():
        run = open_run(folder)
        if run.config() != config:
            raise CrosslensError(
                f"{folder} was trained with other settings than this run's. Delete it, and it is "
                "trained anew."
            )
    else:
        run = create_run(folder, config)
    models = open_models(config)
    if not run.finished:
        train(run, models, report)
    return run, models

"""`crosslens demo`: the whole way on a real model, with no hub and no GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crosslens.cli.arguments import parse
from crosslens.cli.console import duration, print_json
from crosslens.cli.evaluate import evaluate_run, table
from crosslens.cli.stages import Stages
from crosslens.explore import build
from crosslens.text import Corpus, TextConfig
from crosslens.training import FitConfig, TrainConfig, create_run, open_models, open_run, train

CONFIG = TrainConfig(
    text=TextConfig(
        tokens=400_000,
        heldout=80_000,
        corpora={
            "main": Corpus(source="stdlib", weight=0.8),
            "chat": Corpus(source="stdlib-chat", weight=0.2),
        },
    ),
    fit=FitConfig(steps=440),
)
"""SmolLM2-135M-Instruct on the source of Python's standard library, as files and as chat."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What `demo` takes."""

    out: str = "runs/demo"
    """The run directory; one that was stopped is gone on with."""
    overwrite: bool = False
    """Start again although a run is there."""
    json: bool = False
    """Print the evaluation as one JSON object on stdout."""
    quiet: bool = False
    """No progress."""


def run(argv: Sequence[str]) -> int:
    """Train, evaluate, write the report; whatever is there already is not done again."""
    asked = parse(
        Demo,
        argv,
        None,
        prog="crosslens demo",
        description="Train a cross-layer crosscoder on SmolLM2-135M, judge it, write its report.",
    )
    started = time.monotonic()
    folder = Path(asked.out)
    if (folder / "run.json").is_file() and not asked.overwrite:
        made = open_run(folder)
    else:
        made = create_run(folder, CONFIG, overwrite=asked.overwrite)
    with Stages(asked.quiet or asked.json, CONFIG.fit.batch) as stages:
        models = open_models(made.config())
        if not made.finished:
            train(made, models, stages)
        found = evaluate_run(made, models, 8192, stages)
        built = build(made, models, progress=lambda done, total: stages("look", done, total))
    if asked.json:
        print_json({"run": str(folder), "report": str(built.report), **found})
    else:
        print(f"{table(found)}\n")
        print(f"✓ {folder}   {duration(time.monotonic() - started)}")
        print(f"  report: {built.report}\n  next:   crosslens show {folder} LATENT")
    return 0

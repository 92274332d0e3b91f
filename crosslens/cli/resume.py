"""`crosslens resume RUN`: go on with a training that was stopped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from crosslens.cli.arguments import parse
from crosslens.cli.console import print_json
from crosslens.cli.stages import Stages
from crosslens.cli.train import tell
from crosslens.training import open_models, open_run, train


@dataclass(frozen=True, kw_only=True)
class Resume:
    """What `resume` takes."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    json: bool = False
    """Print the summary as one JSON object on stdout."""
    quiet: bool = False
    """No progress."""


def run(argv: Sequence[str]) -> int:
    """Weights, data order and random numbers go on as if the run had never stopped."""
    asked = parse(
        Resume,
        argv,
        None,
        prog="crosslens resume",
        description="Go on with a training exactly where its newest checkpoint is.",
    )
    stopped = open_run(Path(asked.run))
    if stopped.finished:
        print(f"{stopped.folder} has finished already; nothing to do.", file=sys.stderr)
        if asked.json:
            print_json({"run": str(stopped.folder), **stopped.summary()})
        return 0
    config = stopped.config()
    with Stages(asked.quiet or asked.json, config.fit.batch) as stages:
        summary = train(stopped, open_models(config), stages)
    tell(stopped, summary, as_json=asked.json)
    return 0

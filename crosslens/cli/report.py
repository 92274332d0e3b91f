"""`crosslens report RUN`: look at the latents and write report.html."""

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
from crosslens.explore import build, store_folder
from crosslens.explore.build import TOKENS
from crosslens.training import open_run


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `report` takes."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    tokens: int = TOKENS
    """Tokens to look at: held-out ones first, then those trained on."""
    refresh: bool = False
    """Run the models again even if what is stored matches the coder."""
    json: bool = False
    """Print one JSON object on stdout."""
    quiet: bool = False
    """No progress."""


def run(argv: Sequence[str]) -> int:
    """Gather the latents into RUN/store, unless that was done, and write RUN/report.html."""
    asked = parse(
        Report,
        argv,
        None,
        prog="crosslens report",
        description="Look at a run's latents and write its report.html, one self-contained file.",
    )
    made = open_run(Path(asked.run))
    with Stages(asked.quiet or asked.json) as stages:
        built = build(
            made,
            tokens=asked.tokens,
            progress=lambda done, total: stages("read latents", done, total),
            refresh=asked.refresh,
        )
    for why in built.left_out:
        print(f"left out: {why}", file=sys.stderr)
    alive = len(built.store.alive_L)
    if asked.json:
        facts = {"latents": built.store.n_latents, "alive": alive, "gathered": built.gathered}
        tokens = built.store.manifest.tokens
        paths = {"report": str(built.report), "store": str(store_folder(made))}
        print_json({**paths, "tokens": tokens, **facts})
    else:
        print(f"{built.report}   {alive} of {built.store.n_latents} latents alive")
    return 0

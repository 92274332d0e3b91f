"""`crosslens show RUN LATENT`: one latent in the terminal."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from crosslens.cli.arguments import parse
from crosslens.cli.console import print_json
from crosslens.errors import CrosslensError, UsageError
from crosslens.explore import LatentStore, store_folder
from crosslens.explore.terminal import Style, described, plain
from crosslens.training import Run, open_run

NARROWEST, WIDEST = 60, 160
"""Columns of a line; what the terminal has, within these."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """What `show` takes."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    latent: Annotated[int, tyro.conf.Positional]
    """The latent's number."""
    examples: int = 12
    """Strongest examples shown, at most; each interval of activation shows a third as many."""
    color: bool = True
    """Colour, where stdout is a terminal and NO_COLOR is not set."""
    json: bool = False
    """Print one JSON object on stdout."""


def run(argv: Sequence[str]) -> int:
    """Print the latent's figures, decoder norms, examples and direct logits."""
    asked = parse(
        Show,
        argv,
        None,
        prog="crosslens show",
        description="Show one latent: figures, decoder norms, examples, direct logits.",
    )
    if asked.examples < 0:
        raise UsageError(f"--examples must not be negative, found {asked.examples}.")
    store = _opened(open_run(Path(asked.run)))
    if asked.json:
        print_json(plain(store, asked.latent, asked.examples))
    else:
        style = terminal_style(asked.color and sys.stdout.isatty(), os.environ)
        print(described(store, asked.latent, asked.examples, style), end="")
    return 0


def terminal_style(wanted: bool, environment: Mapping[str, str]) -> Style:
    """Colour if wanted and not forbidden; COLORFGBG tells some light backgrounds from dark."""
    color = wanted and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
    ground = environment.get("COLORFGBG", "").rpartition(";")[2]
    columns = shutil.get_terminal_size().columns
    width = min(max(columns, NARROWEST), WIDEST)
    return Style(color=color, light=ground in ("7", "15"), width=width)


def _opened(made: Run) -> LatentStore:
    folder = store_folder(made)
    if not (folder / "manifest.json").is_file():
        raise CrosslensError(
            f"{made.folder} has no latents gathered yet: `crosslens report {made.folder}` does it."
        )
    store = LatentStore.load(folder)
    then, now = store.manifest.provenance.get("step"), made.summary().get("steps")
    if then != now:
        print(
            f"These latents are of step {then}, the coder is of step {now}: "
            f"`crosslens report {made.folder}` looks again.",
            file=sys.stderr,
        )
    return store

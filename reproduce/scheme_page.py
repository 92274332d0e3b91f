"""The comparison as a page, a JSON file and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosslens.storage import save_json

Result = Mapping[str, Any]

NOTES = "## What surprised"
"""From this heading on the page is written by hand, and kept."""

HEAD = (
    "scheme", "FVU ↓", "linear baseline", "L0", "CE recovered ↑", "CE lost, nats ↓", "dead",
    "training, s", "penalty's weight",
)  # fmt: skip

EXPLAINED = {
    "one site": "An SAE at the middle layer's residual stream.",
    "three layers": "One dictionary for the residual stream at three layers. "
    "`layer_conditioned_sae` codes one site at a time, so its L0 is per token and site.",
    "MLPs": "From an MLP's input to its output: `skip_transcoder` at the middle layer, the "
    "cross-layer ones at all three. L0 counts all layers together.",
    "two models": "The middle layer of both models. `diff_sae` sees only their difference, and "
    "its FVU is of that difference, and what is spliced is the first model's activation plus it.",
}


def write_page(folder: Path, results: Sequence[Result], facts: Mapping[str, Any]) -> None:
    """`schemes.md`, `schemes.json`, and `schemes.svg` where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "schemes.md"
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    notes = old[old.index(NOTES) :] if NOTES in old else f"{NOTES}\n\nNot written yet.\n"
    save_json(folder / "schemes.json", {"facts": facts, "schemes": [_bare(r) for r in results]})
    drawn = _draw(folder / "schemes.svg", [r for r in results if "fvu" in r])
    lines = [*_opening(facts), *(["![The same figures](schemes.svg)", ""] if drawn else [])]
    for family, told in EXPLAINED.items():
        mine = [r for r in results if r["family"] == family]
        if mine:
            lines += [f"## {family[0].upper()}{family[1:]}", "", told, "", *_table(mine), ""]
    page.write_text("\n".join([*lines, notes]), encoding="utf-8")


def _bare(result: Result) -> dict[str, Any]:
    """Without the whole configuration, which the recipe and the command give."""
    return {k: v for k, v in result.items() if k != "key"}


def _opening(facts: Mapping[str, Any]) -> list[str]:
    base, losses = facts["models"]["base"], facts["finetune"]["losses"]
    rows = facts["rows"]
    first = sum(losses[:5]) / len(losses[:5])
    last = sum(losses[-5:]) / len(losses[-5:])
    return [
        "# Every scheme on one harvest",
        "",
        f"Made by `{facts['command']}` with torch {facts['machine']['torch']} on "
        f"{facts['machine']['threads']} thread(s) ({facts['machine']['cpu']}). Per-site figures, "
        "the splice of each site and the training curves are in [schemes.json](schemes.json).",
        "",
        f"- Model: `{base['path']}` ({base['architecture']}, {base['n_layers']} layers of "
        f"{base['d_model']}, {base['dtype']}), layers {', '.join(map(str, facts['layers']))}. "
        f"Text: four fifths Python source, one fifth chat about it; {rows['train']:,} training "
        f"rows and {rows['heldout']:,} held-out rows from other documents, harvested once "
        f"({facts['harvest_tokens_per_s']:.0f} tokens/s through both models).",
        "- The second model is a LoRA fine-tune of the first that the script makes itself "
        f"({len(losses)} steps on chat rows; loss {first:.2f} → {last:.2f}), since no hub could be "
        "reached: the two-model figures are of a narrow fine-tune, not of a chat model.",
        f"- Each scheme is its recipe with {facts['latents']} latents, "
        f"{facts['steps']} steps of {facts['batch']} rows in the same order, an aim of "
        f"L0 = {facts['l0']}, and Adam's rate at {facts['adam_lr']:g} (published rates "
        "are for far longer runs). Wiring, activation, terms, start and kind of optimiser are the "
        "recipe's. Where a penalty and no k sets L0, it is searched by whole trainings, and the "
        "one nearest the aim is shown, with its own time.",
        "- FVU: squared error over variance on all held-out rows, each site weighted by its scale; "
        "± one standard error over eight parts of the text. Linear baseline: the FVU of as many "
        "principal components as L0, or of least squares where input and output differ. "
        "CE recovered: the share of the loss from mean ablation that the reconstruction saves, "
        f"mean over sites spliced one at a time, {facts['splice_tokens']} held-out positions. "
        "Dead: latents that fired on no held-out row.",
        "- This is a short run: it ranks schemes by how fast they learn from "
        f"{facts['steps'] * facts['batch']:,} rows, not by where they end. Families do not compare "
        "with each other.",
        "",
    ]


def _table(results: Sequence[Result]) -> list[str]:
    rows = [HEAD, ("---",) + ("---:",) * (len(HEAD) - 1), *map(_row, results)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _row(result: Result) -> tuple[str, ...]:
    name = f"`{result['name']}`"
    if "diverged" in result:
        return (name, "diverged") + ("",) * (len(HEAD) - 2)
    tried = result["tried"]
    weight = f"{result['penalty']} {tried[-1]['weight']:.2g}" if tried else "none"
    return (
        name,
        f"{result['fvu']:.3f} ± {result['fvu_error']:.3f}",
        f"{result['baseline']['fvu']:.3f}",
        f"{result['l0']:.1f}",
        f"{result['ce_recovered']:.3f}",
        f"{result['ce_lost']:.3f}",
        f"{result['dead']:.1%}",
        f"{result['seconds']:.0f}",
        weight,
    )


PANELS = (
    ("fvu", "FVU"),
    ("ce_recovered", "CE recovered"),
    ("dead", "dead share"),
    ("seconds", "training, s"),
)


def _draw(file: Path, results: Sequence[Result]) -> bool:
    """Four panels of dots, families apart; False where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: the plot is left out (pip install 'crosslens[repro]')")
        return False
    if not results:
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "crosslens", "svg.fonttype": "none", "font.size": 8}
    places = _places(results)
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, 4, figsize=(10, 0.24 * max(places) + 1.2), sharey=True)
        for axis, (key, title) in zip(axes, PANELS, strict=True):
            _panel(axis, results, places, key, title)
        axes[0].set_yticks(places, [r["name"] for r in results])
        axes[0].invert_yaxis()
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
    return True


def _places(results: Sequence[Result]) -> list[float]:
    """A line for each scheme, with a gap between families."""
    found, y = [], 0.0
    for before, result in zip([None, *results], results, strict=False):
        y += 1.0 if before is None or before["family"] == result["family"] else 1.8
        found.append(y)
    return found


def _panel(axis: Any, results: Sequence[Result], places: list[float], key: str, title: str) -> None:
    axis.set_title(title)
    axis.grid(axis="x", color="0.9")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    values = [max(r[key], 0.0) for r in results]
    limits = {"fvu": 1.1, "seconds": 1.05 * max(values)}
    limit = limits.get(key, 1.02)
    # What lies beyond an axis is shown at its edge; the table has the figure.
    axis.scatter([min(v, limit) for v in values], places, s=22, color="#2f6db3", zorder=3)
    axis.set_xlim(0, limit)
    if key == "fvu":
        base = [min(r["baseline"]["fvu"], limit) for r in results]
        axis.scatter(base, places, s=22, facecolors="none", edgecolors="0.5", zorder=2)
        axis.set_xlabel("open: linear baseline")

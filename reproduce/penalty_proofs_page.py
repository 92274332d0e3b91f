"""The sweep as a page, a JSON file and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosslens.storage import save_json
from reproduce.penalty_proofs_plot import draw
from reproduce.penalty_proofs_summary import summary

Figures = Mapping[str, Any]
Column = tuple[str, str, int]
"""Heading, figure, digits."""

NOTES = "## What came out"
"""From this heading on the page is written by hand, and kept."""

FAMILIES = {"none": "–", "exact": "exact", "paper": "paper", "learnt": "exact, bias learnt"}

CODERS: tuple[Column, ...] = (
    ("FVU", "fvu", 4),
    ("at the MLP", "fvu_mid", 4),
    ("at the last site", "fvu_last", 4),
    ("L0", "l0", 2),
    ("interaction", "interaction", 4),
    ("Σ abs y", "size", 3),
    ("‖bias‖", "bias", 2),
)
LOSSES: tuple[Column, ...] = (
    ("20 %", "loss 0.2", 3),
    ("35 %", "loss 0.35", 3),
    ("50 %", "loss 0.5", 3),
    ("regions, 16 (44 %)", "regions 16", 3),
    ("regions, 8 (68 %)", "regions 8", 3),
    ("codes", "loss codes", 2),
    ("additive", "loss additive", 2),
    ("pairs", "loss pairs", 2),
)
TERMS: tuple[Column, ...] = (
    ("propagation", "term additive propagation", 0),
    ("interaction, additive", "term additive interaction", 2),
    ("interaction, pairs", "term pairs interaction", 1),
    ("transition, additive", "term additive transition", 2),
    ("decoded model's loss", "decoded true", 3),
    ("≤, additive/exact", "decoded additive/exact", 2),
    ("≤, additive/neurons", "decoded additive/neurons", 2),
)
LOCAL: tuple[Column, ...] = (
    ("additive/exact", "local additive/exact", 3),
    ("additive/neurons", "local additive/neurons", 2),
    ("additive/sizes", "local additive/sizes", 1),
    ("additive/pairs", "local additive/pairs", 1),
    ("given bias/exact", "local given bias/exact", 3),
    ("given bias/neurons", "local given bias/neurons", 2),
    ("linear/exact", "local linear/exact", 3),
    ("linear/neurons", "local linear/neurons", 2),
    ("mixed, 30 %", "local mixed linear/30 %", 2),
    ("f(x) − f(x̂), true", "true transition/ball", 3),
    ("f(x) − additive, true", "whole additive", 3),
    ("f(x) − linear, true", "whole linear", 3),
)
MATCHED: tuple[Column, ...] = (
    ("interaction", "interaction", 4),
    ("loss, 20 %", "loss 0.2", 3),
    ("35 %", "loss 0.35", 3),
    ("50 %", "loss 0.5", 3),
    ("regions, 8", "regions 8", 3),
    ("term, additive", "term additive interaction", 2),
    ("term, pairs", "term pairs interaction", 1),
    ("additive/exact", "local additive/exact", 3),
    ("additive/neurons", "local additive/neurons", 2),
    ("linear/exact", "local linear/exact", 3),
    ("linear/neurons", "local linear/neurons", 3),
    ("f(x) − additive, true", "whole additive", 3),
    ("f(x) − linear, true", "whole linear", 3),
    ("decoded ≤, additive/exact", "decoded additive/exact", 2),
)


def write_page(folder: Path, results: Sequence[Figures], facts: Figures) -> None:
    """`penalty_proofs.md`, `.json`, and `.svg` where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "penalty_proofs.md"
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    notes = old[old.index(NOTES) :] if NOTES in old else f"{NOTES}\n\nNot written yet.\n"
    rows = summary(results)
    save_json(folder / "penalty_proofs.json", {"facts": facts, "points": results})
    drawn = bool(rows) and draw(folder / "penalty_proofs.svg", rows)
    lines = [*_opening(facts, results), *(["![The same](penalty_proofs.svg)", ""] if drawn else [])]
    for title, told, columns in _parts(facts):
        lines += [f"## {title}", "", told, "", *_table(rows, columns, "figures"), ""]
    lines += [*_beside(rows), notes]
    page.write_text("\n".join(lines), encoding="utf-8")


def _opening(facts: Figures, results: Sequence[Figures]) -> list[str]:
    machine, sizes, (done, of) = facts["machine"], facts["sizes"], facts["done"]
    coder, (accepted, checked) = sizes["coder"], _checked(results)
    unfinished = [
        f"**Unfinished: {done} of {of} crosscoders.** The same command goes on from there.",
        "",
    ]
    return [
        "# Does an interaction penalty buy shorter proofs?",
        "",
        *(unfinished if done < of else []),
        f"Made by `{facts['command']}` with torch {machine['torch']} on {machine['threads']} "
        f"thread(s) ({machine['cpu']}). Every crosscoder is in "
        "[penalty_proofs.json](penalty_proofs.json).",
        "",
        f"- Model: that of `crosslens prove small-lm` ({sizes['layers']} layer, "
        f"{sizes['vocabulary']} tokens, width {sizes['width']}, {sizes['neurons']} neurons, "
        f"{sizes['sequences']} held-out windows of {sizes['length']} tokens), trained once; its "
        f"loss is {facts['loss']:.4f}. Of brute force's {facts['flops_brute']:.3g} flops the MLP "
        f"takes {facts['mlp_share']:.1%}, the readout {facts['readout_share']:.1%}.",
        f"- Crosscoders: TopK, {coder['features']} latents over all sites, {coder['steps']} steps "
        f"of {coder['rows']} rows, the decoder's bias left at the rows' mean except where it says "
        "*learnt*. The penalty stands at the MLP's input, its weight beside an FVU.",
        "- Interaction: the penalty's exact form on the held-out windows, all neurons, in [0, 1]. "
        "Σ abs y: mean size of latents' contributions to a neuron, which shrinking lowers.",
        "- ± is the standard deviation over seeds of the crosscoder and its regions.",
        f"- Certificates that the checker accepted: {accepted} of {checked}.",
        "",
    ]


def _checked(results: Sequence[Figures]) -> tuple[int, int]:
    """How many certificates were accepted, of how many."""
    parts = [
        *(each for r in results for each in (*r["budgets"].values(), *r["recursion"].values())),
        *(each for r in results for each in r["local"]["tiers"].values()),
    ]
    told = [part["checked"] for part in parts if "checked" in part]
    return sum(told), len(told)


def _parts(facts: Figures) -> list[tuple[str, str, tuple[Column, ...]]]:
    return [
        ("Crosscoders", "What was trained.", CODERS),
        (
            "The model's loss, certified",
            "Mixtures within three budgets of brute force's flops, the tier regions by contexts in "
            "a region, and the recursion's three tiers (18, 19 and 23 %); nats.",
            LOSSES,
        ),
        (
            "Where interaction is a term of its own",
            "Of the recursion's last step, mean norms, regions' codes. Then the loss of the "
            "decoded model (x̂ for what the MLP reads), and what is known of it with the MLP as "
            "the sum of single latents' effects and each row's bound on what they miss the only "
            f"error: by the lemmas, on {facts['local_rows']:,} positions, no certificate.",
            TERMS,
        ),
        (
            "The MLP alone",
            "Layer-local bounds on mean ‖f(x̂) − surrogate‖ over the mean ‖f(x̂)‖, "
            f"{facts['local_rows']:,} positions, tokens' own codes; what a tier costs is the same "
            "for all crosscoders with as many active latents. The last three are true values over "
            "the same ‖f(x̂)‖.",
            LOCAL,
        ),
    ]


def _beside(rows: Sequence[Figures]) -> list[str]:
    penalised = [row for row in rows if row["matched"]]
    if not penalised:
        return []
    return [
        "## At matched reconstruction",
        "",
        "Less what no penalty gives at the same FVU, at the last site for the model's loss and at "
        "the MLP's for the rest, on lines between its own numbers of active latents, seed by seed: "
        "below 0 the penalty proves more. – where none is as good or as bad.",
        "",
        *_table(penalised, MATCHED, "matched"),
        "",
    ]


def _table(rows: Sequence[Figures], columns: Sequence[Column], which: str) -> list[str]:
    lines = [
        ["form", "weight", "active", *(heading for heading, _, _ in columns)],
        ["---", *["---:"] * (2 + len(columns))],
    ]
    for row in rows:
        cells = [_told(row[which].get(name), digits, which) for _, name, digits in columns]
        lines.append([FAMILIES[row["family"]], f"{row['weight']:g}", str(row["active"]), *cells])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _told(value: Figures | None, digits: int, which: str) -> str:
    if value is None:
        return "–"
    sign = "+" if which == "matched" else ""
    return f"{value['mean']:{sign}.{digits}f} ± {value['sd']:.{digits}f}"

"""The replication as a page, a JSON file and a plot: theirs, ours, and where nothing differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosslens.storage import save_json
from reproduce.kissane_judging import RULE
from reproduce.kissane_plot import draw

Figures = Mapping[str, Any]

NOTES = "## What surprised"
"""From this heading on the page is written by hand, and kept."""

TITLES = {
    "published": "their λ and rate",
    "fitted": "λ and rate for a short run",
    "null": "a model against itself",
}
CLASSES = {"only_a": "Only base", "only_b": "Only changed", "shared": "Shared"}

LINES: tuple[tuple[str, str, Callable[[Figures], str]], ...] = (
    ("latents", "16,384", lambda f: f"{f['latents']:,}"),
    ("rows read", "400,000,000", lambda f: f"{f['rows_read']:,}"),
    ("λ", "2", lambda f: f"{f['weight']:.3g}"),
    ("learning rate", "5e-05", lambda f: f"{f['lr']:.3g}"),
    ("L0", "≈ 81", lambda f: f"{f['l0']:.1f}"),
    (
        "explained variance, mean of ratios",
        "≈ 77 % (mean of both)",
        lambda f: _each(f, lambda m: f"{_percent(m['explained_variance'])}"),
    ),
    (
        "explained variance, ratio of variances",
        "not told",
        lambda f: _each(f, lambda m: _percent(1 - m["fvu"])),
    ),
    (
        "CE recovered",
        "not to be read any more",
        lambda f: _each(f, lambda m: _percent(m["ce_recovered"])),
    ),
    (
        "CE: clean, spliced, site at zero (nats)",
        "not to be read any more",
        lambda f: _each(f, lambda m: _nats(m)),
    ),
    ("only base, r < .3", "≈ 60", lambda f: _count(f, "only_a")),
    ("only changed, r > .7", "≈ 225", lambda f: _count(f, "only_b")),
    ("shared, .3 < r < .7", "the rest", lambda f: _count(f, "shared")),
    ("of 1,000 alive: only base, only changed", "≈ 4, ≈ 14", lambda f: _thousand(f)),
    ("dead (active on no held-out token)", "not told", lambda f: _count(f, "dead")),
    (
        "cosine of shared: median; above .9; below 0",
        "“vast majority highly aligned”",
        lambda f: _cosine(f["shared_cosine"]),
    ),
)
"""What is told, theirs, and how to tell ours."""


def write_page(folder: Path, columns: Mapping[str, Figures], facts: Figures) -> None:
    """`kissane.md`, `kissane.json`, and `kissane.svg` where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "kissane.md"
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    notes = old[old.index(NOTES) :] if NOTES in old else f"{NOTES}\n\nNot written yet.\n"
    main = "fitted" if "fitted" in columns else "published"
    save_json(folder / "kissane.json", {"facts": facts, "columns": columns})
    shown = {TITLES[name]: columns[name] for name in (main, "null")}
    drawn = draw(folder / "kissane.svg", shown)
    parts = [
        _opening(facts, columns[main]),
        _table(columns),
        ["![Histograms of relative norms and of cosines](kissane.svg)", ""] if drawn else [],
        _bins(columns[main], columns["null"]),
        _scale(facts, columns[main]),
        _latents(columns[main]),
    ]
    lines = [line for part in parts for line in part]
    page.write_text("\n".join([*lines, notes]), encoding="utf-8")


def _opening(facts: Figures, main: Figures) -> list[str]:
    machine, (base, changed) = facts["machine"], facts["models"].values()
    texts = ", ".join(
        f"`{name}` {each['train_tokens']:,}" for name, each in facts["corpora"].items()
    )
    first, second = main["models"].values()
    adapter = f" with the adapter `{changed['adapter']}`" if changed["adapter"] else ""
    lines = [
        "# A crosscoder of two models, after Kissane et al.",
        "",
        "Their post, “Open source replication of Anthropic's crosscoder paper for model-diffing” "
        "(2024), trains an L1 crosscoder on Gemma 2 2B base and chat. Here is the same procedure, "
        f"made by `{facts['command']}` with torch {machine['torch']} on {machine['threads']} "
        f"thread(s) ({machine['cpu']}). All figures and histograms are in "
        "[kissane.json](kissane.json).",
        "",
        f"- Models: `{base['path']}` ({base['architecture']}, {base['n_layers']} layers of "
        f"{base['d_model']}, {base['dtype']}), and `{changed['path']}`{adapter}. Training tokens "
        f"by corpus: {texts}.",
        "- Kept from them: the loss Σ‖e‖² + λ·Σ f·(‖d_base‖ + ‖d_changed‖), λ's rise over the "
        "first 5 % of the steps, ReLU, decoders drawn at norm 0.08 and encoders their transpose, "
        "Adam (.9, .999) without warm-up, decay over the last 20 %, clipping at 1, rows scaled to "
        "a mean norm of √d in each model, BOS left out, no treatment of dead latents, half plain "
        "text and half chat as `User:`/`Assistant:` lines.",
        f"- Figures are of {main['tokens']:,} held-out tokens from other documents; CE is of the "
        f"first {facts['splice_tokens']:,} of them (theirs: 40 sequences of 1,024). Clean CE "
        f"{first['ce']:.2f} and {second['ce']:.2f} nats. Where a figure is of each model, base "
        "stands first.",
        "- Explained variance: mean over tokens of 1 − ‖e‖²/‖x − x̄‖² as they have it, and the "
        "ratio of variances, 1 − Σ‖e‖²/Σ‖x − x̄‖². CE recovered: 1 − (CE spliced − CE) / "
        "(CE zero − CE), one model at a time, BOS left as it is in the splice and at zero in the "
        "ablation, as they have it.",
    ]
    return [*lines, *_search(facts, main), ""]


def _search(facts: Figures, main: Figures) -> list[str]:
    if "tried" not in main:
        return []
    tried = ", ".join(f"{each['weight']:.3g} → {each['l0']:.1f}" for each in main["tried"])
    return [
        f"- λ was searched by whole trainings for an L0 of {facts['aim']}, the share of the "
        f"latents that 81 is of 16,384, from their λ of 2 on. λ → L0: {tried}."
    ]


def _table(columns: Mapping[str, Figures]) -> list[str]:
    head = ["", "Kissane et al.", *(TITLES[name] for name in columns)]
    rows = [
        [what, theirs, *(told(each) for each in columns.values())] for what, theirs, told in LINES
    ]
    return [
        "## Theirs and ours",
        "",
        *_rows([head, *rows]),
        "",
        "Their counts are to be read as orders of magnitude: the published training code refills "
        "its buffer wrongly and, at its default size, reads 512 sequences (523,776 tokens) about "
        "763 times (issue 2 of its repository, still open); whether the published weights were "
        "trained so is not known. Their L0 and explained variance are of one batch of 4,096 rows. "
        "A count without its null says little: the last column is the same training where no "
        "latent can be of one model only except by chance.",
        "",
    ]


def _bins(main: Figures, null: Figures) -> list[str]:
    """Every published convention on the same coder."""
    rows = [
        ["convention", "only base", "only changed", "shared", "null: only base", "only changed"]
    ]
    names = {
        "kissane": "r < .3, r > .7 (Kissane et al.)",
        "minder": "Δ < .1, Δ > .9 (Minder et al.)",
        "anthropic": "r < .05, r > .95 (Anthropic)",
    }
    for name, title in names.items():
        ours, nothing = main["conventions"][name], null["conventions"][name]
        shown = [_interval(ours, key) for key in CLASSES]
        rows.append([title, *shown, str(nothing["only_a"]), str(nothing["only_b"])])
    scaling = [str(_known(each["by_scaling"])) for each in (main, null)]
    rows.append(["latent scaling, ν_ε < .2 and ν_r < .5", "–", scaling[0], "–", "–", scaling[1]])
    return [
        "## The same coder in every published convention",
        "",
        *_rows(rows),
        "",
        "With 95 % intervals over latents. Decoders still at the norm they began with: "
        f"{main['near_start']} (null: {null['near_start']}).",
        "",
    ]


def _scale(facts: Figures, main: Figures) -> list[str]:
    latents, rows = main["latents"], main["rows_read"]
    if not facts["changes"]:
        return ["## What scale explains", "", "Nothing was scaled.", ""]
    changed = [[c["what"], c["theirs"], c["ours"], c["why"]] for c in facts["changes"]]
    factor = (facts["width"] / 2304) ** 0.5
    return [
        "## What scale explains",
        "",
        *_rows([["changed", "theirs", "ours", "why"], *changed]),
        "",
        f"- **Rows per latent**: {rows / latents:,.0f} here, {400e6 / 16384:,.0f} there, and "
        f"{facts['steps']:,} steps instead of 97,656. Whatever takes long to learn (rare "
        "latents, decoders shrinking to 0 in one model, dead latents coming back) is not over.",
        f"- **λ**: the error grows with d and the penalty with √d, so λ = 2 weighs "
        f"{1 / factor:.1f} times as much against it at d = {facts['width']} as at 2,304; yet a "
        "short run needs a larger one to be as sparse in the end, for the codes begin dense.",
        f"- **Counts**: the same shares of {latents:,} latents as theirs would be about "
        f"{60 * latents / 16384:.0f} only base and {225 * latents / 16384:.0f} only changed.",
        "- **Not scale**: the pair. Their second model was fine-tuned and aligned at length; ours "
        "is a small LoRA with one behaviour. And the organism learnt it through the chat template, "
        "which the `User:`/`Assistant:` lines are not.",
        "",
    ]


def _latents(main: Figures) -> list[str]:
    lines = ["## Three latents", "", RULE, ""]
    for name, title in CLASSES.items():
        pick = main["picked"].get(name)
        if pick is None:
            lines += [f"### {title}", "", "None is active often enough.", ""]
            continue
        within = "" if pick["in_class"] else " There is no such latent; this is the nearest."
        texts = ", ".join(f"{n} from `{text}`" for text, n in pick["texts"].items())
        lines += [
            f"### {title}: latent {pick['latent']}",
            "",
            f"r = {pick['relative_norm']:.3f}, cosine {pick['cosine']:.3f}, active on "
            f"{pick['density']:.2%} of tokens.{within} Its strongest tokens: {texts}.",
            "",
            "~~~~text",
            *(line.rstrip() for line in pick["told"].rstrip().splitlines()),
            "~~~~",
            "",
        ]
    return lines


def _rows(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, ruler, *body)]


def _each(figures: Figures, told: Callable[[Figures], str]) -> str:
    return ", ".join(told(each) for each in figures["models"].values())


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _nats(model: Figures) -> str:
    return f"{model['ce']:.2f} → {model['ce_spliced']:.2f} of {model['ce_zero']:.2f}"


def _count(figures: Figures, name: str) -> str:
    return _interval(figures["conventions"]["kissane"], name)


def _interval(counts: Figures, name: str) -> str:
    low, high = counts["interval"][name]
    return f"{counts[name]:,} ({low:.0f}–{high:.0f})"


def _thousand(figures: Figures) -> str:
    counts = figures["conventions"]["kissane"]
    alive = max(1, figures["latents"] - counts["dead"])
    return ", ".join(f"{1000 * counts[name] / alive:.1f}" for name in ("only_a", "only_b"))


def _cosine(found: Figures) -> str:
    if found["median"] is None:
        return "–"
    return f"{found['median']:.3f}; {_percent(found['above_0.9'])}; {_percent(found['below_0'])}"


def _known(value: int | None) -> str:
    return "–" if value is None else str(value)

"""`crosslens diff RUN`: what differs between two models, beside its nulls."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from crosslens.cli.arguments import parse
from crosslens.cli.console import number, print_json
from crosslens.cli.stages import Stages
from crosslens.diffing.analysis import diff
from crosslens.diffing.contest import parse_baselines
from crosslens.diffing.nulls import parse_nulls
from crosslens.diffing.study import DiffPlan
from crosslens.explore import rewrite
from crosslens.training import open_run

CLASSES = ("only_a", "only_b", "shared", "other", "dead")


@dataclass(frozen=True, kw_only=True)
class Diff:
    """What `diff` takes."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory, of a coder over two models or more."""
    a: str | None = None
    """The model counted from; the run's first."""
    b: str | None = None
    """The one that was changed; the run's last."""
    tokens: int = 60_000
    """Held-out tokens, then training ones, that the measures rest on."""
    causal_tokens: int = 8192
    """Positions for causal checks and the clean loss; 0 leaves both out."""
    planted: str | None = None
    """The behaviour planted in the changed model, where its adapter does not say; `none`: none."""
    prompts: int = 40
    """Requests of each kind by which a planted behaviour is looked for."""
    nulls: str = "self,noop,shuffled"
    """Trainings that counts are told beside, each made once, in RUN/diff/nulls; `none`: none."""
    noop: str | None = None
    """Adapter of the first model trained on its own text; one is shipped for the built-in model."""
    baselines: str = "mean_difference,pca,token_kl,diff_sae"
    """Other ways to find what differs: these, stagewise, `all` or `none`."""
    seeds: str = ""
    """Runs of the same training with other seeds, separated by commas: which latents recur?"""
    seed: int = 0
    """Of resampling, of prompts, of random sets."""
    json: bool = False
    """Print one JSON object on stdout."""
    quiet: bool = False
    """No progress."""


def run(argv: Sequence[str]) -> int:
    """Measures, nulls, causal checks and baselines; kept in RUN/diff."""
    asked = parse(
        Diff,
        argv,
        None,
        prog="crosslens diff",
        description="Diff the two models of a run, with nulls, intervals and causal checks.",
    )
    plan = DiffPlan(
        a=asked.a,
        b=asked.b,
        tokens=asked.tokens,
        causal_tokens=asked.causal_tokens,
        planted=asked.planted,
        prompts=asked.prompts,
        nulls=parse_nulls(asked.nulls),
        noop=asked.noop,
        baselines=parse_baselines(asked.baselines),
        seeds=tuple(Path(name.strip()) for name in asked.seeds.split(",") if name.strip()),
        seed=asked.seed,
    )
    compared = open_run(Path(asked.run))
    with Stages(asked.quiet or asked.json) as stages:
        found = diff(compared, plan, stages)
    if found["pair"]["same_weights"]:
        print(
            f"{found['pair']['a']} and {found['pair']['b']} compute the same: all that follows is "
            "a null.",
            file=sys.stderr,
        )
    if asked.json:
        print_json(found)
    else:
        print(table(found))
        print(f"\n✓ {compared.folder / 'diff'}   latents.parquet, latents.csv, diff.json")
    report = rewrite(compared)
    if not asked.json:
        print(
            f"✓ {report}   with the diff"
            if report
            else f"  crosslens report {compared.folder}   shows it with examples of the latents"
        )
    return 0


def table(found: Mapping[str, Any]) -> str:
    """The figures for people."""
    pair = found["pair"]
    parts = [
        f"{pair['a']} → {pair['b']} at {', '.join(pair['sites'])} · {number(found['tokens'])} "
        f"tokens · L0 {found['l0']:.1f} · FVU "
        + " · ".join(f"{name} {_three(value)}" for name, value in found["fvu"].items()),
        _classes(found),
        _causal(found),
        _planted(found),
        _timeline(found),
        _seeds(found),
        _baselines(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _classes(found: Mapping[str, Any]) -> str:
    """A line for the pair and for each null: a count means little without them."""
    rows = {"pair": found, **{f"null: {name}": each for name, each in found["null"].items()}}
    lines = [
        f"{'':<16}" + "".join(f"{name:>9}" for name in (*CLASSES, "used a", "used b", "scaling"))
    ]
    for name, each in rows.items():
        counts = [each["classes"][key] for key in CLASSES]
        used = [each["exclusive"][key] for key in ("only_a", "only_b")]
        told = [*counts, *used, each["by_scaling"]]
        lines.append(f"{name:<16}" + "".join(f"{'–' if n is None else n:>9}" for n in told))
    if not found["null"]:
        lines.append("no null was asked for: these counts have nothing to stand beside")
    return "\n".join(lines)


def _causal(found: Mapping[str, Any]) -> str:
    causal = found["causal"]
    if causal is None:
        return ""
    return (
        f"KL to {found['pair']['b']}, nats: {found['pair']['a']}'s activations "
        f"{causal['kl_baseline']:.4f} · + top half {causal['kl_top_half']:.4f} · + bottom half "
        f"{causal['kl_bottom_half']:.4f} · + all {causal['kl_full']:.4f}"
    )


def _planted(found: Mapping[str, Any]) -> str:
    planted = found["planted"]
    if planted is None:
        return ""
    lines = [f"planted: {planted['behaviour']}"]
    if "auroc" in planted and not planted["top"]:
        b = found["pair"]["b"]
        lines.append(f"  no latent in use has a longer decoder in {b}: nothing to find it by")
    elif "auroc" in planted:
        low, high = planted["intervals"]["auroc"]
        controls = planted["controls"]
        lines.append(
            f"  top {len(planted['top'])} as a detector: AUROC {planted['auroc']:.3f} "
            f"({low:.3f}–{high:.3f}); against the same text in the base "
            f"{controls['same_text_base']:.3f}; the base alone sees the trigger at "
            f"{controls['base_sees_trigger']:.3f}"
        )
        lines.append(
            f"  tied to it: {planted['tied']} latents, {100 * planted['precision_at_20']:.0f} % of "
            f"the top {len(planted['top'])}"
        )
    if "ablation" in planted:
        random = [each["rate"] for each in planted["ablation"]["random"]]
        lines.append(
            f"  rate {planted['behaviour_rate_before']:.2f} → {planted['after_ablation']:.2f} "
            f"without them (random sets {min(random):.2f}–{max(random):.2f}); clean loss "
            f"{100 * planted['clean_loss_change']:+.2f} %"
        )
    if "carried" in planted:
        through, a, b = planted["carried"], found["pair"]["a"], found["pair"]["b"]
        lines.append(
            f"  rate with whole activations exchanged at {', '.join(through['sites'])}: {b} with "
            f"{a}'s {through['b_with_a']:.2f}, {a} with {b}'s {through['a_with_b']:.2f}"
        )
    return "\n".join(lines)


def _timeline(found: Mapping[str, Any]) -> str:
    """A line for each model after the first: births and deaths, beside those of the nulls."""
    if found["timeline"] is None:
        return ""
    sides = {"": found, **{f"null: {name} ": each for name, each in found["null"].items()}}
    courses = {
        name: each["timeline"]["checkpoints"] for name, each in sides.items() if each["timeline"]
    }
    first, *later = courses[""]
    heads = [f"{name}{what}" for name in courses for what in ("born", "gone")]
    lines = [
        f"through the models from {first['model']}, which has {first['present']:,} latents in use",
        f"  {'':<16}{'present':>9}{'cosine':>8}" + "".join(f"  {head:>6}" for head in heads),
    ]
    for m, each in enumerate(later, 1):
        turned = "–" if each["turned"] is None else f"{each['turned']['mean_cosine']:.3f}"
        ends = [side[m][what] for side in courses.values() for what in ("births", "deaths")]
        told = "".join(f"  {n:>{max(6, len(h))}}" for n, h in zip(ends, heads, strict=True))
        lines.append(f"  {each['model']:<16}{each['present']:>9,}{turned:>8}{told}")
    return "\n".join(lines)


def _seeds(found: Mapping[str, Any]) -> str:
    """In how many other runs the exclusive latents come again, beside what chance would give."""
    stability = found["stability"]
    if stability is None:
        return ""
    others = stability["runs"] - 1
    heads = "".join(f"{f'in {k}':>9}" for k in range(stability["runs"]))
    title = f"exclusive again in {others} other run{'s' if others > 1 else ''}"
    lines = [f"{title:<32}{heads}"]
    for kind, each in stability["recurrence"].items():
        counts = "".join(f"{n:>9}" for n in each["counts"])
        chance = "".join(f"{n:>9.2f}" for n in each["random_labels"])
        named = f"  {kind}, {each['exclusive']} in use"
        lines += [f"{named:<32}{counts}", f"{'    with labels dealt at random':<32}{chance}"]
    return "\n".join(lines)


def _baselines(found: Mapping[str, Any]) -> str:
    lines = []
    for name, each in found["baselines"].items():
        if "left_out" in each:
            lines.append(f"  {name:<16} left out: {each['left_out']}")
        elif "auroc" in each:
            lines.append(
                f"  {name:<16} AUROC {each['auroc']:.3f}, against the same text "
                f"{each['auroc_vs_same_text']:.3f}"
            )
        else:
            lines.append(f"  {name:<16} in diff.json")
    return "\n".join(["baselines", *lines]) if lines else ""

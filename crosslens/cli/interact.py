"""`crosslens interact RUN`: how latents interact through the model's nonlinearities."""

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
from crosslens.explore import rewrite
from crosslens.interactions import InteractPlan, interact_run, parse_parts
from crosslens.interactions.pairs.table import Order
from crosslens.training import open_run

SHOWN = 12
"""Triplets, figures and heads that are printed for people."""


@dataclass(frozen=True, kw_only=True)
class Interact:
    """What `interact` takes."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    sites: tuple[str, ...] = ()
    """Sites before an MLP, names or globs; all that the coder writes if not given."""
    model: str | None = None
    """The model whose MLPs and heads are looked at; of a run on several all, and what changed
    between the first and the last, if not given."""
    tokens: int = InteractPlan.tokens
    """Tokens, in whole blocks, that all figures rest on: held-out ones, then those trained on."""
    top: int = InteractPlan.top
    """Pairs that interact.json lists; the tables hold all that were measured."""
    by: Order = InteractPlan.by
    """What pairs are ranked by; product is strength times frequency."""
    parts: str = "all"
    """What is measured, separated by commas: mlp, clusters, effects, attention, screen, changes.
    All but attention bring mlp with them."""
    json: bool = False
    """Print one JSON object on stdout."""
    quiet: bool = False
    """No progress."""


def run(argv: Sequence[str]) -> int:
    """Exact interactions, pairs, kinds, effects, attention; kept in RUN/interact."""
    asked = parse(
        Interact,
        argv,
        None,
        prog="crosslens interact",
        description="How a run's latents interact through the model's MLPs and attention.",
    )
    plan = InteractPlan(
        model=asked.model,
        sites=tuple(name for text in asked.sites for name in text.split(",") if name),
        tokens=asked.tokens,
        top=asked.top,
        by=asked.by,
        parts=parse_parts(asked.parts),
    )
    measured = open_run(Path(asked.run))
    with Stages(asked.quiet or asked.json) as stages:
        found = interact_run(measured, plan, stages)
    for part, why in found["left_out"].items():
        print(f"{part} left out: {why}", file=sys.stderr)
    if asked.json:
        print_json(found)
    else:
        print(table(found))
        print(f"\n✓ {measured.folder / 'interact'}   interact.json, tables as .parquet and .csv")
    report = rewrite(measured)
    if not asked.json:
        print(
            f"✓ {report}   with the interactions"
            if report
            else f"  crosslens report {measured.folder}   shows them with examples of the latents"
        )
    return 0


def table(found: Mapping[str, Any]) -> str:
    """The figures for people."""
    parts = [_sites(found), _pairs(found), _changes(found), _prediction(found), _attention(found)]
    return "\n\n".join(part for part in parts if part)


def _sites(found: Mapping[str, Any]) -> str:
    if not found["sites"]:
        return ""
    wide = max(map(len, found["sites"]))
    lines = [
        f"{number(found['tokens'])} tokens · {number(found['latents'])} latents",
        f"{'':<{wide}} {'interaction':>12} {'of output':>10} {'with error':>11} "
        f"{'norm':>7}   kinds",
    ]
    for site, each in found["sites"].items():
        kinds = sorted(each["by_kind"].items(), key=lambda kind: -kind[1])[:3]
        told = " · ".join(f"{name} {share:.0%}" for name, share in kinds if share >= 0.005)
        lines.append(
            f"{site:<{wide}} {each['interaction_share']:12.1%} {each['output_share']:10.0%} "
            f"{each['error_share']:11.0%} {each['norm_mediated_share']:7.0%}   {told}"
        )
    return "\n".join(lines)


def _pairs(found: Mapping[str, Any]) -> str:
    pairs = found["pairs"]
    if pairs is None:
        return ""
    cover = ", ".join(f"{k} {share:.1%}" for k, share in pairs["coverage"].items())
    lines = [
        f"{number(pairs['measured'])} pairs met; the strongest cover: {cover}",
        f"{'i':>6} {'j':>6}  {'site':<22} {'strength':>9} {'tokens':>7} {'sign':>4}  kind",
    ]
    for each in pairs["top"][:SHOWN]:
        sign = {1: "+", -1: "−"}.get(each["sign"], "·")
        lines.append(
            f"{each['i']:6} {each['j']:6}  {each['site']:<22} {number(each['strength']):>9} "
            f"{each['frequency']:7.1%} {sign:>4}  {each['kind']}"
        )
    return "\n".join(lines)


def _changes(found: Mapping[str, Any]) -> str:
    changes = found["changes"]
    if changes is None:
        return ""
    first, last = found["models"][0], found["models"][-1]
    lines = [
        f"changed most between {first} and {last} (strength × tokens), of "
        f"{number(changes['triplets'])} pairs; {changes['weights_share']:.0%} of it by weights",
        f"{'i':>6}  {'j':>6}   {'site':<22} {'before':>9} {'after':>9} {'tokens':>7}   change, 95 %"
        "   *: its decoders differ",
    ]
    for each in changes["most"][:SHOWN]:
        i, j = (f"{each[k]:6}{'*' if each[k] in each['changed'] else ' '}" for k in "ij")
        before, after = ("–" if x is None else number(x) for x in each["strength"])
        lines.append(
            f"{i} {j}  {each['sites'][-1]:<22} {before:>9} {after:>9} "
            f"{each['frequency'][-1]:7.1%}   {_figure(each['total'], each['total_ci'])}"
        )
    return "\n".join(lines)


def _figure(value: float | None, ends: Sequence[float | None] | None) -> str:
    if value is None:
        return "–"
    low, high = ends or (None, None)
    told = "" if low is None or high is None else f" ({number(low)} to {number(high)})"
    return f"{number(value)}{told}"


def _prediction(found: Mapping[str, Any]) -> str:
    by_metric: dict[str, dict[str, Any]] = {}
    for name, each in found["prediction"].items():
        model, _, metric = name.rpartition("/")
        if each["spearman"] is not None:
            by_metric.setdefault(metric, {})[model] = each
    if not by_metric:
        return ""

    def best(metric: str) -> float:
        return max(abs(float(each["spearman"])) for each in by_metric[metric].values())

    models = list(dict.fromkeys(name.rpartition("/")[0] for name in found["prediction"]))
    shown = sorted(by_metric, key=best, reverse=True)[:SHOWN]
    wide = max(map(len, shown))
    lines = [
        "what predicts the measured effect of a pair (Spearman, 95 %)",
        *([] if models == [""] else [f"  {'':<{wide}}" + "".join(f"{m:>25}" for m in models)]),
    ]
    for metric in shown:
        cells = [_spearman(by_metric[metric].get(model)) for model in models]
        lines.append(f"  {metric:<{wide}}" + "".join(f"{cell:>25}" for cell in cells))
    return "\n".join(lines)


def _spearman(each: Mapping[str, Any] | None) -> str:
    if each is None:
        return "–"
    low, high = each["ci"] or (None, None)
    ends = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return f"{each['spearman']:.2f}{ends}"


def _attention(found: Mapping[str, Any]) -> str:
    every = found["attention"].items()
    heads = {name: each for name, each in every if each["interaction_share"] is not None}

    def amount(name: str) -> float:
        return float(heads[name]["interaction_share"] * heads[name]["variance"])

    shown = sorted(heads, key=amount, reverse=True)[:SHOWN]
    if not shown:
        return ""
    wide = max(map(len, shown))
    lines = [
        f"{len(found['attention'])} heads; most query × key (shares of their scores' variance)",
        f"  {'':<{wide}} {'query × key':>12} {'with error':>11} {'binding':>8}   strongest pair",
    ]
    for name in shown:
        each = heads[name]
        best = f"{each['pairs'][0]['query']} → {each['pairs'][0]['key']}" if each["pairs"] else ""
        lines.append(
            f"  {name:<{wide}} {each['interaction_share']:12.0%} {each['error_share']:11.0%} "
            f"{each['by_kind']['binding']:8.0%}   {best}"
        )
    return "\n".join(lines)

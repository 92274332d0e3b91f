"""The demo's training in other forms than the float32 reference: one curve or several?

    python -m reproduce.same_curve [--work runs/same_curve] [--out docs/results] [--steps 440]

Trains the demo's coder on the same rows with whole codes in float32 (what the equations say, step
by step), as `crosslens demo` does, so with Adam's moments in bfloat16, and with another seed, as a
measure of what chance does; and compares the FVU on held-out rows. A run that is there already is
not done again; one that was stopped is gone on with.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crosslens.cli.demo import CONFIG
from crosslens.lm import ModelSpec
from crosslens.storage import save_json
from crosslens.training import TrainConfig, create_run, open_models, open_run, train

FAST = {"fit.dtype": "bfloat16", "fit.sparse_below": 1.0}
FORMS: Mapping[str, Mapping[str, Any]] = {
    "reference": {"fit.dtype": "float32", "fit.sparse_below": 0.0},
    "fast": FAST,
    "bfloat16 moments": {**FAST, "optimizer.moments": "bfloat16"},
    "another seed": {**FAST, "seed": 1},
}
"""Whole codes in float32; entries only in bfloat16; and two variants of that."""
Curve = dict[int, float]
"""Step → FVU on held-out rows."""


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    asked = _parser().parse_args(arguments)
    curves, seconds = {}, {}
    for name, form in FORMS.items():
        config = config_of(form, asked)
        folder = asked.work / name.replace(" ", "-")
        run = open_run(folder) if (folder / "run.json").is_file() else create_run(folder, config)
        if not run.finished:
            train(run, open_models(config), report=lambda *_: None)
        curves[name] = {m["step"]: m["heldout"]["fvu"] for m in run.metrics() if "heldout" in m}
        seconds[name] = run.summary()["seconds"]
        print(f"{name}: {curves[name]}", flush=True)
    write_page(asked.out, curves, seconds, _facts(asked))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/same_curve"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=CONFIG.text.tokens)
    parser.add_argument("--chat", default="template", help="plain: for a model without template")
    parser.add_argument("--heldout", type=int, default=CONFIG.text.heldout)
    parser.add_argument("--block", type=int, default=CONFIG.text.block)
    parser.add_argument("--batch", type=int, default=CONFIG.fit.batch)
    parser.add_argument("--steps", type=int, default=CONFIG.fit.steps)
    parser.add_argument("--latents", type=int, default=CONFIG.coder.latents)
    parser.add_argument("--sites", nargs="+", default=CONFIG.sites)
    return parser


def config_of(form: Mapping[str, Any], asked: argparse.Namespace) -> TrainConfig:
    """The demo's configuration in one of the forms."""
    every = min(CONFIG.fit.heldout_every, max(1, asked.steps // 3))
    corpora = {name: replace(c, chat=asked.chat) for name, c in CONFIG.text.corpora.items()}
    sizes = {"tokens": asked.tokens, "heldout": asked.heldout, "block": asked.block}
    config = replace(
        CONFIG,
        models={"base": ModelSpec(path=asked.model)},
        sites=tuple(asked.sites),
        text=replace(CONFIG.text, corpora=corpora, **sizes),
        coder=replace(CONFIG.coder, latents=asked.latents),
        fit=replace(CONFIG.fit, steps=asked.steps, batch=asked.batch, heldout_every=every),
    )
    for key, value in form.items():
        slot, _, name = key.rpartition(".")
        part = replace(getattr(config, slot), **{name: value}) if slot else value
        config = replace(config, **{slot or name: part})
    return config


def widest_gap(curves: Mapping[str, Curve], name: str) -> tuple[int, float]:
    """The step at which a form is furthest from the reference, and how far."""
    gaps = {step: curves[name][step] - fvu for step, fvu in curves["reference"].items()}
    step = max(gaps, key=lambda each: abs(gaps[each]))
    return step, gaps[step]


def write_page(
    out: Path,
    curves: Mapping[str, Curve],
    seconds: Mapping[str, float],
    facts: Mapping[str, Any],
) -> None:
    """`same_curve.md` and `same_curve.json`."""
    others = [name for name in curves if name != "reference"]
    rows = [
        f"| {at} | {fvu:.4f} | "
        + " | ".join(f"{curves[name][at]:.4f} ({curves[name][at] - fvu:+.4f})" for name in others)
        + " |"
        for at, fvu in curves["reference"].items()
    ]
    widest = [(name, *widest_gap(curves, name)) for name in others]
    lines = [
        "# The fast step and the reference: one curve",
        "",
        f"Made by `python -m reproduce.same_curve --steps {facts['steps']} --tokens "
        f"{facts['tokens']}` with torch {facts['torch']} on {facts['threads']} thread(s) "
        f"({facts['cpu']}). The demo's coder, the same rows in the same order, but in the last "
        "column, which has another seed and with it other documents on either side. Reference: "
        "whole codes, float32. Fast: entries only, bfloat16 products. FVU on held-out rows, and "
        "its difference from the reference.",
        "",
        f"| step | reference | {' | '.join(others)} |",
        f"| ---: | ---: |{' ---: |' * len(others)}",
        *rows,
        "",
        f"Widest: {'; '.join(f'{name} {gap:+.4f} at step {at}' for name, at, gap in widest)}. "
        "With harvest and start: "
        f"{', '.join(f'{name} {taken:.0f} s' for name, taken in seconds.items())}.",
        "",
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "same_curve.md").write_text("\n".join(lines), encoding="utf-8")
    save_json(out / "same_curve.json", {"curves": curves, "seconds": seconds, **facts})


def _facts(asked: argparse.Namespace) -> dict[str, Any]:
    return {
        "steps": asked.steps,
        "tokens": asked.tokens,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
    }


if __name__ == "__main__":
    main()

"""The fast training step and the float32 reference on the demo's data: one curve or two?

    python -m reproduce.same_curve [--work runs/same_curve] [--out docs/results] [--steps 440]

Trains the demo's coder with the same seed and rows, once with whole codes in float32 (what the
equations say, step by step) and once as `crosslens demo` does, and compares the FVU on held-out
rows. A run that is there already is not done again; one that was stopped is gone on with.
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

FORMS: Mapping[str, Mapping[str, Any]] = {
    "reference": {"dtype": "float32", "sparse_below": 0.0},
    "fast": {"dtype": "bfloat16", "sparse_below": 1.0},
}
"""Whole codes in float32; entries only in bfloat16."""
Curve = dict[int, float]
"""Step → FVU on held-out rows."""


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    asked = _parser().parse_args(arguments)
    curves, seconds = {}, {}
    for name, form in FORMS.items():
        config = config_of(form, asked)
        folder = asked.fast if name == "fast" and asked.fast else asked.work / name
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
    parser.add_argument("--fast", type=Path, help="a run of crosslens demo, if there is one")
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
    """The demo's configuration in one of the two forms."""
    every = min(CONFIG.fit.heldout_every, max(1, asked.steps // 3))
    fit = replace(CONFIG.fit, steps=asked.steps, batch=asked.batch, heldout_every=every, **form)
    corpora = {name: replace(c, chat=asked.chat) for name, c in CONFIG.text.corpora.items()}
    sizes = {"tokens": asked.tokens, "heldout": asked.heldout, "block": asked.block}
    text = replace(CONFIG.text, corpora=corpora, **sizes)
    return replace(
        CONFIG,
        models={"base": ModelSpec(path=asked.model)},
        sites=tuple(asked.sites),
        text=text,
        coder=replace(CONFIG.coder, latents=asked.latents),
        fit=fit,
    )


def widest_gap(curves: Mapping[str, Curve]) -> tuple[int, float]:
    """The step at which the two are furthest apart, and how far (fast − reference)."""
    gaps = {step: curves["fast"][step] - fvu for step, fvu in curves["reference"].items()}
    step = max(gaps, key=lambda each: abs(gaps[each]))
    return step, gaps[step]


def write_page(
    out: Path,
    curves: Mapping[str, Curve],
    seconds: Mapping[str, float],
    facts: Mapping[str, Any],
) -> None:
    """`same_curve.md` and `same_curve.json`."""
    step, gap = widest_gap(curves)
    last = max(curves["reference"])
    rows = [
        f"| {at} | {fvu:.4f} | {curves['fast'][at]:.4f} | {curves['fast'][at] - fvu:+.4f} |"
        for at, fvu in curves["reference"].items()
    ]
    lines = [
        "# The fast step and the reference: one curve",
        "",
        f"Made by `python -m reproduce.same_curve --steps {facts['steps']} --tokens "
        f"{facts['tokens']}` with torch {facts['torch']} on {facts['threads']} thread(s) "
        f"({facts['cpu']}). The demo's coder, one seed, the same rows in the same order. "
        "Reference: whole codes, float32. Fast: entries only, bfloat16 products.",
        "",
        "| step | reference FVU | fast FVU | difference |",
        "| ---: | ---: | ---: | ---: |",
        *rows,
        "",
        f"At the end the difference is {curves['fast'][last] - curves['reference'][last]:+.4f}; "
        f"the widest is {gap:+.4f}, at step {step}. With harvest and start the reference took "
        f"{seconds['reference']:.0f} s and the fast run {seconds['fast']:.0f} s.",
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

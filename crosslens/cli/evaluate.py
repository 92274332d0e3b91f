"""`crosslens evaluate RUN`: judge a coder on held-out tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from crosslens.cli.arguments import parse
from crosslens.cli.console import number, print_json
from crosslens.cli.stages import Stages
from crosslens.coder import load
from crosslens.device import resolve_device, resolve_dtype
from crosslens.evaluation import evaluate
from crosslens.lm import LanguageModel
from crosslens.storage import save_json
from crosslens.training import Run, open_models, open_run, run_source


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What `evaluate` takes."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    splice_tokens: int = 8192
    """Held-out positions over which each site is spliced; 0 leaves splicing out."""
    json: bool = False
    """Print one JSON object on stdout."""
    quiet: bool = False
    """No progress."""


def run(argv: Sequence[str]) -> int:
    """Reconstruction, sparsity and splice figures; kept in RUN/evaluation.json."""
    asked = parse(
        Evaluate,
        argv,
        None,
        prog="crosslens evaluate",
        description="Judge a run's coder on its held-out tokens.",
    )
    judged = open_run(Path(asked.run))
    with Stages(asked.quiet or asked.json) as stages:
        found = evaluate_run(judged, open_models(judged.config()), asked.splice_tokens, stages)
    if asked.json:
        print_json(found)
    else:
        print(table(found))
    return 0


def evaluate_run(
    judged: Run, models: Mapping[str, LanguageModel], splice_tokens: int, stages: Stages
) -> dict[str, Any]:
    """The figures as plain data, also written to RUN/evaluation.json."""
    config = judged.config()
    coder = load(judged.folder, resolve_device(config.fit.device))
    coder.compute_dtype = resolve_dtype(config.fit.dtype)
    source = run_source(judged, models, judged.blocks("heldout"))
    found = evaluate(coder, source, splice_tokens, stages).plain()
    save_json(judged.folder / "evaluation.json", found)
    return found


def table(found: Mapping[str, Any]) -> str:
    """The figures for people."""
    low, high = found["l0_quantiles"]["0.05"], found["l0_quantiles"]["0.95"]
    lines = [
        f"held-out tokens {number(found['tokens'])} · FVU {found['fvu']:.3f} · "
        f"L0 {found['l0']:.1f} (5–95 %: {low:.0f}–{high:.0f}) · "
        f"dead {100 * found['dead']:.1f} %",
        "",
        f"{'site':<24} {'FVU':>6} {'EV':>6} {'cos':>6} {'norm':>6}"
        + (f" {'CE':>7} {'CE rec.':>8} {'KL':>6}" if found["splice"] else ""),
    ]
    for site, figures in found["sites"].items():
        line = (
            f"{site:<24} {figures['fvu']:6.3f} {figures['explained_variance']:6.3f} "
            f"{figures['cosine']:6.3f} {figures['norm_ratio']:6.3f}"
        )
        if site in found["splice"]:
            spliced = found["splice"][site]
            line += f" {spliced['ce']:7.3f} {spliced['recovered_zero']:8.3f} {spliced['kl']:6.3f}"
        lines.append(line)
    if found["splice"]:
        clean = next(iter(found["splice"].values()))["ce_clean"]
        lines += ["", f"clean CE {clean:.3f} nats; CE rec. is against zero ablation"]
    return "\n".join(lines)

"""What `crosslens train --dry-run` predicts, beside what then happens.

python benchmarks/prediction.py [--json] [--only demo,wide] [--steps 60] [--tokens 60000]

Calibrates this machine first (`--as-is`: does not), then predicts and trains each configuration,
each in a process of its own, on the built-in model: seconds of a step, tokens harvested in a
second, the process's peak memory, and the size of the run's directory. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.arena import ROOT
from benchmarks.machine import machine
from benchmarks.worker import memory
from crosslens.allocator import keep_freed_memory
from crosslens.cli.demo import CONFIG
from crosslens.coder import ReLU, TopK
from crosslens.config import load_file, to_yaml
from crosslens.training import (
    AuxK,
    CoderConfig,
    NormL1,
    TrainConfig,
    create_run,
    open_models,
    train,
)

WITHIN = 0.25
LOG_EVERY = 5
MEASURED = ("seconds_per_step", "harvest_tokens_per_s", "memory_peak", "disk")
"""Fields of a plan that are compared with what happened."""


def configurations(steps: int, tokens: int) -> dict[str, TrainConfig]:
    """Small trainings: name → configuration."""
    text = replace(CONFIG.text, tokens=tokens, heldout=max(8192, tokens // 8))
    fit = replace(CONFIG.fit, steps=steps, log_every=LOG_EVERY, heldout_every=4 * LOG_EVERY)
    demo = replace(CONFIG, text=text, fit=replace(fit, checkpoint_every=6 * LOG_EVERY))
    dense = CoderConfig(latents=4096, activation=ReLU())
    penalty = replace(demo.objective, l1=NormL1(weight=1e-3), aux=AuxK(weight=0.0))
    one_site, single = ("resid_post.15",), CoderConfig(latents=16_384, activation=TopK(k=32))
    row_bytes = 2 * 5 * 576
    return {
        "demo": demo,
        "wide": replace(demo, coder=replace(demo.coder, latents=16_384)),
        # Held whole throughout: it is not known beforehand when few enough latents are active.
        "whole code": replace(
            demo, coder=dense, objective=penalty, fit=replace(demo.fit, sparse_below=0.0)
        ),
        "one site": replace(demo, sites=one_site, coder=single),
        "float32": replace(
            demo, sites=one_site, coder=single, fit=replace(demo.fit, dtype="float32")
        ),
        # The text does not fit: the buffer is filled again and again.
        "small buffer": replace(
            demo, fit=replace(demo.fit, buffer_gb=0.75 * tokens * row_bytes / 1e9)
        ),
    }


@dataclass
class Timeline:
    """When training told of what."""

    told: list[tuple[float, str, int]] = field(default_factory=list)

    def __call__(
        self, stage: str, done: int, total: int, figures: Mapping[str, float] | None = None
    ) -> None:
        self.told.append((perf_counter(), stage, done))

    def apart(self, stage: str, by: int) -> list[float]:
        """Seconds between reports of a stage that follow each other and are `by` apart."""
        pairs = zip(self.told, self.told[1:], strict=False)
        found = [
            late - soon
            for (soon, before, start), (late, after, end) in pairs
            if before == after == stage and end - start == by
        ]
        if not found:
            raise SystemExit(f"No {stage} that nothing came between: raise --steps and --tokens.")
        return found


def happened(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train, in this process, as the command does."""
    keep_freed_memory()
    timeline, run = Timeline(), create_run(folder, config)
    models = open_models(config)
    began = perf_counter()
    train(run, models, timeline)
    seconds = perf_counter() - began
    every, block = config.fit.log_every, config.text.block
    per_chunk = max(1, config.fit.harvest_tokens // block) * block
    return {
        # Few intervals hold the writing of a checkpoint, and a median leaves them out.
        "seconds_per_step": statistics.median(timeline.apart("train", every)) / every,
        "harvest_tokens_per_s": per_chunk / statistics.median(timeline.apart("harvest", 1)),
        "memory_peak": memory("VmHWM"),
        "disk": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "seconds": seconds,
    }


def compared(name: str, config: TrainConfig) -> dict[str, Any]:
    """The prediction, then the training, each in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "crosslens", "train", "--config", str(file)]
        plan = _answer([*command, "--dry-run", "--json"])
        own = [sys.executable, "-m", "benchmarks.prediction", "--train", str(file)]
        found = _answer([*own, "--run", str(Path(folder) / "run")])
    ratio = {key: plan[key] / found[key] for key in (*MEASURED, "seconds")}
    told = ", ".join(f"{key} {value:.2f}" for key, value in ratio.items())
    print(f"{name}: predicted / happened: {told}", file=sys.stderr, flush=True)
    return {
        "predicted": plan,
        "happened": found,
        "ratio": ratio,
        "within": {key: 1 - WITHIN <= ratio[key] <= 1 + WITHIN for key in MEASURED},
    }


def _answer(command: Sequence[str]) -> Any:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(found: Mapping[str, Any]) -> str:
    """For people: predicted and happened, a configuration a line."""
    units = {
        "seconds_per_step": ("step (s)", 1.0),
        "harvest_tokens_per_s": ("harvest (tokens/s)", 1.0),
        "memory_peak": ("memory (GB)", 1e9),
        "disk": ("disk (GB)", 1e9),
    }
    lines = [f"{'':14}" + "".join(f"{title:>26}" for title, _ in units.values())]
    for name, one in found.items():
        cells = []
        for key, (_, unit) in units.items():
            pair = f"{one['predicted'][key] / unit:.3g} / {one['happened'][key] / unit:.3g}"
            cells.append(f"{pair} {'✓' if one['within'][key] else '✗'}")
        lines.append(f"{name:14}" + "".join(f"{cell:>26}" for cell in cells))
    held = [ok for one in found.values() for ok in one["within"].values()]
    return "\n".join([*lines, f"{sum(held)} of {len(held)} within {WITHIN:.0%}"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", metavar="A,B", help="configurations, by name")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--as-is", action="store_true", help="do not calibrate first")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.train:
        config = load_file(TrainConfig, Path(asked.train), TrainConfig())
        print(json.dumps(happened(config, Path(asked.run))))
        return
    if not asked.as_is:
        _answer([sys.executable, "-m", "crosslens", "doctor", "--calibrate", "--json"])
    known = configurations(asked.steps, asked.tokens)
    wanted = asked.only.split(",") if asked.only else list(known)
    found = {name: compared(name, known[name]) for name in wanted}
    if asked.json:
        print(json.dumps({"machine": machine(), "configurations": found}))
    else:
        print(table(found))


if __name__ == "__main__":
    main()

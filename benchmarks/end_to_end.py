"""From text to a trained coder: each library's own command, on the same model, text and tokens.

python benchmarks/end_to_end.py [--json] [--tokens 65536] [--repeats 3] [--peers-python PATH]

One SAE at the output of one layer of the built-in model, everything from local folders. The time is
that of the whole process: importing, loading, tokenising, harvesting, training, saving. In each
round everybody runs once, alone. How good the coders get is not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.arena import GB, OFFLINE, ROOT
from benchmarks.machine import machine
from benchmarks.train_step import names, peers_python, tell

LAYER, LATENTS, K, WIDTH = 15, 4096, 32, 576
BATCH, BLOCK = 2048, 256
"""Rows of a training step, and tokens that the model reads together."""
CONTESTANTS = {
    "crosslens": "`crosslens train`",
    "sae_lens": "its training runner's command",
    "sae_lens_bfloat16": "the same with --autocast",
    "sparsify_command": "its command",
    "sparsify": "its Trainer: the command names a GPU",
}
Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and where things lie."""

    tokens: int
    inputs: Path
    out: Path
    python: str
    """Interpreter that has the peers."""

    @property
    def model(self) -> str:
        return str(self.inputs / "model")

    @property
    def text(self) -> str:
        return str(self.inputs / "text")


def command(name: str, job: Job) -> list[str]:
    """What a user of that library would type."""
    if name == "crosslens":
        return [sys.executable, "-m", "crosslens", "train", *_crosslens(job)]
    if name == "sparsify":
        return [job.python, "-m", "benchmarks.peers.sparsify_run", *_sparsify(job)]
    if name == "sparsify_command":
        return [job.python, "-m", "sparsify", *_sparsify_command(job)]
    fast = ["--autocast"] if name.endswith("bfloat16") else []
    return [job.python, "-m", "sae_lens.llm_sae_training_runner", *_sae_lens(job), *fast]


def _crosslens(job: Job) -> list[str]:
    return [
        *("--models.base.path", job.model, "--sites", f"resid_post.{LAYER}"),
        *("--coder.latents", str(LATENTS), "--coder.activation", "topk"),
        *("--coder.activation.k", str(K), "--text.corpora.main.source", job.text),
        *("--text.tokens", str(job.tokens), "--text.heldout", str(BATCH)),
        *("--text.block", str(BLOCK), "--fit.batch", str(BATCH), "--optimizer.warmup", "0"),
        *("--fit.steps", str(job.tokens // BATCH), "--out", str(job.out), "--quiet"),
    ]


def _sae_lens(job: Job) -> list[str]:
    return [
        *("--architecture", "topk", "--d_in", str(WIDTH), "--d_sae", str(LATENTS)),
        *("--k", str(K), "--model_class_name", "AutoModelForCausalLM"),
        *("--model_name", job.model, "--hook_name", f"model.layers.{LAYER}"),
        *("--dataset_path", job.text, "--nois_dataset_tokenized", "--nostreaming"),
        *("--context_size", str(BLOCK), "--store_batch_size_prompts", str(BATCH // BLOCK)),
        *("--training_tokens", str(job.tokens), "--train_batch_size_tokens", str(BATCH)),
        *("--device", "cpu", "--nolog_to_wandb", "--checkpoint_path", "None"),
        *("--output_path", str(job.out)),
    ]


def _sparsify(job: Job) -> list[str]:
    return [
        *(job.model, job.text, "--layer", str(LAYER), "--latents", str(LATENTS), "--k", str(K)),
        *("--tokens", str(job.tokens), "--batch", str(BATCH), "--block", str(BLOCK)),
        *("--out", str(job.out)),
    ]


def _sparsify_command(job: Job) -> list[str]:
    return [
        *(job.model, job.text, "--layers", str(LAYER), "--num_latents", str(LATENTS)),
        *("--k", str(K), "--batch_size", str(BATCH // BLOCK), "--ctx_len", str(BLOCK)),
        *("--max_examples", str(job.tokens // BLOCK), "--data_preprocessing_num_proc", "1"),
        *("--nolog_to_wandb", "--save_dir", str(job.out)),
    ]


def run(words: Sequence[str], scratch: Path) -> Found:
    """Seconds and peak memory of a command, or why it failed."""
    # A cache of its own: tokenising again is part of the work.
    environment = {**os.environ, **OFFLINE, "HF_DATASETS_CACHE": str(scratch / "datasets")}
    with (scratch / "complaints").open("w+b") as complaints:
        began = time.perf_counter()
        process = subprocess.Popen(
            list(words), stdout=complaints, stderr=complaints, cwd=ROOT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        complaints.seek(0)
        lines = complaints.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        return {"reason": lines[-1] if lines else f"exited with code {process.returncode}"}
    scale = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * scale}


def measure(asked: argparse.Namespace, inputs: Path) -> Found:
    """Everybody once a round."""
    found: dict[str, list[Found]] = {name: [] for name in asked.only}
    for done in range(asked.repeats):
        for name, runs in found.items():
            if any("reason" in one for one in runs):
                continue
            tell(f"round {done + 1}: {name}")
            with tempfile.TemporaryDirectory(prefix="crosslens-bench-") as folder:
                scratch = Path(folder)
                python = peers_python(asked.peers_python)
                out = scratch / "out"
                job = Job(tokens=asked.tokens, inputs=inputs, out=out, python=python)
                runs.append(run(command(name, job), scratch))
    return {name: summary(name, runs, asked.tokens) for name, runs in found.items()}


def summary(name: str, runs: Sequence[Found], tokens: int) -> Found:
    """Tokens per second over the runs, or the reason why there are none."""
    for one in runs:
        if "reason" in one:
            return {**one, "how": CONTESTANTS[name]}
    rates = [tokens / one["seconds"] for one in runs]
    return {
        "how": CONTESTANTS[name],
        "tokens_per_s": {
            "median": statistics.median(rates),
            "least": min(rates),
            "most": max(rates),
        },
        "seconds": statistics.median(one["seconds"] for one in runs),
        "peak_bytes": max(one["peak_bytes"] for one in runs),
    }


def table(found: Found) -> str:
    """The figures for people."""
    lines = []
    for name, one in found.items():
        if "reason" in one:
            lines.append(f"{name:18} {one['reason']}")
            continue
        rate = one["tokens_per_s"]
        lines.append(
            f"{name:18} {rate['median']:7,.0f} tokens/s ({rate['least']:,.0f} – "
            f"{rate['most']:,.0f})  {one['seconds']:6.1f} s  {one['peak_bytes'] / GB:4.1f} GB"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with whole steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--tokens", type=int, default=65_536, help="that everybody trains on")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--only", type=names(CONTESTANTS), default=list(CONTESTANTS), metavar="A,B")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter that has the peers")
    asked = parser.parse_args(argv)
    if asked.tokens < BATCH:
        parser.error(f"--tokens {asked.tokens} is less than one step of {BATCH}.")
    asked.tokens -= asked.tokens % BATCH
    return asked


def main(argv: Sequence[str] | None = None) -> None:
    asked = parse(argv)
    with tempfile.TemporaryDirectory(prefix="crosslens-bench-") as folder:
        prepare = [sys.executable, "-m", "benchmarks.inputs", folder, "--tokens", str(asked.tokens)]
        subprocess.run(prepare, check=True, cwd=ROOT, stdout=sys.stderr)
        found = measure(asked, Path(folder))
    if asked.json:
        print(json.dumps({"machine": machine(), "tokens": asked.tokens, "contestants": found}))
        return
    print(f"{asked.tokens:,} tokens, {WIDTH} → {LATENTS:,} k={K} at layer {LAYER}\n{table(found)}")


if __name__ == "__main__":
    main()

"""Tokens per second of a harvest: crosslens, Transformers alone, TransformerLens.

python benchmarks/harvest.py [--json] [--sites resid_mid.5,resid_mid.10] [--peers-python PATH]

The same real text, weights and sites for all, in the chunks that a training harvests, and in turns:
in each round every contestant takes a few chunks while the others sleep. Ratios are those of turns
of one round: their median and spread. Where the peers live: benchmarks/peers.txt.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arena import GB, Arena, Contestant, Result
from benchmarks.machine import machine
from benchmarks.task import Shape
from benchmarks.train_step import peers_python, rates, tell
from crosslens.activations import Source, TokenPolicy, calibrate, site_layout
from crosslens.coder import Crosscoder
from crosslens.lm import ModelSpec, open_model
from crosslens.lm.source import locate
from crosslens.storage import save_json, save_tensors
from crosslens.text import TextConfig, build_blocks
from crosslens.training import FitConfig

SITES = "resid_mid.5,resid_mid.10,resid_mid.15,resid_mid.20,resid_mid.25"
BLOCK = 256
CHUNK = FitConfig().harvest_tokens // BLOCK
"""Blocks that go through a model together, as a training has it."""
CHUNKS = 8
A_CHUNK = Shape(sites=0, width=0, latents=0, k=0, batch=CHUNK * BLOCK)
"""A step, of which the arena need know no more than its tokens."""
LIKELY = 3 * GB
CONTESTANTS = {
    "crosslens": ("crosslens", "bfloat16"),
    "plain": ("plain", "bfloat16"),
    "bridge": ("transformer_lens", "bfloat16"),
    "bridge_float32": ("transformer_lens", "float32"),
}
"""Name → module in benchmarks/harvesters, number format. float32 is the bridge's default."""
GOALS = {"plain": 0.95, "bridge": 1.9, "bridge_float32": 5.0}
"""How many times as fast as each of these crosslens is to be."""
ALIKE = 0.02
"""Relative difference of norms between two libraries' bfloat16, or bfloat16 and float32."""
Found = dict[str, Any]


def prepare(folder: Path, spec: ModelSpec, sites: Sequence[str]) -> None:
    """Write what all contestants read: the tokens, the sites, the norms that outliers exceed."""
    model = open_model(spec)
    layout = site_layout({"base": model}, sites)
    config = TextConfig(tokens=CHUNKS * CHUNK * (BLOCK - 1), heldout=BLOCK, block=BLOCK)
    blocks = build_blocks(config, model.tokenizer, 0).train
    source = Source({"base": model}, layout, blocks, TokenPolicy(), blocks_per_chunk=CHUNK)
    norms, _ = calibrate(source, Crosscoder()(layout, 1), CHUNK * BLOCK)
    save_json(folder / "median.json", norms.median)
    save_tensors(folder / "tokens.safetensors", {"tokens": blocks.tokens_NT})
    blocks.save(folder, "blocks")
    job = {"model": str(locate(spec).folder), "sites": layout.sites, "blocks": CHUNK}
    save_json(folder / "job.json", {**job, "layers": _layers(layout.sites)})


def _layers(sites: Sequence[str]) -> int:
    """How many layers the deepest site needs."""
    known = [re.fullmatch(r"resid_(?:pre|mid|post)\.(\d+)", site) for site in sites]
    if not all(known):
        raise SystemExit(f"--sites: only resid_pre, resid_mid and resid_post; found {sites}.")
    return 1 + max(int(match[1]) for match in known if match)


def compete(folder: Path, asked: argparse.Namespace) -> dict[str, Result]:
    """What each contestant did."""
    python = peers_python(asked.peers_python)
    lineup = {
        name: Contestant(
            name=name,
            setting=setting,
            entry=f"benchmarks.harvesters.{module}",
            python=sys.executable if name in ("crosslens", "plain") else python,
            folder=str(folder),
        )
        for name, (module, setting) in CONTESTANTS.items()
    }
    arena = Arena(list(lineup.values()), A_CHUNK, asked.memory_gb * GB, LIKELY)
    arena.compete(asked.repeats, asked.steps, tell)
    return {name: arena.results[contestant] for name, contestant in lineup.items()}


def summary(results: dict[str, Result], folder: Path) -> Found:
    """The figures of `--json`, in tokens per second and bytes."""
    found: Found = {name: rates(A_CHUNK, result) for name, result in results.items()}
    for name, result in results.items():
        if result.reason is None:
            found[name] |= {"peak_bytes": result.whole_peak_bytes, **result.facts}
    ours = results["crosslens"].seconds
    found["times"] = {
        name: _ratio(results[name].seconds, ours, goal)
        for name, goal in GOALS.items()
        if results[name].seconds and ours
    }
    found["norms_differ"] = _norms_differ(folder)
    found["idle_cpu_seconds"] = max(result.idle_cpu_seconds for result in results.values())
    return found


def _ratio(theirs: Sequence[float], ours: Sequence[float], goal: float) -> Found:
    """Their seconds over ours, turn by turn."""
    each = [a / b for a, b in zip(theirs, ours, strict=False)]
    median = statistics.median(each)
    return {
        "median": median,
        "least": min(each),
        "most": max(each),
        "goal": goal,
        "met": median >= goal,
    }


def _norms_differ(folder: Path) -> float | None:
    """The largest relative difference of a site's mean norm between two contestants.

    Raises:
        SystemExit: they do not read the same activations.
    """
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("norms-*.json"))]
    if len(found) < 2:
        return None
    most = max(abs(one[site] / found[0][site] - 1) for one in found for site in found[0])
    if most > ALIKE:
        raise SystemExit(f"The contestants' activations differ: mean norms by {most:.1%}.")
    return most


def table(found: Found) -> str:
    """The figures for people."""
    lines = []
    for name in CONTESTANTS:
        one = found[name]
        if "reason" in one:
            lines.append(f"  {name:16} {one['reason']}")
            continue
        spread = f"({one['least']:,.0f} – {one['most']:,.0f})"
        peak = f"{one['peak_bytes'] / GB:.1f} GB"
        line = f"  {name:16} {one['median']:8,.0f} tokens/s {spread:18} {peak}"
        if name in found["times"]:
            times = found["times"][name]
            line += f"   crosslens {times['median']:.2f} × (goal {times['goal']})"
        lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--model", default=ModelSpec().path, help="folder, hub id or built-in name")
    parser.add_argument("--sites", type=lambda text: text.split(","), default=SITES.split(","))
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--steps", type=int, default=2, help="chunks of each in a round")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter that has the peers")
    parser.add_argument("--memory-gb", type=float, default=14.0, help="for all workers together")
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), ModelSpec(path=asked.model, device="cpu"), asked.sites)
        found = summary(compete(Path(folder), asked), Path(folder))
    told = {"machine": machine(), "model": asked.model, "sites": asked.sites}
    if asked.json:
        print(json.dumps({**told, "tokens_a_step": CHUNK * BLOCK, **found}))
        return
    print(f"{told['machine']['cpu']}, {told['machine']['usable_cores']} cores")
    print(f"{asked.model}, {', '.join(asked.sites)}, {CHUNK} × {BLOCK} tokens\n{table(found)}")


if __name__ == "__main__":
    main()

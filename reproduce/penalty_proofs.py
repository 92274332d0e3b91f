"""Does an interaction penalty buy shorter proofs? Crosscoders of the small language model over
strengths of the penalty and seeds, and what each proves at fixed flops.

    python -m reproduce.penalty_proofs [--work DIR] [--out docs/results]

Trains the model once and a crosscoder for each form, strength and seed, and some without a penalty
that keep other numbers of latents; bounds the loss by every tier that looks at the crosscoder, and
the MLP alone at the crosscoder's rows. What is done stays done: stop it and start it again. The
plot needs the extra `repro`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from crosslens.config import to_plain
from crosslens.errors import UsageError, suggestion
from crosslens.proofs import ledger_lm
from crosslens.proofs.ladder import small_lm_search as search
from crosslens.proofs.ladder.small_lm import SmallLM, Text, data, read_text, train
from crosslens.proofs.ladder.small_lm_coder import train_coder
from crosslens.storage import load_json, load_tensors, save_json, save_tensors
from reproduce.penalty_proofs_judging import Bench, judged
from reproduce.penalty_proofs_page import write_page
from reproduce.penalty_proofs_points import Point, points


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    asked = _parser().parse_args(arguments)
    wanted = points(asked.active, tuple(range(asked.seeds)))
    names = [point.name for point in wanted]
    for name in asked.only or []:
        if name not in names:
            raise UsageError(f"There is no point {name!r}.{suggestion(name, names)}")
    bench = prepare(asked)
    for point in wanted:
        if not asked.only or point.name in asked.only:
            run_point(point, bench, asked.work)
    results = collected(bench, wanted, asked.work)
    facts = {
        **_facts(bench), "command": _command(asked), "done": (len(results), len(wanted)),
    }  # fmt: skip
    write_page(asked.out, results, facts)
    print(f"{len(results)} of {len(wanted)} are in {asked.out / 'penalty_proofs.md'}")


def _parser() -> argparse.ArgumentParser:
    usual = SmallLM()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_KeepLines)
    parser.add_argument("--work", type=Path, default=Path("runs/penalty_proofs"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="such as exact-0.3-k8-seed0")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--local-rows", type=int, default=2048)
    for name in ("vocabulary", "length", "width", "heads", "neurons", "sequences", "steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual, name))
    for name in ("features", "active"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual.coder, name))
    parser.add_argument("--coder-steps", type=int, default=usual.coder.steps)
    parser.add_argument("--coder-rows", type=int, default=usual.coder.rows)
    return parser


class _KeepLines(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is written, and each default."""


def prepare(asked: argparse.Namespace) -> Bench:
    """The model, trained once and kept, its data, and the truth about them."""
    sizes = ("vocabulary", "length", "width", "heads", "neurons", "sequences", "steps")
    usual = SmallLM()
    coder = replace(
        usual.coder,
        features=asked.features,
        active=asked.active,
        steps=asked.coder_steps,
        rows=asked.coder_rows,
    )
    config = replace(usual, **{name: getattr(asked, name) for name in sizes}, coder=coder)
    text, weights = _model(config, asked.work)
    given = data(config, text)
    return Bench(config, text, weights, given, search.truth(weights, given), asked.local_rows)


def _model(config: SmallLM, work: Path) -> tuple[Text, dict[str, torch.Tensor]]:
    key, note, file = {"config": to_plain(config)}, work / "model.json", work / "model.safetensors"
    if note.is_file() and load_json(note) == key:
        kept = load_tensors(file)
        return Text(kept.pop("train"), kept.pop("heldout")), kept
    text = read_text(config)
    weights = train(config, text, print)
    save_tensors(file, {**weights, "train": text.train, "heldout": text.heldout})
    save_json(note, key)
    return text, weights


def _key(point: Point, bench: Bench) -> dict[str, Any]:
    return {
        "model": to_plain(bench.config),
        "coder": to_plain(point.config(bench.config)),
        "local_rows": bench.local_rows,
    }


def run_point(point: Point, bench: Bench, work: Path) -> None:
    """Train and judge one crosscoder, unless its result is there already for the same settings."""
    file, key = work / "points" / f"{point.name}.json", _key(point, bench)
    if file.is_file() and load_json(file)["key"] == key:
        print(f"{point.name}: done before", flush=True)
        return
    began = time.perf_counter()
    config = point.config(bench.config)
    features = train_coder(config, bench.weights, bench.text, lambda _: None)
    figures = {**asdict(point), **judged(features, config, bench)}
    figures["seconds"] = time.perf_counter() - began
    save_json(file, {"key": key, "figures": figures})
    losses = "  ".join(f"{name} {each['bound']:.3f}" for name, each in figures["budgets"].items())
    print(
        f"{point.name}: fvu {figures['fvu']:.4f}  interaction {figures['interaction']:.4f}  "
        f"loss at {losses}  {figures['seconds']:.0f} s",
        flush=True,
    )


def collected(bench: Bench, wanted: list[Point], work: Path) -> list[dict[str, Any]]:
    """All results there are for these settings."""
    found = []
    for point in wanted:
        file = work / "points" / f"{point.name}.json"
        if file.is_file() and load_json(file)["key"] == _key(point, bench):
            found.append(dict(load_json(file)["figures"]))
    return found


def _facts(bench: Bench) -> dict[str, Any]:
    size = bench.config.sizes
    brute = ledger_lm.brute_force(size).flops
    rows = size["S"] * size["T"]
    return {
        "sizes": to_plain(bench.config),
        "loss": float(bench.true.loss_N.mean()),
        "flops_brute": brute,
        "mlp_share": 4 * rows * size["D"] * size["N"] / brute,
        "readout_share": 2 * rows * size["D"] * size["V"] / brute,
        "local_rows": bench.local_rows,
        "machine": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": platform.processor() or platform.machine(),
        },
    }


def _command(asked: argparse.Namespace) -> str:
    """How to make the same page: every argument that is not at its default."""
    default, words = _parser(), ["python -m reproduce.penalty_proofs"]
    for key, value in vars(asked).items():
        if key not in ("work", "out", "only") and value != default.get_default(key):
            words.append(f"--{key.replace('_', '-')} {json.dumps(value)}")
    return " ".join(words)


if __name__ == "__main__":
    main()

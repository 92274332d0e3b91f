"""Every scheme on one harvest, at equal tokens and near-equal L0.

    python -m reproduce.schemes [--work runs/schemes] [--out docs/results] [--only NAME …]

Harvests once, trains each recipe of `crosslens.recipes`, and writes a table and a plot. What is
done stays done: stop it and start it again. Needs the extra `repro` for the plot and the
fine-tune.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crosslens.coder import load, save
from crosslens.config import to_plain
from crosslens.errors import Diverged
from crosslens.lm import LanguageModel, ModelSpec, open_models
from crosslens.storage import load_json, save_json
from reproduce.finetune import FineTune, fine_tuned
from reproduce.scheme_judging import baseline, judged
from reproduce.scheme_page import write_page
from reproduce.scheme_rows import Harvest, harvest, scheme_source
from reproduce.scheme_table import LR, SCHEMES, Sizes, config_of, sites_of
from reproduce.scheme_training import TRIALS, Match, Rows, matched, train


@dataclass(frozen=True)
class Bench:
    """What all schemes share in memory."""

    models: Mapping[str, LanguageModel]
    harvest: Harvest
    sizes: Sizes
    splice_tokens: int
    trials: int
    work: Path


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    asked = _parser().parse_args(arguments)
    bench = prepare(asked)
    for name in asked.only or SCHEMES:
        run_scheme(name, bench)
    results = collected(asked.work)
    facts = {**_facts(bench), "command": _command(asked)}
    write_page(asked.out, results, facts)
    print(f"{len(results)} of {len(SCHEMES)} schemes are in {asked.out / 'schemes.md'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_KeepLines)
    parser.add_argument("--work", type=Path, default=Path("runs/schemes"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--only", nargs="+", choices=list(SCHEMES), metavar="NAME")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--model-dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=305_000)
    parser.add_argument("--heldout", type=int, default=16_000)
    parser.add_argument("--splice-tokens", type=int, default=2048)
    parser.add_argument("--trials", type=int, default=TRIALS, help="trainings to match an L0")
    parser.add_argument("--latents", type=int, default=4608)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--steps", type=int, default=147)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--finetune-steps", type=int, default=40)
    return parser


class _KeepLines(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is written, and each default."""


def prepare(asked: argparse.Namespace) -> Bench:
    """Both models, and the harvest."""
    spec = ModelSpec(path=asked.model, dtype=asked.model_dtype)
    plan = FineTune(steps=asked.finetune_steps)
    chat = fine_tuned(spec, asked.work / "adapter", plan)
    models = open_models({"base": spec, "chat": chat})
    depth = models["base"].n_layers
    sizes = Sizes(
        latents=asked.latents,
        l0=asked.l0,
        steps=asked.steps,
        batch=asked.batch,
        layers=(depth // 6, depth // 2, depth * 5 // 6),
        dtype=asked.dtype,
    )
    text = (asked.tokens, asked.heldout)
    found = harvest(models, _patterns(sizes), text, asked.work / "harvest")
    return Bench(models, found, sizes, asked.splice_tokens, asked.trials, asked.work)


def _patterns(sizes: Sizes) -> tuple[str, ...]:
    """All sites that some scheme wants, with their model's name."""
    wanted = {site: None for name in SCHEMES for site in _sites(name, sizes)}
    return tuple(wanted)


def _sites(name: str, sizes: Sizes) -> tuple[str, ...]:
    scheme = SCHEMES[name]
    models = ("base", "chat") if scheme.two_models else ("base",)
    return tuple(f"{model}/{s}" for model in models for s in sites_of(scheme, sizes.layers))


def run_scheme(name: str, bench: Bench) -> dict[str, Any]:
    """Train and judge one scheme, unless its result is there already for the same settings."""
    file = bench.work / "schemes" / name / "result.json"
    config, scheme = config_of(name, bench.sizes), SCHEMES[name]
    key = {"config": to_plain(config), "text": bench.harvest.fingerprint}
    if file.is_file() and load_json(file)["key"] == key:
        print(f"{name}: done before")
        return dict(load_json(file))
    print(f"{name}: ", end="", flush=True)
    rows = Rows(bench.harvest, _sites(name, bench.sizes), scheme.two_models)
    began = time.perf_counter()
    result: dict[str, Any] = {"name": name, "family": scheme.family, "key": key}
    tried: list[Match] = []
    try:
        if scheme.penalty:
            tried = matched(config, rows, scheme.penalty, bench.sizes.l0, bench.trials)
        trained = tried[-1].trained if tried else train(config, rows)
    except Diverged as error:
        result |= {"diverged": str(error)}
    else:
        save(trained.coder, file.parent / "coder", {"recipe": name})
        coder = load(file.parent / "coder")
        source = scheme_source(bench.models, bench.harvest, rows.sites, scheme.two_models)
        per_chunk = min(source.blocks_per_chunk, bench.splice_tokens // source.block_length)
        source = replace(source, blocks_per_chunk=max(1, per_chunk))
        result |= judged(coder, rows, source, bench.splice_tokens)
        result |= {
            "baseline": baseline(coder, rows, bench.sizes.l0),
            "sites": list(coder.wiring.harvest.sites),
            "parameters": sum(p.numel() for p in coder.parameters()),
            "penalty": scheme.penalty,
            "tried": [{"weight": each.weight, "l0": each.l0} for each in tried],
            "seconds": trained.seconds,
            "fvu_curve": trained.fvu_curve,
        }
    result["seconds_in_all"] = time.perf_counter() - began
    save_json(file, result)
    print(_line(result), flush=True)
    return result


def _line(result: Mapping[str, Any]) -> str:
    if "diverged" in result:
        return "diverged"
    return (
        f"fvu {result['fvu']:.3f}  l0 {result['l0']:.1f}  ce {result['ce_recovered']:.3f}  "
        f"dead {result['dead']:.2f}  {result['seconds']:.0f} s of {result['seconds_in_all']:.0f}"
    )


def collected(work: Path) -> list[dict[str, Any]]:
    """All results there are, in the order of the table."""
    files = [work / "schemes" / name / "result.json" for name in SCHEMES]
    return [dict(load_json(file)) for file in files if file.is_file()]


def _facts(bench: Bench) -> dict[str, Any]:
    sizes = bench.sizes
    return {
        "latents": sizes.latents,
        "l0": sizes.l0,
        "steps": sizes.steps,
        "batch": sizes.batch,
        "rows": bench.harvest.counts,
        "layers": list(sizes.layers),
        "adam_lr": LR,
        "splice_tokens": bench.splice_tokens,
        "harvest_tokens_per_s": bench.harvest.tokens_per_s,
        "models": {name: model.identity() for name, model in bench.models.items()},
        "finetune": load_json(bench.work / "adapter" / "loss.json"),
        "machine": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": platform.processor() or platform.machine(),
        },
    }


def _command(asked: argparse.Namespace) -> str:
    """How to make the same page: every argument that is not at its default."""
    default = _parser()
    words = ["python -m reproduce.schemes"]
    for key, value in vars(asked).items():
        if key in ("work", "out", "only") or value == default.get_default(key):
            continue
        words.append(f"--{key.replace('_', '-')} {json.dumps(value).strip(chr(34))}")
    return " ".join(words)


if __name__ == "__main__":
    main()

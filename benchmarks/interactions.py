"""Seconds of the interactions of some layers' MLPs, beside the layers' own forward.

python benchmarks/interactions.py RUN [--tokens 4096] [--repeats 7] [--dtype float32] [--json]
python benchmarks/interactions.py RUN --loop 64 [--repeats 3] [--json]

The same tokens for all, in turns. `mlp` is the forward of those MLPs alone on inputs that are
there already, in the model's format; `layer` that of whole layers (the model's own time over its
layers, times as many). `interactions` is everything after the codes are known: contributions, the
error's too, sums, shares (with CROSSLENS_KERNELS=stock by products and a series, without the
kernel). `pairs` is the tables of pairs that `crosslens interact` makes, at its defaults: `first
pass` over all pairs, and with the second, in context. What the coder itself and the harvest take is
told apart. Ratios are those of turns of one round: their median, least and most.

With `--loop`, on so many tokens, how many times as long a loop over tokens takes that stands in for
the published implementation's (`benchmarks/published_loop.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.published_loop import given, published_loop
from crosslens.activations import Source
from crosslens.allocator import keep_freed_memory
from crosslens.coder import Coder, load
from crosslens.interactions.neurons.contributions import (
    SiteChunk,
    effective,
    mlp_sites,
    site_chunks,
)
from crosslens.interactions.neurons.exact import SiteSums
from crosslens.interactions.pairs.measure import measure_pairs
from crosslens.interactions.pairs.totals import meet
from crosslens.lm import LanguageModel, open_models
from crosslens.training import open_run, run_source

Found = dict[str, Any]


def contestants(
    model: LanguageModel, source: Source, coder: Coder, shown: list[dict[str, SiteChunk]]
) -> dict[str, Callable[[], object]]:
    """Name → what it does once over all tokens."""
    effectives = {site: chunk.effective for site, chunk in shown[0].items()}
    layers = [one.layer for one in effectives.values()]
    tokens_BT = source.blocks.tokens_NT
    names = [f"mlp_in.{layer}" for layer in layers]
    given = [model.capture(part, names) for part in tokens_BT.split(source.blocks_per_chunk)]

    def mlps() -> None:
        for inputs in given:
            for name, x_BTD in inputs.items():
                model.anatomy.taps[name].module(x_BTD)

    def whole() -> None:
        last = f"resid_post.{model.n_layers - 1}"
        for part in tokens_BT.split(source.blocks_per_chunk):
            model.read(part, {last: lambda _x: None})

    own = {"mlp": mlps, "model": whole}
    n_documents = len(source.blocks.documents)
    everything = {"harvest and coder": lambda: list(site_chunks(source, coder, model, effectives))}
    return {**own, **ours(shown, n_documents), **everything}


def ours(shown: list[dict[str, SiteChunk]], n_documents: int) -> dict[str, Callable[[], object]]:
    """The exact part, and the tables of pairs."""
    sums = {site: SiteSums(chunk.effective, n_documents) for site, chunk in shown[0].items()}

    def exact() -> None:
        for chunks in anew(shown):
            for site, chunk in chunks.items():
                sums[site].add(chunk)

    return {
        "interactions": exact,
        "pairs, first pass": lambda: meet(anew(shown)),
        "pairs": lambda: measure_pairs(lambda: anew(shown)),
    }


def anew(shown: list[dict[str, SiteChunk]]) -> list[dict[str, SiteChunk]]:
    """Without what is remembered of an earlier turn."""
    return [{site: replace(chunk) for site, chunk in chunks.items()} for chunks in shown]


def beside_the_loop(
    shown: list[dict[str, SiteChunk]], tokens: int
) -> dict[str, Callable[[], object]]:
    """The published loop, and ours, on the first tokens."""
    lists = next(iter(shown[0].values())).piece(slice(0, tokens)).lists
    some = {s: replace(c.piece(slice(0, tokens)), lists=lists) for s, c in shown[0].items()}
    codes = [given(chunk, tokens) for chunk in some.values()]

    n_documents = 1 + max(int(chunk.document_R.max()) for chunk in some.values())
    return {
        "published loop": lambda: [published_loop(each) for each in codes],
        **ours([some], n_documents),
    }


def rounds(todo: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each turn; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(repeats + 1):
        for name, run in todo.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in seconds.items()}


def summary(seconds: dict[str, list[float]], tokens: int, share_of_layers: float) -> Found:
    """Tokens per second, and seconds in multiples of the MLPs' and of the layers' forward."""
    layers = [each * share_of_layers for each in seconds["model"]]
    found: Found = {}
    for name, each in seconds.items():
        found[name] = {
            "tokens_per_second": round(tokens / statistics.median(each)),
            "times_mlp": _ratio(each, seconds["mlp"]),
            "times_layers": _ratio(each, layers),
        }
    return found


def slower(seconds: dict[str, list[float]]) -> Found:
    """How many times as long as each of ours the published loop takes."""
    loop = seconds["published loop"]
    return {name: _ratio(loop, each) for name, each in seconds.items() if name != "published loop"}


def _ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


def table(found: Found) -> str:
    """The figures for people."""
    lines = []
    for name, one in found.items():
        mlp, layer = one["times_mlp"], one["times_layers"]
        lines.append(
            f"  {name:21} {one['tokens_per_second']:8,} tokens/s   {mlp['median']:5.2f} × mlp "
            f"({mlp['least']:.2f} – {mlp['most']:.2f})   {layer['median']:5.2f} × layer"
        )
    return "\n".join(lines)


def first_blocks(source: Source, tokens: int) -> Source:
    """The source with no more than about so many tokens."""
    n = max(1, tokens // source.block_length)
    blocks = source.blocks
    fewer = replace(blocks, tokens_NT=blocks.tokens_NT[:n], docs_NT=blocks.docs_NT[:n])
    return replace(source, blocks=fewer)


def prepared(
    folder: Path, tokens: int, dtype: str | None = None
) -> tuple[LanguageModel, Source, Coder, list[Any]]:
    """The run's model (in another format if asked), text and coder, and what each site is given."""
    run = open_run(folder)
    specs = run.config().models
    models = open_models(
        {name: replace(spec, dtype=dtype or spec.dtype) for name, spec in specs.items()}
    )
    model = next(iter(models.values()))
    coder = load(run.coder_path)
    source = first_blocks(run_source(run, models, run.blocks("heldout")), tokens)
    effectives = {site: effective(coder, model, site) for site in mlp_sites(coder, model)}
    return model, source, coder, list(site_chunks(source, coder, model, effectives))


def loop_table(found: Found) -> str:
    """The same of the published loop."""
    return "\n".join(
        f"  the published loop takes {each['median']:7,.0f} × as long as {name} "
        f"({each['least']:,.0f} – {each['most']:,.0f})"
        for name, each in found.items()
    )


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run of a coder that writes before an MLP")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--loop", type=int, default=0, help="tokens to show the published loop")
    parser.add_argument("--dtype", help="the model's format, if not the run's")
    asked = parser.parse_args(argv)
    keep_freed_memory()  # as the command does
    model, source, coder, shown = prepared(asked.run, asked.tokens, asked.dtype)
    if asked.loop:
        tokens = min(asked.loop, next(iter(shown[0].values())).lists.n_items)
        todo = beside_the_loop(shown, tokens)
        found = slower(rounds(todo, asked.repeats))
    else:
        tokens, todo = source.n_positions, contestants(model, source, coder, shown)
        found = summary(rounds(todo, asked.repeats), tokens, len(shown[0]) / model.n_layers)
    told: Found = {"machine": machine(), "threads": torch.get_num_threads(), "tokens": tokens}
    if asked.json:
        named = {"times_slower_loop": found} if asked.loop else {"ways": found}
        print(json.dumps({**told, "sites": list(shown[0]), **named}))
        return
    print(f"{told['machine']['cpu']}, {told['threads']} threads, {tokens} tokens")
    print(f"{', '.join(shown[0])}\n{loop_table(found) if asked.loop else table(found)}")


if __name__ == "__main__":
    main()

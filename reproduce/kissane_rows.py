"""One harvest of the small pair, from which all its trainings are fed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from crosslens.activations import Source, calibrate, site_layout
from crosslens.coder import Crosscoder
from crosslens.config import to_plain
from crosslens.storage import load_json, save_json
from crosslens.text import Blocks, build_blocks
from crosslens.training import TrainConfig
from reproduce.scheme_rows import Harvest, Models

SIDES = ("train", "heldout")
PIECE = 16_384
"""Rows copied at a time."""


@dataclass(frozen=True)
class Held:
    """Rows of a pair on disk, and what they were taken from."""

    harvest: Harvest
    source: Source
    """Over the held-out text."""


def held(models: Models, config: TrainConfig, folder: Path) -> Held:
    """The rows of `config`'s text, harvested into `folder` unless they are there."""
    layout = site_layout(models, config.sites)
    wanted = {
        "text": to_plain(config.text),
        "policy": to_plain(config.policy),
        "sites": list(layout.sites),
        "models": {name: model.identity() for name, model in models.items()},
    }
    record = folder / "harvest.json"
    if not record.is_file() or load_json(record)["wanted"] != wanted:
        record.unlink(missing_ok=True)
        save_json(record, {"wanted": wanted, **_harvested(models, config, folder)})
    facts = load_json(record)
    median_P = torch.tensor(facts["median"])
    rows = Harvest(
        folder, layout, median_P, facts["counts"], facts["fingerprint"], facts["tokens_per_s"]
    )
    source = Source(
        models, layout, rows.blocks("heldout"), config.policy, median_P, _per_chunk(config)
    )
    return Held(rows, source)


def _harvested(models: Models, config: TrainConfig, folder: Path) -> dict[str, object]:
    split = build_blocks(config.text, next(iter(models.values())).tokenizer, config.seed)
    sides: dict[str, Blocks] = {"train": split.train, "heldout": split.heldout}
    layout = site_layout(models, config.sites)
    source = Source(models, layout, split.train, config.policy, blocks_per_chunk=_per_chunk(config))
    norms, _ = calibrate(
        source, Crosscoder()(layout, 1), config.fit.calibration_tokens, config.coder.scale
    )
    source = replace(source, median_P=torch.tensor(norms.median))
    started, counts = time.perf_counter(), {}
    for side in SIDES:
        sides[side].save(folder, side)
        counts[side] = _write(replace(source, blocks=sides[side]), folder, side)
    positions = sum(blocks.tokens_NT.numel() for blocks in sides.values())
    return {
        "median": norms.median,
        "counts": counts,
        "fingerprint": split.fingerprint,
        "tokens_per_s": positions / (time.perf_counter() - started),
        "corpora": {name: to_plain(each) for name, each in split.counts.items()},
    }


def _per_chunk(config: TrainConfig) -> int:
    return max(1, config.fit.harvest_tokens // config.text.block)


def _write(source: Source, folder: Path, side: str) -> int:
    """Writes the rows that count; says how many."""
    room = {side: source.n_rows_at_most}
    rows_NX = Harvest(folder, source.layout, torch.zeros(0), room, "", 0.0).rows(side)
    count = 0
    for index, chunk in enumerate(source):
        rows_RX = chunk.rows()
        rows_NX[count : count + len(rows_RX)] = rows_RX.to(torch.bfloat16)
        count += len(rows_RX)
        if index % 20 == 0:
            print(f"  {side}: {count} of {len(rows_NX)} rows", flush=True)
    return count


def against_itself(pair: Held, folder: Path) -> Held:
    """The same rows with the first model's activations in the place of the second's too: what is
    found there is found where there is nothing to find."""
    rows, source = pair.harvest, pair.source
    first, second = source.models
    folder.mkdir(parents=True, exist_ok=True)
    null = replace(rows, folder=folder)
    span = rows.layout.slice(rows.layout.sites[0])
    for side in SIDES:
        of_NX, into_NX = rows.rows(side)[:, span], null.rows(side)
        for at in range(0, len(of_NX), PIECE):
            into_NX[at : at + PIECE] = of_NX[at : at + PIECE].repeat(1, 2)
    model = source.models[first]
    return Held(null, replace(source, models={first: model, second: model}))

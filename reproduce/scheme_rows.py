"""One harvest for all schemes: rows of both models in memory-mapped files, and batches of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosslens.activations import Source, TokenPolicy, calibrate, site_layout
from crosslens.coder import Crosscoder, Layout
from crosslens.lm import LanguageModel, split_site
from crosslens.storage import load_json, save_json
from crosslens.text import Blocks, Corpus, TextConfig, build_blocks
from reproduce.finetune import chat_style

Models = Mapping[str, LanguageModel]


@dataclass(frozen=True)
class Harvest:
    """Rows of all sites, by `base/resid_mid.15` and so on, on disk."""

    folder: Path
    layout: Layout
    median_P: Tensor
    counts: dict[str, int]
    """Rows on each side."""
    fingerprint: str
    tokens_per_s: float

    def rows(self, side: str) -> Tensor:
        """All rows of a side [N, X], bf16, mapped from the file."""
        return _mapped(self.folder / f"{side}.bin", (self.counts[side], self.layout.width))

    def blocks(self, side: str) -> Blocks:
        return Blocks.load(self.folder, side)

    def columns(self, sites: tuple[str, ...]) -> list[slice]:
        """Where each site lies."""
        return [self.layout.slice(site) for site in sites]


def harvest(
    models: Models, patterns: tuple[str, ...], text: tuple[int, int], folder: Path
) -> Harvest:
    """The harvest in `folder`, made if it is not there; `text` is (training, held-out) tokens.

    Rows that any site's outliers rule out are left out for every scheme, so that all of them see
    the same tokens.
    """
    layout = site_layout(models, patterns)
    wanted = {"sites": list(layout.sites), "text": list(text), "models": _identities(models)}
    done = folder / "harvest.json"
    if done.is_file() and load_json(done)["wanted"] == wanted:
        return _opened(folder, layout)
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    config = _text(models, text)
    split = build_blocks(config, next(iter(models.values())).tokenizer, 0)
    split.train.save(folder, "train")
    split.heldout.save(folder, "heldout")
    source = Source(models, layout, split.train, TokenPolicy())
    norms, _ = calibrate(source, Crosscoder()(layout, 1), 8192)
    source = replace(source, median_P=torch.tensor(norms.median))
    started = time.perf_counter()
    counts = {
        side: _write(replace(source, blocks=blocks), folder / f"{side}.bin")
        for side, blocks in (("train", split.train), ("heldout", split.heldout))
    }
    rate = (split.train.tokens_NT.numel() + split.heldout.tokens_NT.numel()) / (
        time.perf_counter() - started
    )
    facts = {"median": norms.median, "counts": counts, "fingerprint": split.fingerprint}
    save_json(done, {"wanted": wanted, **facts, "tokens_per_s": rate})
    return _opened(folder, layout)


def _opened(folder: Path, layout: Layout) -> Harvest:
    facts = load_json(folder / "harvest.json")
    median_P = torch.tensor(facts["median"])
    return Harvest(
        folder, layout, median_P, facts["counts"], facts["fingerprint"], facts["tokens_per_s"]
    )


def _identities(models: Models) -> dict[str, Any]:
    return {name: model.identity() for name, model in models.items()}


def _text(models: Models, text: tuple[int, int]) -> TextConfig:
    """Four fifths Python source, one fifth chat about it."""
    style: Any = chat_style(next(iter(models.values())).tokenizer)
    longest = min(model.max_positions or 256 for model in models.values())
    corpora = {
        "code": Corpus(source="stdlib", weight=0.8),
        "chat": Corpus(source="stdlib-chat", weight=0.2, chat=style),
    }
    return TextConfig(corpora=corpora, tokens=text[0], heldout=text[1], block=min(256, longest))


def _write(source: Source, file: Path) -> int:
    rows_NX = _mapped(file, (source.n_rows_at_most, source.layout.width))
    count = 0
    for index, chunk in enumerate(source):
        rows_RX = chunk.rows()
        rows_NX[count : count + len(rows_RX)] = rows_RX.to(torch.bfloat16)
        count += len(rows_RX)
        if index % 20 == 0:
            print(f"  {file.stem}: {count} of {len(rows_NX)} rows", flush=True)
    return count


def _mapped(file: Path, shape: tuple[int, int]) -> Tensor:
    return torch.from_file(str(file), shared=True, size=prod(shape), dtype=torch.bfloat16).view(
        shape
    )


class Batches:
    """Batches of some sites' rows, in an order that is the same for every scheme."""

    def __init__(self, harvest: Harvest, sites: tuple[str, ...], batch: int, seed: int) -> None:
        self.rows_NX, self.columns = harvest.rows("train"), harvest.columns(sites)
        self.batch, self.generator = batch, torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)

    def next(self, check: Callable[[], None]) -> Tensor:
        """Each row once before any twice."""
        check()
        while len(self.order) < self.batch:
            again = torch.randperm(len(self.rows_NX), generator=self.generator)
            self.order = torch.cat([self.order, again])
        picks, self.order = self.order[: self.batch], self.order[self.batch :]
        return torch.cat([self.rows_NX[:, span][picks] for span in self.columns], -1)

    def state(self) -> dict[str, Tensor]:
        return {}


def own_names(sites: tuple[str, ...], two_models: bool) -> tuple[str, ...]:
    """The names that a coder of one model gives its sites: without the model."""
    return sites if two_models else tuple(split_site(site)[1] for site in sites)


def scheme_source(
    models: Models, harvest: Harvest, sites: tuple[str, ...], two_models: bool
) -> Source:
    """The held-out text and the models of a scheme, to splice reconstructions into."""
    picked = harvest.layout.pick(sites)
    own = Layout(own_names(picked.sites, two_models), picked.widths)
    median_P = harvest.median_P[[harvest.layout.index(site) for site in picked.sites]]
    used = dict(models) if two_models else {"base": models["base"]}
    return Source(used, own, harvest.blocks("heldout"), TokenPolicy(), median_P)

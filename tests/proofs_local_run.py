"""A small finished run whose sites stand right before MLPs."""

from __future__ import annotations

from pathlib import Path

from crosslens.coder import BatchTopK
from crosslens.lm import ModelSpec
from crosslens.text import Corpus, TextConfig
from crosslens.training import (
    CoderConfig,
    FitConfig,
    Run,
    TrainConfig,
    create_run,
    open_models,
    train,
)


def make_local_run(folder: Path, model_folder: Path, *sites: str) -> Run:
    """A trained tiny run at these sites, without a store."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for i in range(30):
        body = "\n".join(f"\tline {i}-{j}: x = {i * j}, y = [{j}] * {i}" for j in range(8))
        (texts / f"{i}.txt").write_text(body, encoding="utf-8")
    config = TrainConfig(
        models={"base": ModelSpec(path=str(model_folder), dtype="float32", device="cpu")},
        sites=sites,
        text=TextConfig(
            corpora={"main": Corpus(source=str(texts))}, tokens=3000, heldout=900, block=64
        ),
        coder=CoderConfig(latents=48, activation=BatchTopK(k=4)),
        fit=FitConfig(
            steps=30,
            batch=256,
            dtype="float32",
            device="cpu",
            dead_after=2000,
            buffer_gb=0.01,
            calibration_tokens=512,
            log_every=10,
            heldout_every=30,
            heldout_rows=256,
            checkpoint_every=30,
        ),
    )
    run = create_run(folder / "run", config)
    train(run, open_models(config))
    return run

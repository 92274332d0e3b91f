"""A small finished run over text that is hard to show, for the tests of `explore`."""

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

HOSTILE = """</script><img src=x onerror="document.title='owned'">"""
FOREIGN = "مرحبا بالعالم 你好,世界 🙂🎉"


def make_run(folder: Path, model_folder: Path, out: str = "a <run>") -> Run:
    """A trained tiny run in `folder`, without a store."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for i in range(40):
        body = "\n".join(f"\tline {i}-{j}: {HOSTILE} {FOREIGN}\n    x = {i * j}" for j in range(4))
        (texts / f"<b>{i}.txt").write_text(body, encoding="utf-8")
    config = TrainConfig(
        models={"base": ModelSpec(path=str(model_folder), dtype="float32", device="cpu")},
        sites=("resid_post.1", "resid_post.3"),
        text=TextConfig(
            corpora={"main": Corpus(source=str(texts))}, tokens=4000, heldout=900, block=64
        ),
        coder=CoderConfig(latents=48, activation=BatchTopK(k=4)),
        fit=FitConfig(
            steps=40,
            batch=256,
            dtype="float32",
            device="cpu",
            dead_after=2000,
            buffer_gb=0.01,
            calibration_tokens=512,
            log_every=5,
            heldout_every=10,
            heldout_rows=256,
            checkpoint_every=40,
        ),
    )
    run = create_run(folder / out, config)
    train(run, open_models(config))
    return run

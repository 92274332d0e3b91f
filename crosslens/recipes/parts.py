"""What several recipes share: texts, loops, and the two penalties of January 2025."""

from __future__ import annotations

from crosslens.lm import ModelSpec
from crosslens.text import Corpus, TextConfig
from crosslens.training import FitConfig

DEAD_AFTER = 10_000_000
"""Tokens without firing after which a latent is dead: tokens, not batches, as Gao et al. count."""

GEMMA_PAIR = {
    "base": ModelSpec(path="google/gemma-2-2b"),
    "chat": ModelSpec(path="google/gemma-2-2b-it"),
}
"""The pair of Kissane et al. and of Minder et al.; the second model is the fine-tuned one."""

PILE = Corpus(source="monology/pile-uncopyrighted")
OPENWEBTEXT = Corpus(source="Skylion007/openwebtext")
FINEWEB_EDU = Corpus(source="EleutherAI/fineweb-edu-dedup-10b")


def web(corpus: Corpus, tokens: int, block: int = 1024) -> TextConfig:
    """One corpus, with 0.1 % of the training tokens held out (at most a million)."""
    heldout = min(1_000_000, tokens // 1000)
    return TextConfig(corpora={"main": corpus}, tokens=tokens, heldout=heldout, block=block)


def chat_and_web(chat: Corpus, corpus: Corpus, tokens: int) -> TextConfig:
    """Half chat, half web, in blocks of 1024, as in both published model comparisons."""
    corpora = {"main": corpus, "chat": chat}
    heldout = min(1_000_000, tokens // 1000)
    return TextConfig(corpora=corpora, tokens=tokens, heldout=heldout, block=1024)


def loop(rows: int, batch: int) -> FitConfig:
    """`rows` rows in steps of `batch`, for one large GPU."""
    return FitConfig(
        steps=rows // batch,
        batch=batch,
        dead_after=DEAD_AFTER,
        calibration_tokens=16_384,
        harvest_tokens=16_384,
        buffer_gb=16.0,
        log_every=100,
        heldout_every=1000,
        heldout_rows=16_384,
        checkpoint_every=2000,
    )

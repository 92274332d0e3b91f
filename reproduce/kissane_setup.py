"""The training of Kissane et al., as published and at a scale that two cores can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from crosslens.activations import TokenPolicy
from crosslens.coder import Transpose
from crosslens.lm import ModelSpec
from crosslens.recipes import RECIPES
from crosslens.text import Corpus, TextConfig
from crosslens.text.planted import SOURCES
from crosslens.training import Adam, FitConfig, TrainConfig
from reproduce.scheme_table import LR

BASE, CHANGED = "base", "chat"
THEIR_LAYERS, THEIR_L0, THEIR_WIDTH = 26, 81, 2304


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is smaller than theirs."""

    tokens: int
    heldout: int
    block: int
    latents: int
    steps: int
    batch: int
    dtype: str
    """Of the coder's products."""


def published() -> TrainConfig:
    """The recipe, untouched: Gemma 2 2B and its chat model, 400M tokens."""
    return RECIPES["kissane_diff"]()


def middle(n_layers: int) -> str:
    """The site as deep in a model of so many layers as theirs, `resid_pre.14` of 26."""
    return f"resid_pre.{round(14 / THEIR_LAYERS * n_layers)}"


def pair_of_specs(path: str, adapter: str, dtype: str) -> dict[str, ModelSpec]:
    """A model, and the same with an adapter."""
    spec = ModelSpec(path=path, dtype=dtype)
    return {BASE: spec, CHANGED: replace(spec, adapter=adapter)}


def small(specs: dict[str, ModelSpec], site: str, sizes: Sizes) -> TrainConfig:
    """The recipe with its scale and its learning rate changed; λ is still theirs."""
    recipe = published()
    return replace(
        recipe,
        models=specs,
        sites=(site,),
        text=_text(specs[CHANGED].adapter or "", sizes),
        policy=TokenPolicy(),
        coder=replace(recipe.coder, latents=sizes.latents),
        optimizer=replace(adam(recipe), lr=LR),
        fit=FitConfig(
            steps=sizes.steps,
            batch=sizes.batch,
            dtype=sizes.dtype,
            log_every=5,
            heldout_every=10**9,
            checkpoint_every=10**9,
        ),
    )


def at_published_rate(config: TrainConfig) -> TrainConfig:
    """The same with their learning rate."""
    return replace(config, optimizer=published().optimizer)


def aim(latents: int) -> int:
    """The L0 that is the same share of the latents as theirs."""
    return max(1, round(THEIR_L0 * latents / published().coder.latents))


def adam(config: TrainConfig) -> Adam:
    """The recipe's optimiser, which is Adam."""
    assert isinstance(config.optimizer, Adam)
    return config.optimizer


def start_norm(config: TrainConfig) -> float:
    """The norm that the recipe's decoders begin with in each model."""
    assert isinstance(config.coder.init, Transpose)
    return config.coder.init.decoder_norm


def _text(adapter: str, sizes: Sizes) -> TextConfig:
    """Half plain text, half chat as `User:`/`Assistant:` lines. A diff finds only what its text
    shows, so where a behaviour was planted half of the chat is of requests that may call for it."""
    planted = f"planted-{Path(adapter).name}"
    chats = ["stdlib-chat", *([planted] if planted in SOURCES else [])]
    corpora = {"plain": Corpus(source="stdlib", weight=0.5)} | {
        name: Corpus(source=name, weight=0.5 / len(chats), chat="plain") for name in chats
    }
    return TextConfig(
        corpora=corpora, tokens=sizes.tokens, heldout=sizes.heldout, block=sizes.block
    )


SCALED: tuple[tuple[str, Callable[[TrainConfig], object], str], ...] = (
    ("site", lambda c: c.sites[0], "as deep in the model: layer 14 of 26"),
    ("latents", lambda c: c.coder.latents, "their expansion, about 7·d"),
    ("distinct tokens", lambda c: c.text.tokens, "minutes on a CPU"),
    ("block", lambda c: c.text.block, "shorter blocks are harvested faster on a CPU"),
    ("batch", lambda c: c.fit.batch, "for more steps"),
    ("steps", lambda c: c.fit.steps, "minutes on a CPU"),
    ("rows read", lambda c: c.fit.steps * c.fit.batch, "steps times batch"),
    ("learning rate", lambda c: adam(c).lr, "the published one is for 97,656 steps"),
    ("λ", lambda c: c.objective.l1.weight, "searched, for the same share of latents active"),
    (
        "rows left out",
        lambda c: (
            f"beyond {c.policy.outlier_norm:g}× the median norm"
            if c.policy.outlier_norm
            else "none"
        ),
        "SmolLM2 has massive activations at some tokens",
    ),
)
"""What was changed, how to tell it, and why."""


def changes(ours: TrainConfig) -> list[dict[str, str]]:
    """Every number that is not the recipe's."""
    theirs = published()
    rows = [(what, _told(of(theirs)), _told(of(ours)), why) for what, of, why in SCALED]
    return [
        {"what": what, "theirs": a, "ours": b, "why": why} for what, a, b, why in rows if a != b
    ]


def _told(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""A recipe's twin that runs in seconds on a CPU: the same scheme, with everything small."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

from crosslens.coder import AbsTopK, Activation, BatchTopK, GroupMax, TopK
from crosslens.lm import ModelSpec
from crosslens.text import Corpus, TextConfig
from crosslens.training import FitConfig, Objective, TrainConfig

LATENTS = 96
"""Divided by every number of groups that a twin can have, and by its k."""
K = 4

FIT = FitConfig(
    steps=20,
    batch=64,
    dtype="float32",
    device="cpu",
    dead_after=300,
    calibration_tokens=512,
    harvest_tokens=256,
    log_every=5,
    heldout_every=10,
    heldout_rows=64,
    checkpoint_every=10,
)

TEXT = TextConfig(corpora={"main": Corpus(source="stdlib")}, tokens=1500, heldout=300, block=32)

TINY = ModelSpec(path="smollm2", dtype="float32", device="cpu")


def twin(config: TrainConfig) -> TrainConfig:
    """The same wiring, activation, terms, start and optimiser, for 20 steps on the built-in model.

    Rates and weights stay; lengths, sizes, k and the text are made small, and sites move to the
    first layers. A comparison of models needs a second one: `--models.chat.path`.
    """
    coder = replace(
        config.coder,
        latents=LATENTS,
        activation=_few(config.coder.activation),
        firing_rate=None if config.coder.firing_rate is None else 0.05,
    )
    optimizer: Any = config.optimizer
    return replace(
        config,
        models=dict.fromkeys(config.models, TINY),
        sites=_shallow(config.sites),
        text=TEXT,
        coder=coder,
        objective=_short(config.objective),
        optimizer=replace(optimizer, warmup=min(2, optimizer.warmup)),
        fit=replace(FIT, resample_every=10 if config.fit.resample_every else 0),
    )


def _few(activation: Activation) -> Activation:
    match activation:
        case TopK() | BatchTopK():
            start = None if activation.k_start is None else 2 * K
            return replace(activation, k=K, k_start=start)
        case AbsTopK() | GroupMax():
            return replace(activation, k=K)
        case _:
            return activation


def _short(objective: Objective) -> Objective:
    """Ramps that are told in steps or tokens become shares; k_aux and the L0 target shrink."""
    changed = {}
    for field in fields(objective):
        term: Any = getattr(objective, field.name)
        change: dict[str, Any] = {"ramp": 0.5} if isinstance(term.ramp, str) else {}
        if field.name == "aux":
            change["k"] = 2 * K
        if getattr(term, "target", None) is not None:
            change["target"] = float(K)
        changed[field.name] = replace(term, **change)
    return replace(objective, **changed)


def _shallow(sites: tuple[str, ...]) -> tuple[str, ...]:
    """Layers in order become 0, 1, 2 and 3, and later ones are left out; a glob becomes two."""
    layers = sorted({int(n) for site in sites for n in re.findall(r"\.(\d+)$", site)})[:4]
    found = []
    for site in sites:
        kind, _, layer = site.rpartition(".")
        numbers = [0, 1] if layer == "*" else [i for i, n in enumerate(layers) if str(n) == layer]
        found += [f"{kind}.{n}" for n in numbers]
    return tuple(found)

"""The trainings of the sweep: strengths of either penalty, and none at several numbers of active
latents, each with several seeds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from crosslens.coder import BatchTopK, Coder
from crosslens.training import (
    Adam,
    AuxK,
    CoderConfig,
    FitConfig,
    Interaction,
    Objective,
    TrainConfig,
)
from crosslens.training.fit import Hooks, fit
from crosslens.training.objective.interaction import Form
from crosslens.training.readers import Reader
from crosslens.training.upkeep import as_saved
from reproduce.scheme_table import LR
from reproduce.scheme_training import Rows, start

SEEDS = (0, 1, 2)
WEIGHTS: dict[Form, tuple[float, ...]] = {
    "exact": (0.03, 0.1, 0.2, 0.3, 0.5, 1.0),
    "paper": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
}
"""Beside an error that is divided by the variance. The two forms are of different sizes, and each
range goes from hardly any effect to a reconstruction that is clearly worse."""
FEWER = (0.5, 0.2, 0.1)
"""Shares of k for trainings without a penalty: what a worse reconstruction does by itself."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all trainings have in common."""

    site: str
    latents: int
    k: int
    steps: int
    batch: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """One training. With weight 0 the form does not matter."""

    weight: float
    form: Form
    k: int
    seed: int

    @property
    def family(self) -> str:
        """Which curve it is on: `none`, `exact` or `paper`."""
        return self.form if self.weight else "none"

    @property
    def name(self) -> str:
        """As its folder is called."""
        return f"{self.family}-{self.weight:g}-k{self.k}-seed{self.seed}"


def points(k: int, seeds: tuple[int, ...] = SEEDS) -> list[Point]:
    """All of them, seed by seed: without a penalty, the exact form, the paper's."""
    fewer = dict.fromkeys([k, *(max(1, round(share * k)) for share in FEWER)])
    found = []
    for seed in seeds:
        found += [Point(weight=0.0, form="exact", k=n, seed=seed) for n in fewer]
        found += [
            Point(weight=weight, form=form, k=k, seed=seed)
            for form, weights in WEIGHTS.items()
            for weight in weights
        ]
    return found


def config_of(point: Point, sizes: Sizes) -> TrainConfig:
    """A BatchTopK SAE at one MLP's input."""
    term = Interaction(weight=point.weight, form=point.form, ramp=0.2)
    rows = sizes.steps * sizes.batch
    return TrainConfig(
        sites=(sizes.site,),
        coder=CoderConfig(
            latents=sizes.latents, activation=BatchTopK(k=point.k, threshold_decay=0.98)
        ),
        objective=Objective(aux=AuxK(k=min(128, sizes.latents // 8)), interaction=term),
        optimizer=Adam(lr=LR, warmup=max(1, sizes.steps // 15)),
        fit=FitConfig(
            steps=sizes.steps,
            batch=sizes.batch,
            dtype=sizes.dtype,
            dead_after=max(1, rows // 5),
            log_every=10,
            heldout_every=10**9,
            checkpoint_every=10**9,
        ),
        seed=point.seed,
    )


@dataclass
class _Log:
    """The newest figures of the loop."""

    last: dict[str, Any] = field(default_factory=dict)

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        if "loss" in metrics:
            self.last = dict(metrics)


def trained(
    config: TrainConfig, rows: Rows, readers: tuple[Reader, ...]
) -> tuple[Coder, dict[str, Any]]:
    """One whole training: the coder as it would be saved, and what was seen last."""
    state, log = start(config, rows), _Log()
    began = time.perf_counter()
    hooks = Hooks(log, lambda _: None, lambda _: {})
    fit(config, state, rows.batches(config), hooks, readers)
    seconds = time.perf_counter() - began
    with as_saved(state, config.coder.unit_norm) as coder:
        kept = {name: value.clone() for name, value in coder.state_dict().items()}
    state.coder.load_state_dict(kept)
    return state.coder.eval(), {"seconds": seconds, "last": log.last}

"""Short trainings on random rows, with the whole code or with its entries only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crosslens.coder import Coder, Layout
from crosslens.training import TrainConfig
from crosslens.training import fit as loop
from crosslens.training.checkpoint import TrainState
from crosslens.training.fit import Hooks, fit
from crosslens.training.start import first_state
from reproduce.scheme_table import Scheme, sites_of
from reproduce.scheme_training import fill

LAYERS, WIDTH = (5, 15, 25), 12
SILENT = Hooks(lambda _: None, lambda _: None, lambda _: {})


@dataclass
class Noise:
    """The same random rows every time, and a third of the latents dead."""

    rows_BX: Tensor
    idle_L: Tensor

    def next(self, check: Any) -> Tensor:
        self.idle_L[::3] = 10**9
        return self.rows_BX

    def state(self) -> dict[str, Tensor]:
        return {}


def fresh_run(
    config: TrainConfig, scheme: Scheme, dtype: str = "float32"
) -> tuple[TrainState, Noise, TrainConfig]:
    torch.manual_seed(0)
    optimizer: Any = replace(config.optimizer, warmup=0)
    plan = replace(config.fit, dtype=dtype, log_every=1)
    config = replace(config, optimizer=optimizer, fit=plan)
    models = ("base/", "chat/") if scheme.two_models else ("",)
    sites = tuple(f"{model}{s}" for model in models for s in sites_of(scheme, LAYERS))
    layout = Layout(sites, (WIDTH,) * len(sites))
    coder = Coder(config.wiring(layout, config.coder.latents), config.coder.activation)
    coder.center = config.coder.center
    rows_BX = torch.randn(config.fit.batch, layout.width)
    fill(coder, config, rows_BX)
    state = first_state(coder, config)
    return state, Noise(rows_BX, state.idle_L), config


@dataclass(frozen=True)
class Ran:
    steps: list[dict[str, float]]
    was_sparse: list[bool]
    weights: dict[str, Tensor]
    idle_L: Tensor


def first_steps(config: TrainConfig, scheme: Scheme, below: float, n: int) -> Ran:
    """The first n steps of a training."""
    state, stream, config = fresh_run(config, scheme)
    state.coder.sparse_below = below
    told: list[dict[str, float]] = []
    sparse: list[bool] = []
    real = loop.train_pass

    def watched(coder: Coder, *args: Any, **kwargs: Any) -> Any:
        shown = real(coder, *args, **kwargs)
        sparse.append(shown.known is not None)
        return shown

    def log(metrics: dict[str, Any]) -> None:
        if "loss" not in metrics:
            return
        told.append({"loss": metrics["loss"], "grad": metrics["grad_norm"]})

    loop.train_pass = watched
    try:
        plan = replace(config.fit, steps=n)
        fit(replace(config, fit=plan), state, stream, replace(SILENT, log=log))
    finally:
        loop.train_pass = real
    return Ran(told, sparse, state.coder.state_dict(), state.idle_L)

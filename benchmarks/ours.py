"""crosslens as a contestant: its own loop, on rows that come when a step is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.task import Shape, Task, Tick
from crosslens.coder import BatchTopK, Coder, Crosscoder, Layout, transpose_init
from crosslens.training import Adam, CoderConfig, FitConfig, TrainConfig
from crosslens.training.fit import Hooks, fit
from crosslens.training.start import first_state

PACKAGE = "crosslens"
NEVER = 10**9


@dataclass
class Rows:
    """The same random rows every time; the loop waits here until a step is wanted."""

    rows_BX: Tensor
    tick: Tick

    def next(self, check: object) -> Tensor:
        self.tick()
        return self.rows_BX

    def state(self) -> dict[str, Tensor]:
        return {}


def train(task: Task, tick: Tick) -> None:
    """Steps of `fit`: BatchTopK, the default objective, gradients clipped to norm 1, Adam.

    No latent is dead here, and none is in the peers, so that no AuxK is at work in any of them.
    """
    config = config_of(task.shape, task.setting)
    layout = layout_of(task.shape)
    coder = Coder(Crosscoder()(layout, task.shape.latents), config.coder.activation)
    transpose_init(coder, 0.1, torch.Generator().manual_seed(0))
    state = first_state(coder, config)
    rows = Rows(task.rows().bfloat16(), tick)
    fit(config, state, rows, Hooks(lambda _: None, lambda _: None, lambda _: {}))


def layout_of(shape: Shape) -> Layout:
    """As many sites as the shape has."""
    names = tuple(f"resid_post.{i}" for i in range(shape.sites))
    return Layout(names, (shape.width,) * shape.sites)


HALF = "bfloat16 with moments in it"
"""The setting in which what Adam keeps is bfloat16, too."""


def config_of(shape: Shape, setting: str) -> TrainConfig:
    """A training that never ends, logs or saves."""
    dtype = "bfloat16" if setting == HALF else setting
    return TrainConfig(
        coder=CoderConfig(latents=shape.latents, activation=BatchTopK(k=shape.k)),
        optimizer=Adam(warmup=0, moments="bfloat16" if setting == HALF else "float32"),
        fit=FitConfig(
            steps=NEVER,
            batch=shape.batch,
            dtype=dtype,
            dead_after=NEVER,
            log_every=NEVER,
            heldout_every=NEVER,
            checkpoint_every=NEVER,
        ),
    )

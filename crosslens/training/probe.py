"""Short trials of what a training will do, where its speed is not known otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from crosslens.activations import Source
from crosslens.activations.filling import fill
from crosslens.coder import Coder, Layout, transpose_init
from crosslens.device import resolve_device
from crosslens.text import Blocks
from crosslens.training.config import TrainConfig
from crosslens.training.fit import Hooks, fit
from crosslens.training.objective import Interaction
from crosslens.training.optimizers import unscheduled
from crosslens.training.start import first_state
from crosslens.training.train import Models


def new_coder(config: TrainConfig, layout: Layout) -> Coder:
    """The configuration's coder, with no weights yet."""
    wiring = config.wiring(layout, config.coder.latents)
    return Coder(wiring, config.coder.activation, center=config.coder.center)


def harvest_rate(config: TrainConfig, models: Models, layout: Layout) -> float:
    """Positions harvested in a second: the faster of two chunks of random tokens, after one to warm
    up."""
    length = config.text.block
    per_chunk = max(1, config.fit.harvest_tokens // length)
    vocabulary = min(len(model.tokenizer) for model in models.values())
    tokens_NT = torch.randint(vocabulary, (3 * per_chunk, length), dtype=torch.int32)
    blocks = Blocks(tokens_NT, torch.zeros_like(tokens_NT), ("probe",), None, 0, ())
    source = Source(models, layout, blocks, config.policy, blocks_per_chunk=per_chunk)
    rows_NX = torch.empty(source.rows_per_chunk, layout.width, dtype=torch.bfloat16)
    slot_R = torch.arange(len(rows_NX))
    taken = []
    for index in range(source.n_chunks):
        began = time.perf_counter()
        fill(source, index, slot_R, rows_NX)
        taken.append(time.perf_counter() - began)
    return per_chunk * length / min(taken[1:])


class _Noise:
    """Batches of random rows, all alike."""

    def __init__(self, batch: int, layout: Layout) -> None:
        self.rows_BX = torch.randn(batch, layout.width).bfloat16()
        self.began: list[float] = []

    def next(self, check: Callable[[], None]) -> torch.Tensor:
        self.began.append(time.perf_counter())
        return self.rows_BX

    def state(self) -> dict[str, torch.Tensor]:
        return {}


def step_seconds(config: TrainConfig, layout: Layout, steps: int) -> float:
    """Seconds of one step on random rows, from `steps` of them after two to warm up. No latent is
    dead in so short a time: AuxK is idle; and `objective.interaction` is left out, since it
    needs the models' MLPs."""
    coder = new_coder(config, layout)
    transpose_init(coder, 0.1, torch.Generator().manual_seed(0))  # the start costs no step more
    coder.to(resolve_device(config.fit.device))
    last = steps + 2
    probe = replace(
        config,
        fit=replace(
            config.fit, steps=last, log_every=last, checkpoint_every=last, resample_every=0
        ),
        optimizer=unscheduled(config.optimizer),
        objective=replace(config.objective_in_shares(), interaction=Interaction()),
    )
    noise, state = _Noise(config.fit.batch, layout), first_state(coder, probe)
    fit(probe, state, noise, Hooks(lambda _: None, lambda _: None, lambda _: {}))
    return (noise.began[-1] - noise.began[1]) / steps

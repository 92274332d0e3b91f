"""What a training will take, from its shapes and a short probe; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from crosslens.activations import site_layout
from crosslens.coder import Coder, Layout, transpose_init
from crosslens.device import resolve_device, resolve_dtype
from crosslens.training.checkpoint import KEPT, TrainState
from crosslens.training.config import TrainConfig
from crosslens.training.fit import Hooks, fit, new_optimizer
from crosslens.training.optimizers import moments_kept, unscheduled
from crosslens.training.train import Models

FLOAT = 4
"""Bytes of a weight, of its gradient, and of each moment."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes in bytes, times in seconds, on this machine as it is now."""

    sites: dict[str, int]
    parameters: int
    epochs: float
    """How often each token will be used."""
    memory_coder: int
    """Weights, gradients, moments and the working tensors of one step."""
    memory_buffer: int
    disk: int
    harvest_tokens_per_s: float
    seconds_per_step: float
    seconds: float
    """Harvest and training together."""


def plan(config: TrainConfig, models: Models, probe_steps: int = 2) -> Plan:
    """Predict a run from its configuration, one forward pass and a few training steps."""
    layout = site_layout(models, config.sites)
    parameters = sum(p.numel() for p in _coder(config, layout).parameters())
    capacity = int(config.fit.buffer_gb * 1e9 / (2 * layout.width))
    epochs = config.fit.steps * config.fit.batch / config.text.tokens
    resident = config.text.tokens <= capacity
    harvested = config.text.tokens * (1 if resident else epochs)
    rate = _harvest_rate(config, models, layout)
    step = _step_seconds(config, layout, probe_steps)
    positions = config.text.tokens + config.text.heldout
    kept = moments_kept(config.optimizer)
    return Plan(
        sites=dict(zip(layout.sites, layout.widths, strict=True)),
        parameters=parameters,
        epochs=epochs,
        memory_coder=FLOAT * (2 + kept) * parameters + _working_bytes(config, layout, parameters),
        memory_buffer=2 * layout.width * min(capacity, config.text.tokens),
        disk=FLOAT * (1 + (1 + kept) * (KEPT + 1)) * parameters + 8 * positions,
        harvest_tokens_per_s=rate,
        seconds_per_step=step,
        seconds=harvested / rate + config.fit.steps * step,
    )


def check_sites(config: TrainConfig, layout: Layout) -> None:
    """Refuse a coder that cannot be made of the models' sites, or terms that it does not fit;
    needs no memory.

    Raises:
        UsageError: what is wrong with them.
    """
    with torch.device("meta"):
        coder = _coder(config, layout)
    config.objective.check_wiring(coder.wiring)


def _coder(config: TrainConfig, layout: Layout) -> Coder:
    wiring = config.wiring(layout, config.coder.latents)
    return Coder(wiring, config.coder.activation, center=config.coder.center)


def _working_bytes(config: TrainConfig, layout: Layout, parameters: int) -> int:
    """Copies of the weights and their gradients in the products' format, and what one step holds:
    pre-activations, scores, mask, code and their gradients; rows, targets, errors."""
    size = resolve_dtype(config.fit.dtype).itemsize
    per_row = config.coder.latents * (5 * size + 9) + layout.width * (3 * size + 20)
    return 2 * size * parameters + config.fit.batch * per_row


def _harvest_rate(config: TrainConfig, models: Models, layout: Layout) -> float:
    length = config.text.block
    shape = (max(1, config.fit.harvest_tokens // length), length)
    seconds = 0.0
    for name, model in models.items():
        prefix = "" if len(models) == 1 else f"{name}/"
        sites = [s.removeprefix(prefix) for s in layout.sites if s.startswith(prefix)]
        tokens_BT = torch.randint(len(model.tokenizer), shape)
        model.capture(tokens_BT, sites)  # the first pass also warms up
        started = time.perf_counter()
        model.capture(tokens_BT, sites)
        seconds += time.perf_counter() - started
    return shape[0] * shape[1] / seconds


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


def _step_seconds(config: TrainConfig, layout: Layout, steps: int) -> float:
    """Seconds of one step, from `steps` of them after one to warm up."""
    device = resolve_device(config.fit.device)
    coder = _coder(config, layout)
    transpose_init(coder, 0.1, torch.Generator().manual_seed(0))  # the start costs no step more
    coder.to(device)
    coder.compute_dtype = resolve_dtype(config.fit.dtype)
    idle_L = torch.zeros(config.coder.latents, dtype=torch.int64, device=device)
    last = steps + 2
    probe = replace(
        config,
        fit=replace(
            config.fit, steps=last, log_every=last, checkpoint_every=last, resample_every=0
        ),
        optimizer=unscheduled(config.optimizer),
        objective=config.objective_in_shares(),
    )
    noise = _Noise(config.fit.batch, layout)
    state = TrainState(coder, new_optimizer(coder, probe.optimizer), idle_L)
    fit(probe, state, noise, Hooks(lambda _: None, lambda _: None, lambda _: {}))
    return (noise.began[-1] - noise.began[1]) / steps

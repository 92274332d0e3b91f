"""Start a coder, and its training, as its configuration says."""

from __future__ import annotations

import torch
from torch import Tensor

from crosslens.coder import (
    Coder,
    center_at_median,
    center_biases,
    set_firing_rate,
    share_start,
    zero_decoders,
)
from crosslens.device import resolve_dtype
from crosslens.kernels.choice import break_even
from crosslens.training.checkpoint import TrainState
from crosslens.training.config import TrainConfig
from crosslens.training.optimizers import new_optimizer
from crosslens.training.step_cost import size_of
from crosslens.training.upkeep import renormalise_decoder


def first_state(coder: Coder, config: TrainConfig, sparse_below: float | None = None) -> TrainState:
    """A coder that has its first weights, on its device, as a training that has not begun.

    Args:
        sparse_below: what the run was begun with, if it was; else as configured, or as is fastest
            on this machine.
    """
    device, dtype = coder.b_enc.device, resolve_dtype(config.fit.dtype)
    coder.compute_dtype = dtype
    if sparse_below is None:
        sparse_below = config.fit.sparse_below
    if sparse_below is None:
        sparse_below = break_even(dtype, device, size_of(coder.wiring, config.fit.batch))
    coder.sparse_below = sparse_below
    idle_L = torch.zeros(coder.wiring.n_latents, dtype=torch.int64, device=device)
    return TrainState(coder, new_optimizer(coder, config.optimizer), idle_L)


@torch.no_grad()
def draw_weights(coder: Coder, config: TrainConfig, sample_RX: Tensor) -> None:
    """Fill the matrices; on the CPU, so that a seed draws the same on every machine.

    Args:
        sample_RX: harvested rows, raw.

    Raises:
        UsageError: the wiring has nothing that `coder.shared_start` or `init` could be applied to.
    """
    start = config.coder
    start.init(coder, sample_RX, torch.Generator().manual_seed(config.seed))
    if start.shared_start:
        share_start(coder, start.shared_start)
    if start.unit_norm:
        renormalise_decoder(coder)
    if start.zero_decoder:
        zero_decoders(coder)


@torch.no_grad()
def set_biases(coder: Coder, config: TrainConfig, sample_RX: Tensor) -> None:
    """Fill the biases, which depend on the weights; on the device of the coder and the sample,
    since a firing rate takes the product of all latents with all rows.

    Raises:
        UsageError: the sample is too small for `coder.firing_rate`.
    """
    start = config.coder
    match start.bias:
        case "mean":
            center_biases(coder, sample_RX.mean(0))
        case "geometric_median":
            center_at_median(coder, sample_RX)
    if start.firing_rate is not None:
        set_firing_rate(coder, sample_RX, start.firing_rate)

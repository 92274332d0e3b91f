"""Start a coder, and its training, as its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from crosslens.coder import (
    Coder,
    Wiring,
    center_at_median,
    center_biases,
    load,
    set_firing_rate,
    share_start,
    unfold,
    zero_decoders,
)
from crosslens.coder.artifact import coder_tensors, restore_tensors
from crosslens.config import kind_of
from crosslens.device import resolve_device, resolve_dtype
from crosslens.errors import UsageError
from crosslens.kernels.choice import break_even
from crosslens.lm import LanguageModel
from crosslens.training.checkpoint import TrainState
from crosslens.training.config import TrainConfig
from crosslens.training.optimizers import new_optimizer
from crosslens.training.readers import Reader, readers_of
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


def first_readers(
    config: TrainConfig, models: Mapping[str, LanguageModel], wiring: Wiring
) -> tuple[Reader, ...]:
    """The MLPs that `objective.interaction` looks at; none where it is switched off.

    Raises:
        UsageError: as `readers_of`.
    """
    term = config.objective.interaction
    if not term.weight:
        return ()
    device, dtype = resolve_device(config.fit.device), resolve_dtype(config.fit.dtype)
    found = readers_of(models, wiring, term.sites, term.n_blocks)
    return tuple(reader.to(device, dtype) for reader in found)


def starting_coder(config: TrainConfig, wiring: Wiring) -> Coder:
    """The coder that `config.start` names, in the units it was trained in.

    Raises:
        UsageError: it has another wiring, activation or centring than this training's.
        CrosslensError: it is missing or damaged.
    """
    assert config.start is not None
    coder = unfold(load(Path(config.start)))
    if _shape(coder.wiring) != _shape(wiring):
        raise UsageError(
            f"start: {config.start} has {_told(coder.wiring)}, and this training "
            f"{_told(wiring)}; or their latents read or write different ones of them. Give the "
            "wiring, the sites and coder.latents that it was trained with, or leave `start` out."
        )
    kinds = [kind_of(type(a)) for a in (coder.activation, config.coder.activation)]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"start: {config.start} has the activation {kinds[0]}, and coder.activation is "
            f"{kinds[1]}. Train with --coder.activation {kinds[0]}, or leave `start` out."
        )
    if coder.center != config.coder.center:
        raise UsageError(
            f"start: {config.start} was trained with coder.center {coder.center}, and this "
            f"training has {config.coder.center}. Give both the same, or leave `start` out."
        )
    return coder


def _shape(wiring: Wiring) -> tuple[object, ...]:
    """What a wiring is, whatever its sites are called."""
    groups = [
        replace(
            group,
            reads=tuple(str(wiring.read.index(site)) for site in group.reads),
            writes=tuple(str(wiring.write.index(site)) for site in group.writes),
        )
        for group in wiring.groups
    ]
    widths = (wiring.harvest.widths, wiring.read.widths, wiring.write.widths)
    return wiring.view, wiring.learnt_code, *widths, *groups


def _told(wiring: Wiring) -> str:
    widths = ", ".join(map(str, wiring.harvest.widths))
    return f"{wiring.n_latents} latents over sites of widths {widths}"


def begin(coder: Coder, config: TrainConfig, sample_RX: Tensor, device: torch.device) -> None:
    """Fill a coder, from `config.start` if that is given and else anew, and move it to `device`.

    Args:
        sample_RX: harvested rows, raw.

    Raises:
        UsageError: the start does not fit this training.
    """
    if config.start is not None:
        first = starting_coder(config, coder.wiring)
        restore_tensors(coder, coder_tensors(first), config.start)
        coder.to(device)
        return
    draw_weights(coder, config, sample_RX)
    coder.to(device)
    set_biases(coder, config, sample_RX.to(device))


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

"""What a training will take: from its shapes, from what `crosslens doctor --calibrate` measured,
and from a short probe of the models. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from crosslens.activations import other_tokenizers, site_layout
from crosslens.activations.swapped import exchange_of
from crosslens.coder import Coder, Layout, Wiring
from crosslens.coder.activations import entries_per_row
from crosslens.device import resolve_device, resolve_dtype
from crosslens.kernels.calibration import Rates, find
from crosslens.kernels.choice import break_even
from crosslens.text import build_blocks, coverage
from crosslens.training.chat import text_tokenizer
from crosslens.training.config import TrainConfig
from crosslens.training.footprint import buffer_rows, footprint
from crosslens.training.probe import (
    harvest_rate,
    interaction_seconds,
    new_coder,
    step_seconds,
)
from crosslens.training.readers import Reader
from crosslens.training.start import first_readers
from crosslens.training.step_cost import (
    entries,
    heldout_seconds,
    is_sparse,
    size_of,
    step_cost,
)
from crosslens.training.train import Models

_SAMPLE = 20_000
"""Tokens of text on which alignment is tried."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes in bytes, times in seconds, on this machine as it is now."""

    sites: dict[str, int]
    parameters: int
    epochs: float
    """How often each token will be used."""
    sparse: bool
    """Whether steps hold and multiply their code's entries only, from the start."""
    sparse_below: float
    """The share of entries below which they do."""
    memory_coder: int
    """Weights, moments and copies in the products' format."""
    memory_step: int
    """The working tensors of one step."""
    memory_buffer: int
    memory_models: int
    """What this process holds once the models are open and have run."""
    memory_peak: int
    """Of the process, all together; without what lies on an accelerator."""
    memory_device: int
    """Of that accelerator, beside the models; 0 where there is none."""
    disk: int
    """The run's directory at its end."""
    disk_peak: int
    """The same while a checkpoint is written."""
    harvest_tokens_per_s: float
    seconds_per_step: float
    seconds_per_sparse_step: float | None
    """The same once half of `sparse_below` is active, where the activation leaves that open; None
    where it does not, or that was not measured."""
    step_parts: dict[str, float]
    """Seconds of a step by part; empty where they were not told apart."""
    step_from: str
    """What the time of a step is known from."""
    seconds: float
    """Harvest and training together."""
    coverage: dict[str, float]
    """Share of each model's tokens that pair, on a sample of the text; empty where all models cut
    text alike."""


def plan(config: TrainConfig, models: Models, probe_steps: int = 2) -> Plan:
    """Predict a run from its configuration.

    Args:
        probe_steps: training steps that are tried where the machine is not calibrated.
    """
    layout = site_layout(models, config.sites, config.align)
    paired = _coverage(config, models)
    wiring = config.wiring(layout, config.coder.latents)
    parameters = sum(p.numel() for p in _shapes(config, layout).parameters())
    rate = harvest_rate(config, models, layout)
    opened = psutil.Process().memory_info().rss
    readers = first_readers(config, models, wiring)
    below = _sparse_below(config, wiring)
    sizes = footprint(config, wiring, parameters, is_sparse(config, below), readers)
    step = _step(config, layout, below, probe_steps)
    if readers:
        step = _with_interaction(step, config, wiring, readers, below)
    on_cpu = resolve_device(config.fit.device).type == "cpu"
    computing = sizes.coder + sizes.step
    return Plan(
        sites=dict(zip(layout.sites, layout.widths, strict=True)),
        parameters=parameters,
        epochs=config.fit.steps * config.fit.batch / config.text.tokens / _share(paired),
        sparse=is_sparse(config, below),
        sparse_below=below,
        memory_coder=sizes.coder,
        memory_step=sizes.step,
        memory_buffer=sizes.buffer,
        memory_models=opened,
        memory_peak=opened + sizes.buffer + (computing if on_cpu else 0),
        memory_device=0 if on_cpu else computing,
        disk=sizes.disk,
        disk_peak=sizes.disk_peak,
        harvest_tokens_per_s=rate,
        seconds_per_step=step.seconds,
        seconds_per_sparse_step=step.sparse,
        step_parts=step.parts,
        step_from=step.told,
        seconds=_harvested(config, wiring) / rate + _training_seconds(config, step),
        coverage=paired,
    )


def _coverage(config: TrainConfig, models: Models) -> dict[str, float]:
    """From a sample of the text; nothing where all models cut it alike."""
    others = other_tokenizers(models)
    if not others:
        return {}
    text, part = config.text, min(1.0, _SAMPLE / config.text.tokens)
    sample = replace(text, tokens=int(part * text.tokens), heldout=max(1, int(part * text.heldout)))
    first = next(iter(models))
    blocks = build_blocks(sample, text_tokenizer(models), config.seed, others).train
    return coverage(blocks, first).shares


def _share(paired: Mapping[str, float]) -> float:
    """Of the first model's tokens, those that are rows."""
    return next(iter(paired.values()), 1.0) or 1.0


def check_sites(config: TrainConfig, layout: Layout) -> None:
    """Refuse a coder that cannot be made of the models' sites, or terms that it does not fit;
    needs no memory.

    Raises:
        UsageError: what is wrong with them.
    """
    config.objective.check_wiring(_shapes(config, layout).wiring)
    if config.shuffle_models:
        exchange_of(layout, config.seed)


@dataclass(frozen=True)
class _Step:
    seconds: float
    parts: dict[str, float]
    told: str
    heldout: float
    """Seconds of one measurement on held-out rows."""
    sparse: float | None = None
    """Seconds of one that is sparse, as may come later in the run."""


def _step(config: TrainConfig, layout: Layout, below: float, probe_steps: int) -> _Step:
    """From the calibration; tried out where that says nothing of this configuration."""
    wiring = config.wiring(layout, config.coder.latents)
    found = find(resolve_device(config.fit.device))
    if found.calibration is None:
        why = f"{found.reason}: `crosslens doctor --calibrate`"
    else:
        size = size_of(wiring, config.fit.batch)
        rates = found.calibration.rates(resolve_dtype(config.fit.dtype), size)
        known = None if rates is None else _calibrated(config, wiring, rates, below)
        if known is not None:
            return known
        why = "not calibrated for this optimizer or number format"
    seconds = step_seconds(config, layout, probe_steps)
    share = config.fit.heldout_rows / config.fit.batch
    return _Step(seconds, {}, f"a probe ({why})", seconds * share / 2)


def _with_interaction(
    step: _Step, config: TrainConfig, wiring: Wiring, readers: tuple[Reader, ...], below: float
) -> _Step:
    """With what that term adds, which is tried out whatever the rest is known from."""
    k = entries_per_row(config.coder.activation, 1.0)
    active = k or max(1, round(below * config.coder.latents / 2))
    sparse = is_sparse(config, below)
    now = interaction_seconds(config, wiring, readers, active, sparse)
    later = None
    if step.sparse is not None:
        later = step.sparse + interaction_seconds(config, wiring, readers, active, True)
    return replace(
        step,
        seconds=step.seconds + now,
        parts={**step.parts, "interaction": now},
        told=f"{step.told}, objective.interaction from a probe",
        sparse=later,
    )


def _calibrated(config: TrainConfig, wiring: Wiring, rates: Rates, below: float) -> _Step | None:
    set_by_k = entries(config)
    now = step_cost(config, wiring, rates, set_by_k if is_sparse(config, below) else None)
    if now is None:
        return None
    later = None
    if set_by_k is None and not config.objective.needs_all_latents:
        later = step_cost(config, wiring, rates, below * config.coder.latents / 2)
    return _Step(
        seconds=now.seconds,
        parts=now.parts,
        told="the calibration",
        heldout=heldout_seconds(config, wiring, rates),
        sparse=None if later is None else later.seconds,
    )


def _training_seconds(config: TrainConfig, step: _Step) -> float:
    measured = config.fit.steps // config.fit.heldout_every + 1
    return config.fit.steps * step.seconds + measured * step.heldout


def _harvested(config: TrainConfig, wiring: Wiring) -> int:
    """Positions that go through the models: text that fits the buffer once; of other text the
    buffer's fill, and then half a buffer whenever half of it is used up."""
    capacity, used = buffer_rows(config, wiring), config.fit.steps * config.fit.batch
    trained = config.text.tokens
    if trained > capacity:
        trained = capacity + capacity // 2 * (2 * used // capacity)
    return trained + config.fit.heldout_rows + min(config.fit.calibration_tokens, trained)


def _sparse_below(config: TrainConfig, wiring: Wiring) -> float:
    """As `crosslens.training.start` has it for a new run."""
    if config.fit.sparse_below is not None:
        return config.fit.sparse_below
    dtype, device = resolve_dtype(config.fit.dtype), resolve_device(config.fit.device)
    return break_even(dtype, device, size_of(wiring, config.fit.batch))


def _shapes(config: TrainConfig, layout: Layout) -> Coder:
    """A coder that has shapes only, and takes no memory."""
    with torch.device("meta"):
        return new_coder(config, layout)

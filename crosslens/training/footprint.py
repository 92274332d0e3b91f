"""What a training takes of memory and of the disk, from its shapes alone. All in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from crosslens.coder import Wiring
from crosslens.coder.activations import entries_per_row
from crosslens.device import resolve_device, resolve_dtype
from crosslens.kernels.calibration import kernels_in_use
from crosslens.training.checkpoint import KEPT
from crosslens.training.config import TrainConfig
from crosslens.training.optimizers import SignSGD, bytes_kept
from crosslens.training.readers import Reader
from crosslens.training.step_cost import entries, size_of

FLOAT = 4
"""Bytes of a weight, of its gradient, and of each moment."""
SLOT = 8 + 8 + 8
"""Bytes that the buffer keeps for a row beside its activations: which it is, its place in the
order, and among those that are free."""
POSITION = 4
"""Bytes that count the uses of one position of the text."""
BEGUN, BACKWARD, AFTER = 3.0, 4.3, 2.2
"""Rows × latents tensors in the products' format that a step with its whole code holds when its
backward pass begins, at the peak of that, and when its weights are stepped."""
PAIR = 60
"""Bytes of one entry, with the index tensors that gather it and sort it by latent."""
ROWS_HELD = 7
"""Rows × width tensors in float32 that live at the peak of a step."""
BY_LATENT, BY_DECODER, BY_TOKEN = 2.5, 2.0, 4.0
"""Numbers that `objective.interaction` holds at its peak for each latent and column of neurons, for
each latent and number of its decoder at the site, and for each token and column."""
JUDGED = 1 + 8
"""Bytes, beside the code, with which active entries are counted on held-out rows."""
LINE = 450
"""Bytes of a line of the metrics."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Sizes in bytes."""

    coder: int
    """Weights, moments, and copies of the weights in the products' format."""
    step: int
    """What a step, or a measurement on held-out rows, holds at its peak."""
    buffer: int
    """Activations that wait to be trained on, and those held out."""
    disk: int
    """The run's directory at its end."""
    disk_peak: int
    """The same while the last checkpoint is written."""


def footprint(
    config: TrainConfig,
    wiring: Wiring,
    parameters: int,
    sparse: bool,
    readers: Sequence[Reader] = (),
) -> Footprint:
    """The sizes of a configuration.

    Args:
        parameters: of the coder.
        sparse: whether steps hold their code's entries only.
        readers: the MLPs that `objective.interaction` looks at.
    """
    each = FLOAT + bytes_kept(config.optimizer)
    size = resolve_dtype(config.fit.dtype).itemsize
    copies = 0 if size == FLOAT else size * parameters
    step: float
    if sparse:
        step = _entries_step(config, wiring) + _interaction(config, wiring, readers)
    else:
        step = _whole_step(config, wiring, parameters, readers)
    judged = _heldout_batch(config, wiring, parameters)
    slots = min(buffer_rows(config, wiring), config.text.tokens)
    width = wiring.harvest.width
    state = each * parameters + _stream(config, slots)
    saved = FLOAT * parameters + 8 * _positions(config) + LINE * _lines(config)
    checkpoints = min(KEPT, math.ceil(config.fit.steps / config.fit.checkpoint_every))
    return Footprint(
        coder=each * parameters + copies + sum(map(_reader_bytes, readers)),
        step=round(max(step, judged)),
        buffer=2 * width * (slots + config.fit.heldout_rows) + _stream(config, slots),
        disk=saved + checkpoints * state,
        disk_peak=saved + (checkpoints + 1) * state,
    )


def buffer_rows(config: TrainConfig, wiring: Wiring) -> int:
    """Rows that the activation buffer has room for."""
    return int(config.fit.buffer_gb * 1e9 / (2 * wiring.harvest.width))


def _entries_step(config: TrainConfig, wiring: Wiring) -> int:
    size = resolve_dtype(config.fit.dtype).itemsize
    one, aux = size_of(wiring, config.fit.batch), config.objective.aux
    pairs = one.rows * ((entries(config) or 0) + (aux.k // 2 if aux.weight > 0 else 0))
    held = one.rows * one.latents * size + PAIR * pairs + _rows_held(config, wiring)
    if kernels_in_use(resolve_device(config.fit.device)) == "stock":  # they sum a whole matrix
        held += 2 * FLOAT * one.latents * max(one.read, one.written)
    return held


def _whole_step(
    config: TrainConfig, wiring: Wiring, parameters: int, readers: Sequence[Reader]
) -> float:
    """The decoder's gradient is there at the peak of the backward pass, all are after it.

    That pass begins with `objective.interaction`, whose gradient to the code stays beside it.
    """
    size = resolve_dtype(config.fit.dtype).itemsize
    one = size_of(wiring, config.fit.batch)
    code, decoder = config.fit.batch * one.latents * size, one.latents * one.written
    unconverted = 0 if size == FLOAT else size * decoder
    backward = BACKWARD * code + FLOAT * decoder + unconverted
    after = AFTER * code + FLOAT * parameters
    begun = BEGUN * code + _interaction(config, wiring, readers)
    beside = code if readers else 0
    return max(backward + beside, after + beside, begun) + _rows_held(config, wiring)


def _interaction(config: TrainConfig, wiring: Wiring, readers: Sequence[Reader]) -> float:
    """What that term holds at the peak of its own backward pass: of each site, what the latents
    active on the sampled tokens put into one block of neurons, and their decoders at the site."""
    tokens = config.objective.interaction.share * config.fit.batch
    entries = entries_per_row(config.coder.activation, 1.0) or 0
    n = wiring.n_latents
    latents = n * -math.expm1(-tokens * entries / n)  # different ones, if all are active as often
    columns = sum(len(reader.blocks[0].fixed_W) for reader in readers)
    widths = sum(reader.blocks[0].through_DW.shape[0] for reader in readers)
    kept = latents * (BY_LATENT * columns + BY_DECODER * widths) + BY_TOKEN * tokens * columns
    return FLOAT * kept


def _reader_bytes(reader: Reader) -> int:
    return sum(block.through_DW.nbytes for block in reader.blocks)


def _heldout_batch(config: TrainConfig, wiring: Wiring, parameters: int) -> int:
    """The code, and which of it is active; averaged weights or decoders of norm 1 stand beside
    those that training goes on with."""
    size = resolve_dtype(config.fit.dtype).itemsize
    beside = parameters if isinstance(config.optimizer, SignSGD) else 0
    if config.coder.unit_norm:
        beside = parameters // 2
    rows = min(config.fit.batch, config.fit.heldout_rows)
    code = rows * wiring.n_latents * (size + JUDGED)
    return FLOAT * beside + code + _rows_held(config, wiring)


def _rows_held(config: TrainConfig, wiring: Wiring) -> int:
    width = (wiring.read.width + wiring.write.width) // 2
    return ROWS_HELD * FLOAT * config.fit.batch * width


def _stream(config: TrainConfig, slots: int) -> int:
    return SLOT * slots + POSITION * config.text.tokens


def _positions(config: TrainConfig) -> int:
    return config.text.tokens + config.text.heldout


def _lines(config: TrainConfig) -> int:
    fit = config.fit
    return fit.steps // fit.log_every + fit.steps // fit.heldout_every

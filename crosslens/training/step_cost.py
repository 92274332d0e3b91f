"""How long a configuration's training step takes on a machine of known rates.

The counts of products and gathers are in `crosslens.kernels.cost`; here is what training does
around them.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosslens.coder import BatchTopK, Gated, JumpReLU, TopK, Wiring
from crosslens.coder.activations import entries_per_row, k_at
from crosslens.device import resolve_dtype
from crosslens.kernels import cost
from crosslens.kernels.calibration import Rates, Size
from crosslens.training.config import TrainConfig
from crosslens.training.optimizers import Adam

ROW_PASSES = 20.0
"""Rows × width tensors in float32 that a step writes: scaled rows, the error, its square, the
batch's spread, and their gradients."""
AUX_PASSES = 8.0
"""More of them for AuxK's error of the error."""
PREFIX_PASSES = 4.0
"""More of them for each prefix of a Matryoshka objective."""
STARTED = 2000
"""Operations started in a step, however small its tensors are."""
DEAD = 1 / 80
"""Share of latents that are dead while training goes well, for which AuxK has entries."""
EFFORTS = {BatchTopK: 80.0, JumpReLU: 50.0, Gated: 70.0}
"""What an activation does for each pre-activation where the whole code is held, in multiplications
in cache; the others: `PLAIN`."""
PLAIN = 30.0
TERM_EFFORTS = {
    "l1": 10.0,
    "tanh": 60.0,
    "quadratic_tanh": 100.0,
    "p_anneal": 150.0,
    "l0": 40.0,
    "pre_act": 25.0,
    "gated_l1": 40.0,
    "gated_aux": 40.0,
}
"""The same of a term of the objective."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step, by part."""

    parts: cost.Parts

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def size_of(wiring: Wiring, rows: int) -> Size:
    """A step of so many rows through a coder of this wiring."""
    read = sum(g.n_latents * wiring.read.pick(g.reads).width for g in wiring.groups)
    written = sum(
        g.n_latents * wiring.write.pick(g.writes).width // g.copies for g in wiring.groups
    )
    n = wiring.n_latents
    return Size(rows=rows, read=round(read / n), written=round(written / n), latents=n)


def entries(config: TrainConfig) -> int | None:
    """Entries of a row that a step's codes hold, those of AuxK left out; None where the activation
    does not set them."""
    activation = config.coder.activation
    k = entries_per_row(activation, 1.0)
    if k is None:
        return None
    more = config.objective.multi_topk
    extra = more.factor * k_at(activation, 1.0) if isinstance(activation, TopK) else 0
    return k + (extra if more.weight > 0 else 0)


def is_sparse(config: TrainConfig, below: float) -> bool:
    """Whether steps hold entries only, from the start.

    Args:
        below: the share of entries below which they do.
    """
    k = entries_per_row(config.coder.activation, 1.0)
    if k is None or config.objective.needs_all_latents:
        return False
    return k < below * config.coder.latents


def step_cost(
    config: TrainConfig, wiring: Wiring, rates: Rates, active: float | int | None
) -> StepCost | None:
    """What the counts say; None for optimisers other than Adam, of which nothing was measured.

    Args:
        active: entries per row that the step holds, those of AuxK left out; None: the whole code.
    """
    if not isinstance(config.optimizer, Adam):
        return None
    dtype, size = resolve_dtype(config.fit.dtype), size_of(wiring, config.fit.batch)
    parts = cost.shared(rates, size, dtype)
    if active is None:
        parts |= cost.with_whole_code(rates, size, dtype, _effort(config))
    else:
        parts |= cost.with_entries(rates, size, dtype, active)
        if config.optimizer.beta1 == 0:  # only rows with a gradient are written
            parts["optimizer"] *= min(1.0, size.rows * active / size.latents)
    parts |= {"rows": _row_seconds(config, wiring, rates), "starting": STARTED / rates.calls}
    if _has_dead(config):
        parts["aux"] = _aux_seconds(config, size, rates)
    if config.coder.unit_norm:  # its norm and its division, the gradient's share and its removal
        parts["unit norm"] = 4 * size.latents * size.written / rates.norms
    return StepCost(parts)


def _aux_seconds(config: TrainConfig, size: Size, rates: Rates) -> float:
    """The few dead latents stay in cache while rows are decoded, and each has nearly all rows."""
    dead = max(1, round(DEAD * size.latents))
    pairs = size.rows * min(config.objective.aux.k, dead)
    summed = rates.sum_seconds(dead, size.read + size.written, pairs)
    return 2 * (summed + pairs / rates.sort) + pairs / rates.take


def heldout_seconds(config: TrainConfig, wiring: Wiring, rates: Rates) -> float:
    """One measurement on the held-out rows: both products, and the whole code."""
    size = size_of(wiring, config.fit.heldout_rows)
    dtype = resolve_dtype(config.fit.dtype)
    parts = cost.shared(rates, size, dtype) | cost.with_whole_code(rates, size, dtype, PLAIN)
    return parts["encoder"] + parts["decoder"] + parts["selection"]


def _effort(config: TrainConfig) -> float:
    terms = sum(TERM_EFFORTS.get(name, 0.0) for name, _ in config.objective.active())
    return EFFORTS.get(type(config.coder.activation), PLAIN) + terms


def _row_seconds(config: TrainConfig, wiring: Wiring, rates: Rates) -> float:
    nested = config.objective.matryoshka
    passes = ROW_PASSES + (AUX_PASSES if _has_dead(config) else 0)
    passes += PREFIX_PASSES * len(nested.fractions) if nested.weight > 0 else 0
    width = (wiring.read.width + wiring.write.width) // 2
    return passes * rates.pass_seconds(cost.FLOAT * config.fit.batch * width)


def _has_dead(config: TrainConfig) -> bool:
    """Whether AuxK has work for most of the run."""
    rows = config.fit.steps * config.fit.batch
    return config.objective.aux.weight > 0 and rows > 2 * config.fit.dead_after

"""Train one scheme on the harvest, and find the penalty that gives it the L0 of the others."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from crosslens.activations import row_norms
from crosslens.coder import Coder, Wiring, all_rows
from crosslens.evaluation import reconstruction
from crosslens.training import TrainConfig
from crosslens.training.checkpoint import TrainState
from crosslens.training.fit import Hooks, fit
from crosslens.training.start import draw_weights, first_state, set_biases
from crosslens.training.upkeep import as_saved
from reproduce.scheme_rows import Batches, Harvest, own_names
from reproduce.scheme_table import with_weight

SAMPLE = 8192
"""Rows that scales and starts rest on."""
ROWS = 2048
"""Rows encoded at a time when judging."""
NEAR = 1.25
"""An L0 within this factor of the aim is near enough."""
TRIALS = 6
"""Whole trainings, at most, to find a penalty's weight; the nearest is the one that counts."""
STRIDE = 10.0
"""Factor between two weights while all that were tried lie on one side of the aim."""
LEAST = 0.1
"""L0 below which a code counts as empty."""


@dataclass(frozen=True)
class Rows:
    """A scheme's rows: what it trains on, starts from, and is judged by."""

    harvest: Harvest
    sites: tuple[str, ...]
    two_models: bool

    def batches(self, config: TrainConfig) -> Batches:
        return Batches(self.harvest, self.sites, config.fit.batch, config.seed)

    def sample(self) -> Tensor:
        """Rows [R, X] from all over the training text, raw."""
        n = min(SAMPLE, self.harvest.counts["train"])
        return Batches(self.harvest, self.sites, n, seed=1).next(lambda: None).float()

    def heldout(self) -> Tensor:
        """All held-out rows [R, X]."""
        rows_NX = self.harvest.rows("heldout")
        return torch.cat([rows_NX[:, span] for span in self.harvest.columns(self.sites)], -1)

    def wiring(self, config: TrainConfig) -> Wiring:
        picked = self.harvest.layout.pick(self.sites)
        own = replace(picked, sites=own_names(picked.sites, self.two_models))
        return config.wiring(own, config.coder.latents)


@dataclass
class _Log:
    """The newest L0 and the FVU of every few steps, on training batches."""

    l0: float = float("nan")
    fvu: list[float] = field(default_factory=list)

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        if "l0" in metrics:
            self.l0 = metrics["l0"]
            self.fvu.append(round(metrics["fvu"], 4))

    def hooks(self) -> Hooks:
        return Hooks(self, lambda _: None, lambda _: {})


def start(config: TrainConfig, rows: Rows) -> TrainState:
    """A coder with its scales and first weights."""
    wiring, sample_RX = rows.wiring(config), rows.sample()
    coder = Coder(wiring, config.coder.activation, center=config.coder.center)
    given = all_rows(wiring, sample_RX)
    with torch.no_grad():
        coder.scale_read.copy_(_scale(config, wiring, given.x_BX, wiring.read.widths))
        coder.scale_write.copy_(_scale(config, wiring, given.y_BY, wiring.write.widths))
    fill(coder, config, sample_RX)
    return first_state(coder, config)


def fill(coder: Coder, config: TrainConfig, sample_RX: Tensor) -> None:
    """A coder's first weights and biases, as `crosslens train` sets them."""
    draw_weights(coder, config, sample_RX)
    set_biases(coder, config, sample_RX)


def _scale(config: TrainConfig, wiring: Wiring, rows_BX: Tensor, widths: tuple[int, ...]) -> Tensor:
    """One factor per site, as `crosslens.activations.calibrate` has it."""
    if wiring.n_codes:
        rows_BX, widths = rows_BX.view(-1, wiring.harvest.width), wiring.harvest.widths
    norm_RP = row_norms(rows_BX.split(list(widths), -1))
    if config.coder.scale == "unit_square":
        return norm_RP.square().mean(0).rsqrt()
    return torch.tensor(widths).sqrt() / norm_RP.mean(0)


@dataclass(frozen=True)
class Trained:
    """A coder as it would be saved, and what its training took."""

    coder: Coder
    seconds: float
    fvu_curve: list[float]


def train(config: TrainConfig, rows: Rows) -> Trained:
    """One whole training; its start is not timed."""
    state, batches, log = start(config, rows), rows.batches(config), _Log()
    started = time.perf_counter()
    fit(config, state, batches, log.hooks())
    seconds = time.perf_counter() - started
    with as_saved(state, config.coder.unit_norm) as coder:
        kept = {name: value.clone() for name, value in coder.state_dict().items()}
    state.coder.load_state_dict(kept)
    return Trained(state.coder.eval(), seconds, log.fvu)


@dataclass(frozen=True)
class Match:
    """A training whose penalty gives nearly the L0 wanted."""

    weight: float
    l0: float
    """On held-out rows."""
    trained: Trained


def matched(
    config: TrainConfig, rows: Rows, penalty: str, l0: int, trials: int = TRIALS
) -> list[Match]:
    """Whole trainings in search of an L0 near `l0`, the nearest one last."""
    weight = getattr(config.objective, penalty).weight
    tried: list[Match] = []
    for _ in range(trials):
        trained = train(with_weight(config, penalty, weight), rows)
        found = heldout_l0(trained.coder, rows)
        tried.append(Match(weight, found, trained))
        if 1 / NEAR <= found / l0 <= NEAR:
            break
        weight = next_weight([(each.weight, each.l0) for each in tried], l0)
    return sorted(tried, key=lambda each: -abs(math.log(max(each.l0, LEAST) / l0)))


def next_weight(tried: Sequence[tuple[float, float]], l0: float) -> float:
    """Where to look next, given (weight, L0) pairs: outwards until the aim lies between two of
    them, then where the line through those, in logarithms, meets it."""
    too_weak = [each for each in tried if each[1] > l0]
    too_strong = [each for each in tried if each[1] <= l0]
    if not too_strong:
        return max(tried)[0] * STRIDE
    if not too_weak:
        return min(tried)[0] / STRIDE
    (low, above), (high, below) = max(too_weak), min(too_strong)
    drop = math.log(above / max(below, LEAST))
    share = min(0.8, max(0.2, math.log(above / l0) / drop))
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def heldout_l0(coder: Coder, rows: Rows) -> float:
    """Mean L0 over the first held-out rows."""
    return reconstruction(coder, rows.heldout()[:SAMPLE].split(ROWS)).l0

"""The loop: batches in, a trained coder out."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from crosslens import functional as F
from crosslens.coder import Coder, JumpReLU, Pass, train_pass, training_rows
from crosslens.errors import Diverged, Interrupted
from crosslens.training.checkpoint import TrainState
from crosslens.training.config import TrainConfig
from crosslens.training.objective import Beside
from crosslens.training.optimizers import new_optimizer
from crosslens.training.readers import Reader
from crosslens.training.row_steps import Gathered, clipped, separate
from crosslens.training.schedule import length_in_steps, share_of_run, warmup_then_decay
from crosslens.training.upkeep import (
    as_saved,
    project_decoder_gradient,
    renormalise_decoder,
    resample,
)

__all__ = ["Hooks", "Metrics", "StopRequest", "Stream", "fit", "graceful_stop", "new_optimizer"]

Metrics = dict[str, Any]


@runtime_checkable
class Stream(Protocol):
    """Where batches come from."""

    def next(self, check: Callable[[], None]) -> Tensor:
        """The next batch. `check` is called now and then and may raise; `state` is then as it was
        before the call."""
        ...

    def state(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Hooks:
    """What the loop tells the outside world."""

    log: Callable[[Metrics], None]
    save: Callable[[TrainState], None]
    heldout: Callable[[Coder], Mapping[str, Any]]


@dataclass
class StopRequest:
    """Set by the first Ctrl-C; the loop ends after the step in hand."""

    asked: bool = False

    def check(self) -> None:
        """Raise Interrupted once it is set."""
        if self.asked:
            raise Interrupted("Stopped on request.")

    _old: dict[signal.Signals, Any] = field(default_factory=dict)


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts as it always did."""
    request = StopRequest()
    signals = (signal.SIGINT, signal.SIGTERM)

    def ask(_number: int, _frame: FrameType | None) -> None:
        request.asked = True
        for each in signals:
            signal.signal(each, request._old[each])

    try:
        for each in signals:
            request._old[each] = signal.signal(each, ask)
    except ValueError:  # not in the main thread: signals cannot be caught there, and need not be
        pass
    try:
        yield request
    finally:
        for caught, handler in request._old.items():
            signal.signal(caught, handler)


def fit(
    config: TrainConfig,
    state: TrainState,
    stream: Stream,
    hooks: Hooks,
    readers: tuple[Reader, ...] = (),
) -> None:
    """Train from `state.step` to `config.fit.steps`, in place.

    Args:
        readers: the MLPs that `objective.interaction` looks at, where it is switched on.

    Raises:
        Diverged: the loss stopped being finite; nothing is saved after that step.
        Interrupted: Ctrl-C; a checkpoint was saved.
    """
    plan = config.fit
    config = replace(config, objective=config.objective_in_shares())
    bad_step = torch.full((), -1, device=state.idle_L.device)
    with graceful_stop() as stop:
        while state.step < plan.steps:
            x_BX = _next_rows(state, stream, hooks, stop).to(state.idle_L.device)
            last = _step(config, state, x_BX, readers)
            bad_step = torch.where((bad_step < 0) & ~last.loss.isfinite(), state.step, bad_step)
            state.step += 1
            at_end = state.step == plan.steps
            stopping = stop.asked  # once: a request that comes later waits for the next step
            saving = state.step % plan.checkpoint_every == 0 or at_end or stopping
            if state.step % plan.log_every == 0 or saving:
                _refuse_divergence(bad_step)
                hooks.log(_measured(config, state, last))
            if state.step % plan.heldout_every == 0 or at_end:
                with as_saved(state, config.coder.unit_norm) as coder:
                    hooks.log({"step": state.step, "heldout": hooks.heldout(coder)})
            if last.resampled:
                hooks.log({"step": state.step, "resampled": last.resampled})
            if saving:
                hooks.save(state)
            del last  # or its rows × latents tensors would stay through the next step
            if stopping and not at_end:
                raise Interrupted(f"Stopped after step {state.step}; everything is saved.")


def _next_rows(state: TrainState, stream: Stream, hooks: Hooks, stop: StopRequest) -> Tensor:
    """A batch; harvesting one can take minutes, so a stop is heard meanwhile."""
    try:
        return stream.next(stop.check)
    except Interrupted:
        if state.step == 0:
            raise Interrupted("Stopped before the first step; `crosslens resume` starts.") from None
        hooks.save(state)
        raise Interrupted(f"Stopped after step {state.step}; everything is saved.") from None


def _rate(config: TrainConfig, step: int) -> float:
    """The factor of the learning rate at 0-based `step`."""
    optimizer, plan = config.optimizer, config.fit
    warmup = length_in_steps(optimizer.warmup, plan.batch, "optimizer.warmup")
    decay = share_of_run(optimizer.decay, plan.steps, plan.batch, "optimizer.decay")
    return warmup_then_decay(step, plan.steps, warmup, decay, optimizer.rise)


@dataclass(frozen=True)
class _Step:
    """What one step leaves to be told."""

    shown: Pass
    parts: dict[str, Tensor]
    loss: Tensor
    grad: Tensor
    """Norm of the gradient before clipping."""
    lr: float
    resampled: int


def _step(
    config: TrainConfig, state: TrainState, x_BX: Tensor, readers: tuple[Reader, ...]
) -> _Step:
    coder = state.coder.train()
    dead_L = state.idle_L >= config.fit.dead_after
    # From seed and step alone, so that going on after a stop draws the same.
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.step)
    rows = training_rows(coder.wiring, x_BX, generator)
    done, whole = state.step / config.fit.steps, config.objective.needs_all_latents
    shown = train_pass(coder, rows, dead_L, done, all_latents=whole)
    loss, parts = config.objective(shown, Beside(readers, generator))
    torch.autograd.backward(loss)
    factor = _rate(config, state.step)
    grad, gathered = _gradients(config, coder, shown)
    state.optimizer.step(factor, gathered)
    fired_L = F.fires(shown.code)
    state.idle_L.add_(len(shown.code)).masked_fill_(fired_L, 0)
    resampled = 0
    if _resamples(config, state.step + 1):
        dead_L = state.idle_L >= config.fit.dead_after
        resampled = resample(state, rows, shown, dead_L, generator)
    lr = config.optimizer.lr * factor
    return _Step(shown, parts, loss.detach(), grad, lr, resampled)


def _gradients(config: TrainConfig, coder: Coder, shown: Pass) -> tuple[Tensor, Gathered | None]:
    """The norm of all gradients, which are then projected and clipped, and those that are not in
    `.grad`."""
    unit_norm = config.coder.unit_norm
    gathered = None
    if shown.gradients is not None:
        fixed = frozenset(coder.W_dec) if unit_norm else frozenset()
        gathered = separate(Gathered(shown.gradients.by_latent(), fixed))
    if unit_norm:  # in this order (Gao et al. 2024): the step may leave norm 1 again
        renormalise_decoder(coder)
        project_decoder_gradient(coder)
    clip = math.inf if config.optimizer.clip is None else config.optimizer.clip
    return clipped(coder.parameters(), gathered, clip)


def _resamples(config: TrainConfig, done: int) -> bool:
    """Whether dead latents start afresh after so many steps; never at the very end."""
    every = config.fit.resample_every
    return every > 0 and done % every == 0 and done < config.fit.steps


@torch.no_grad()
def _measured(config: TrainConfig, state: TrainState, last: _Step) -> Metrics:
    shown, coder = last.shown, state.coder
    error = (shown.target_BY - shown.recon_BY).square().sum()
    spread = (shown.target_BY - shown.target_BY.mean(0)).square().sum()
    values = {
        "loss": last.loss,
        **last.parts,
        "fvu": error / spread,
        "l0": F.count_entries(shown.code) / len(shown.code),
        "dead": (state.idle_L >= config.fit.dead_after).float().mean(),
        "grad_norm": last.grad,
    }
    if isinstance(coder.activation, JumpReLU):
        values["threshold"] = coder.activation.thresholds(coder).mean()
    elif coder.threshold is not None:
        values["threshold"] = coder.threshold
    read = torch.stack([v.float() for v in values.values()]).tolist()
    told = {"step": state.step, "rows": state.step * config.fit.batch}
    return told | dict(zip(values, read, strict=True)) | {"lr": last.lr}


def _refuse_divergence(bad_step: Tensor) -> None:
    step = int(bad_step)
    if step >= 0:
        raise Diverged(
            f"The loss is not finite at step {step}: training has diverged, and the last good "
            "checkpoint is kept. Lower --optimizer.lr, lengthen its warm-up, or train in float32."
        )

"""The loop: batches in, a trained coder out."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from crosslens.coder import Coder, Pass, training_rows
from crosslens.errors import Diverged, Interrupted
from crosslens.training.checkpoint import TrainState
from crosslens.training.config import OptimizerConfig, TrainConfig
from crosslens.training.schedule import warmup_then_decay

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


def new_optimizer(coder: Coder, config: OptimizerConfig) -> torch.optim.Adam:
    """Adam over all weights of the coder, in one fused pass."""
    return torch.optim.Adam(
        coder.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def fit(config: TrainConfig, state: TrainState, stream: Stream, hooks: Hooks) -> None:
    """Train from `state.step` to `config.fit.steps`, in place.

    Raises:
        Diverged: the loss stopped being finite; nothing is saved after that step.
        Interrupted: Ctrl-C; a checkpoint was saved.
    """
    plan = config.fit
    bad_step = torch.full((), -1, device=state.idle_L.device)
    with graceful_stop() as stop:
        while state.step < plan.steps:
            x_BX = _next_rows(state, stream, hooks, stop).to(state.idle_L.device)
            lr = _set_rate(config, state)
            shown, parts, loss, grad = _step(config, state, x_BX)
            bad_step = torch.where((bad_step < 0) & ~loss.isfinite(), state.step, bad_step)
            state.step += 1
            at_end = state.step == plan.steps
            stopping = stop.asked  # once: a request that comes later waits for the next step
            saving = state.step % plan.checkpoint_every == 0 or at_end or stopping
            if state.step % plan.log_every == 0 or saving:
                _refuse_divergence(bad_step)
                hooks.log(_measured(config, state, shown, parts, loss, grad) | {"lr": lr})
            if state.step % plan.heldout_every == 0 or at_end:
                hooks.log({"step": state.step, "heldout": hooks.heldout(state.coder)})
            if saving:
                hooks.save(state)
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


def _set_rate(config: TrainConfig, state: TrainState) -> float:
    optimizer = config.optimizer
    factor = warmup_then_decay(state.step, config.fit.steps, optimizer.warmup, optimizer.decay)
    for group in state.optimizer.param_groups:
        group["lr"] = optimizer.lr * factor
    return optimizer.lr * factor


def _step(
    config: TrainConfig, state: TrainState, x_BX: Tensor
) -> tuple[Pass, dict[str, Tensor], Tensor, Tensor]:
    coder = state.coder.train()
    dead_L = state.idle_L >= config.fit.dead_after
    # From seed and step alone, so that going on after a stop draws the same.
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.step)
    rows = training_rows(coder.wiring, x_BX, generator)
    shown = coder.train_pass(rows, dead_L, state.step / config.fit.steps)
    loss, parts = config.objective(shown)
    loss.backward()  # type: ignore[no-untyped-call]
    grad = torch.nn.utils.clip_grad_norm_(coder.parameters(), config.optimizer.clip)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    fired_L = (shown.z_BL != 0).any(0)
    state.idle_L.add_(len(shown.z_BL)).masked_fill_(fired_L, 0)
    return shown, parts, loss.detach(), grad


@torch.no_grad()
def _measured(
    config: TrainConfig,
    state: TrainState,
    shown: Pass,
    parts: Mapping[str, Tensor],
    loss: Tensor,
    grad: Tensor,
) -> Metrics:
    error = (shown.target_BY - shown.recon_BY).square().sum()
    spread = (shown.target_BY - shown.target_BY.mean(0)).square().sum()
    values = {
        "loss": loss,
        **parts,
        "fvu": error / spread,
        "l0": (shown.z_BL != 0).sum(-1).float().mean(),
        "dead": (state.idle_L >= config.fit.dead_after).float().mean(),
        "grad_norm": grad,
    }
    if state.coder.threshold is not None:
        values["threshold"] = state.coder.threshold.mean()
    read = torch.stack([v.float() for v in values.values()]).tolist()
    rows = state.step * config.fit.batch
    return {"step": state.step, "rows": rows} | dict(zip(values, read, strict=True))


def _refuse_divergence(bad_step: Tensor) -> None:
    step = int(bad_step)
    if step >= 0:
        raise Diverged(
            f"The loss is not finite at step {step}: training has diverged, and the last good "
            "checkpoint is kept. Lower --optimizer.lr, lengthen its warm-up, or train in float32."
        )

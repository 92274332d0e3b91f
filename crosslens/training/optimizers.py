"""How weights are stepped. Each optimiser is its own configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from crosslens.coder import Coder
from crosslens.errors import CrosslensError, UsageError
from crosslens.training.descent import AdamInHalf, AdamWithoutMoment, ScheduleFreeSign
from crosslens.training.row_steps import Gathered, StepsRows, step_rows
from crosslens.training.schedule import Rise, Span, check_span, length_in_steps


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam with warm-up, a flat stretch, and linear decay to 0. With beta1 = 0 no first moment is
    kept: a third less memory than with one."""

    lr: float = 8e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    """As in Gao et al. 2024: rare latents have gradients far below Adam's usual 1e-8."""
    warmup: int | str = 20
    """Steps of warm-up, or a length such as "2M tokens"."""
    rise: Rise = "linear"
    """Shape of the warm-up: linear from 0, or cosine from a tenth of the rate."""
    decay: Span = 0.2
    """Share of the run, at its end, over which the rate falls linearly to 0; or a length."""
    clip: float | None = 1.0
    """Gradients beyond this norm are scaled down to it; None leaves them."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Format of what is kept for each weight of a matrix: half the memory in bfloat16, for which
    rounding at random adds some noise (docs/performance.md has what it costs)."""

    def __post_init__(self) -> None:
        _check(self)

    def build(self, coder: Coder) -> tuple[torch.optim.Optimizer, ...]:
        """Adam over all weights of the coder, in one fused pass; with moments in bfloat16 the
        matrices have one of their own."""
        if self.moments == "float32":
            return (_adam(coder.parameters(), self),)
        matrices = [p for p in coder.parameters() if p.dim() == 2]
        others = [p for p in coder.parameters() if p.dim() != 2]
        half = AdamInHalf(matrices, self.lr, (self.beta1, self.beta2), self.eps)
        return half, _adam(others, self)


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonalised momentum for the weight matrices, Adam for biases, thresholds and codes.

    The step of a matrix is scaled to the size that Adam's would have (Liu et al. 2025, 2502.16982),
    so that one rate serves both. Needs torch 2.9.
    """

    lr: float = 8e-4
    momentum: float = 0.95
    """Of the matrices, with Nesterov's look-ahead."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    warmup: int | str = 20
    """Steps of warm-up, or a length such as "2M tokens"."""
    rise: Rise = "linear"
    """Shape of the warm-up: linear from 0, or cosine from a tenth of the rate."""
    decay: Span = 0.2
    """Share of the run, at its end, over which the rate falls linearly to 0; or a length."""
    clip: float | None = 1.0
    """Gradients beyond this norm are scaled down to it; None leaves them."""

    def __post_init__(self) -> None:
        _check(self)
        if not 0 <= self.momentum < 1:
            raise UsageError(f"optimizer.momentum must be in [0, 1), found {self.momentum}.")

    def build(self, coder: Coder) -> tuple[torch.optim.Optimizer, ...]:
        """Muon over W_enc, W_dec and W_skip; Adam over the rest."""
        if not hasattr(torch.optim, "Muon"):
            raise CrosslensError(
                f"Muon needs torch 2.9 or newer; this is {torch.__version__}. Upgrade torch, or "
                "train with --optimizer adam."
            )
        matrices = [*coder.W_enc, *coder.W_dec, *coder.W_skip.values()]
        known = set(map(id, matrices))
        muon = torch.optim.Muon(
            matrices,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        )
        return muon, _adam([p for p in coder.parameters() if id(p) not in known], self)


@dataclass(frozen=True, kw_only=True)
class SignSGD:
    """Schedule-free sign descent: steps of equal size, evaluated at the average of the iterates
    (Defazio et al. 2024, 2405.15682, around Bernstein et al. 2018; EleutherAI's sparsify).

    The saved coder holds the averaged weights. There is no decay: it needs to know no end.
    """

    lr: float = 1e-3
    momentum: float = 0.95
    """How near to the average, rather than to the newest iterate, gradients are taken."""
    warmup: int | str = 20
    """Steps of linear warm-up, or a length such as "2M tokens"."""

    def __post_init__(self) -> None:
        _check_rates(lr=self.lr)
        length_in_steps(self.warmup, 1, "optimizer.warmup")
        if not 0 < self.momentum < 1:
            raise UsageError(f"optimizer.momentum must be in (0, 1), found {self.momentum}.")

    @property
    def rise(self) -> Rise:
        return "linear"

    @property
    def decay(self) -> Span:
        return 0.0

    @property
    def clip(self) -> float | None:
        """A sign is the same whatever the gradient's norm."""
        return None

    def build(self, coder: Coder) -> tuple[torch.optim.Optimizer, ...]:
        """One schedule-free optimiser over all weights."""
        return (ScheduleFreeSign(coder.parameters(), self.lr, self.momentum),)


OptimizerConfig = Adam | SignSGD | Muon


class Optimizer:
    """One or more torch optimisers that together step every weight of a coder."""

    def __init__(self, coder: Coder, config: OptimizerConfig) -> None:
        self.lr = config.lr
        self.parameters = tuple(coder.parameters())
        self.parts = config.build(coder)
        self._copies = coder.copies

    def step(self, factor: float, gathered: Gathered | None = None) -> None:
        """Step by `factor` times the configured rate, and drop the gradients.

        Args:
            gathered: gradients that are not in `.grad`.
        """
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * factor
            if gathered is not None:
                self._step_rows(part, gathered)
            part.step()
            for parameter in (p for group in part.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    self._copies.renew(parameter)
            part.zero_grad(set_to_none=True)

    def _step_rows(self, part: torch.optim.Optimizer, gathered: Gathered) -> None:
        """Adam takes the rows as they are; other optimisers get them summed."""
        for group in part.param_groups:
            for parameter in (p for p in group["params"] if p in gathered.gradients):
                if isinstance(part, StepsRows):
                    step_rows(part, group, parameter, gathered, self._copies)
                else:
                    parameter.grad = gathered.summed(parameter)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, weights are the averages that a schedule-free optimiser keeps; after, exactly
        what they were. Other optimisers have no averages."""
        free = [part for part in self.parts if isinstance(part, ScheduleFreeSign)]
        kept = [(p, p.detach().clone()) for part in free for p in part.averaged_parameters()]
        for part in free:
            part.to_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in kept:
                    parameter.copy_(value)

    @torch.no_grad()
    def forget(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Start afresh for some rows of a parameter that were filled with new values: no moments,
        no past iterates."""
        for part in self.parts:
            for name, value in part.state.get(parameter, {}).items():
                if value.shape == parameter.shape:
                    value[rows] = parameter[rows] if name == "z" else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Everything that going on needs: `3.exp_avg` belongs to the fourth parameter."""
        return {
            f"{index}.{name}": value
            for index, parameter in enumerate(self.parameters)
            for part in self.parts
            for name, value in part.state.get(parameter, {}).items()
        }

    def restore(self, saved: dict[str, Tensor], source: str) -> None:
        """Take over what `tensors` gave, refusing what belongs to another coder."""
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in saved.items():
            index, _, name = key.partition(".")
            place = int(index) if index.isdigit() else len(self.parameters)
            if place >= len(self.parameters) or (
                value.dim() and value.shape != self.parameters[place].shape[: value.dim()]
            ):
                raise CrosslensError(f"{source} does not fit this run's coder.")
            states.setdefault(place, {})[name] = value
        for part in self.parts:
            for parameter in (p for group in part.param_groups for p in group["params"]):
                place = next(i for i, p in enumerate(self.parameters) if p is parameter)
                part.state[parameter] = {
                    # float64: the sums that ScheduleFreeSign keeps on the CPU
                    name: value if value.dtype == torch.float64 else value.to(parameter.device)
                    for name, value in states.get(place, {}).items()
                }


def bytes_kept(config: OptimizerConfig) -> int:
    """What the optimiser keeps for a weight of a matrix besides the weight itself, in bytes."""
    if not isinstance(config, Adam):
        return 4
    numbers = 2 if config.beta1 > 0 else 1
    return numbers * (2 if config.moments == "bfloat16" else 4)


def unscheduled(config: OptimizerConfig) -> OptimizerConfig:
    """The same at one rate throughout, for a run of any length."""
    if isinstance(config, SignSGD):
        return replace(config, warmup=0)
    return replace(config, warmup=0, decay=0.0)


def new_optimizer(coder: Coder, config: OptimizerConfig) -> Optimizer:
    """The configured optimiser over all weights of the coder."""
    return Optimizer(coder, config)


def _adam(parameters: Iterable[nn.Parameter], config: Adam | Muon) -> torch.optim.Optimizer:
    if config.beta1 == 0:
        return AdamWithoutMoment(parameters, config.lr, config.beta2, config.eps)
    betas = (config.beta1, config.beta2)
    return torch.optim.Adam(parameters, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def _check(config: Adam | Muon) -> None:
    _check_rates(lr=config.lr, eps=config.eps, clip=1.0 if config.clip is None else config.clip)
    if not (0 <= config.beta1 < 1 and 0 <= config.beta2 < 1):
        raise UsageError("optimizer.beta1 and beta2 must be in [0, 1).")
    length_in_steps(config.warmup, 1, "optimizer.warmup")
    check_span(config.decay, "optimizer.decay")


def _check_rates(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise UsageError(f"optimizer.{name} must be positive, found {value}.")

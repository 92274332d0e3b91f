"""Gradients that come as pairs of a latent and a row: their norm, and the step they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from crosslens import kernels
from crosslens.coder import Copies
from crosslens.functional.adam import AdamRows, AdamStep, RowGradient, projected
from crosslens.training.descent import AdamInHalf, AdamWithoutMoment

StepsRows = torch.optim.Adam | AdamWithoutMoment | AdamInHalf
"""Optimisers that take rows as they are."""


@dataclass(frozen=True)
class Gathered:
    """The gradients of some weight matrices, to be summed row by row."""

    gradients: Mapping[nn.Parameter, RowGradient]
    projected: frozenset[nn.Parameter] = frozenset()
    """Matrices whose rows keep their norms: what would only change those is taken out."""
    scale: float | Tensor = 1.0
    """Factor on all of them: what clipping leaves."""

    def square(self) -> Tensor:
        """The squared norm of all of them together, before the factor."""
        squares = [
            kernels.row_squares(g, p.detach() if p in self.projected else None).sum()
            for p, g in self.gradients.items()
        ]
        return torch.stack(squares).sum()

    def summed(self, parameter: nn.Parameter) -> Tensor:
        """The gradient of one matrix as `.grad` would hold it."""
        gradient = self.gradients[parameter]
        sum_LX = kernels.bag_sum(gradient.lists, gradient.weight_N, gradient.table_TX)
        if parameter in self.projected:
            sum_LX = projected(parameter.detach(), sum_LX)
        return sum_LX.mul_(self.scale).to(parameter.dtype)


def separate(gathered: Gathered) -> Gathered:
    """Sum those into `.grad` that have a gradient there, too: a matrix is stepped once."""
    both = [p for p in gathered.gradients if p.grad is not None]
    for parameter in both:
        assert parameter.grad is not None
        parameter.grad.add_(replace(gathered, projected=frozenset()).summed(parameter))
    left = {p: g for p, g in gathered.gradients.items() if p not in set(both)}
    return replace(gathered, gradients=left)


def clipped(
    parameters: Iterable[nn.Parameter], gathered: Gathered | None, limit: float
) -> tuple[Tensor, Gathered | None]:
    """`torch.nn.utils.clip_grad_norm_` over gradients in `.grad` and gathered ones together.

    Returns:
        the norm before, and the gathered ones with the factor that they are to be stepped by.
    """
    held = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(held)
    if gathered is not None and gathered.gradients:
        norm = (norm.square() + gathered.square()).sqrt()
    share = (limit / (norm + 1e-6)).clamp(max=1.0)
    if limit < float("inf"):
        torch._foreach_mul_(held, share)
    if gathered is not None:
        gathered = replace(gathered, scale=share)
    return norm, gathered


def step_rows(
    part: StepsRows,
    group: Mapping[str, Any],
    parameter: nn.Parameter,
    gathered: Gathered,
    copies: Copies,
) -> None:
    """A step of one matrix, with the state that `part` keeps for it.

    Args:
        group: the rates of the parameter's group.
        copies: gets the new weights in the format of the products.
    """
    gradient = gathered.gradients[parameter]
    state, beta1, beta2 = _state(part, group, parameter)
    state["step"] += 1
    mean = state.get("exp_avg")
    copy = copies.held(parameter)
    if copy is not None and mean is None:
        copy = copies.of(parameter, copy.dtype)  # only some rows of it are written
    kept = AdamRows(parameter.data, mean, state["exp_avg_sq"], state.get("seen"), copy)
    how = AdamStep(
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        step=int(state["step"]),
        scale=gathered.scale,
        projected=parameter in gathered.projected,
    )
    kernels.adam_rows(gradient, kept, how)
    copies.vouch(parameter)


def _state(
    part: StepsRows, group: Mapping[str, Any], parameter: nn.Parameter
) -> tuple[dict[str, Tensor], float, float]:
    """What is kept for the matrix, made at its first step, and the two decays."""
    if isinstance(part, AdamWithoutMoment):
        state = part.begun(parameter)
        if "seen" not in state:
            now = int(state["step"])
            rows = (len(parameter),)
            state["seen"] = torch.full(rows, now, dtype=torch.int32, device=parameter.device)
        return state, 0.0, group["beta2"]
    if isinstance(part, AdamInHalf):
        return part.begun(parameter, group["betas"][0]), *group["betas"]
    state = part.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state, *group["betas"]

"""Optimisers that torch does not have."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from crosslens.functional.adam import AdamRows, AdamStep, step_rows

ROWS = 1024
"""So many rows of a matrix are stepped at a time where their moments are widened for it."""


class AdamWithoutMoment(torch.optim.Optimizer):
    """Adam with β1 = 0, whose first moment is the gradient itself and is not stored."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, beta2: float, eps: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "beta2": beta2, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """torch's own fused step, with the gradient in the place of the first moment."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for p in moved:
                state = self.begun(p)
                if "seen" in state:
                    self._settle(state, group["beta2"])
            grads = [p.grad for p in moved]
            adam(
                moved,
                grads,
                grads,  # β1 = 0: the kernel writes 0·m + 1·g here, which is g
                [self.state[p]["exp_avg_sq"] for p in moved],
                [],
                [self.state[p]["step"] for p in moved],
                fused=True,
                amsgrad=False,
                beta1=0.0,
                beta2=group["beta2"],
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )

    def begun(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept for a parameter; zeros at first."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _settle(self, state: dict[str, Tensor], beta2: float) -> None:
        """Make up for the decay of rows that were left alone, before a step of all rows."""
        behind_L = (state["step"] - state["seen"]).to(state["exp_avg_sq"].dtype)
        state["exp_avg_sq"].mul_((beta2**behind_L)[:, None])
        state["seen"].fill_(int(state["step"]) + 1)


class AdamInHalf(torch.optim.Optimizer):
    """Adam whose moments are bfloat16, rounded so that they keep their means; matrices only.

    With β1 = 0 no first moment is kept, and a row's second one decays when it is next stepped.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.begun(parameter, group["betas"][0])
                state["step"] += 1
                how = AdamStep(
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    step=int(state["step"]),
                )
                rows = AdamRows(
                    parameter, state.get("exp_avg"), state["exp_avg_sq"], state.get("seen")
                )
                every_R = torch.arange(len(parameter), device=parameter.device)
                for some_R in torch.split(every_R, ROWS):
                    step_rows(some_R, parameter.grad[some_R], rows, how)

    def begun(self, parameter: nn.Parameter, beta1: float) -> dict[str, Tensor]:
        """What is kept for a parameter; zeros at first."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            device = parameter.device
            state["step"] = torch.zeros((), device=device)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            if beta1:
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            else:
                state["seen"] = torch.zeros(len(parameter), dtype=torch.int32, device=device)
        return state


class ScheduleFreeSign(torch.optim.Optimizer):
    """z ← z − γ·sign ∇f(y);  x ← (1−c)·x + c·z;  y = (1−β)·z + β·x,  c = γ²/Σγ².

    Parameters hold y, where gradients are taken; z is kept; x, the average, follows from both
    (Defazio et al. 2024, algorithm 1 with the step of signSGD). γ is the largest rate so far.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            lr, beta = group["lr"], group["momentum"]
            for y in group["params"]:
                if y.grad is None:
                    continue
                state = self.state[y]
                if not state:
                    state["z"] = y.detach().clone()
                    # On the CPU and in float64: read every step, and summed over the whole run.
                    state["lr_max"] = torch.zeros((), dtype=torch.float64)
                    state["weight_sum"] = torch.zeros((), dtype=torch.float64)
                lr_max = state["lr_max"].clamp_(min=lr)
                state["weight_sum"] += lr_max**2
                share = float(lr_max**2 / state["weight_sum"])
                y.lerp_(state["z"], 1 - 1 / beta)  # y → x
                state["z"].sub_(y.grad.sign(), alpha=lr)
                y.lerp_(state["z"], share).lerp_(state["z"], 1 - beta)

    def averaged_parameters(self) -> list[nn.Parameter]:
        """Those whose average is not what they hold."""
        return [p for group in self.param_groups for p in group["params"] if self.state.get(p)]

    @torch.no_grad()
    def to_average(self) -> None:
        """Fill the parameters with x."""
        for group in self.param_groups:
            for y in group["params"]:
                if self.state.get(y):
                    y.lerp_(self.state[y]["z"], 1 - 1 / group["momentum"])

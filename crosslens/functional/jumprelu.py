"""JumpReLU and its count, with straight-through gradients to the threshold."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.functional.blocks import split_rows, upcast
from crosslens.functional.code import SparseCode


def jumprelu(
    pre_BL: Float[Tensor, "b l"],
    threshold_L: Float[Tensor, " l"],
    bandwidth: float,
    input_gradient: bool = False,
) -> Float[Tensor, "b l"]:
    """x·1[x > θ], with a straight-through gradient to θ.

    ∂/∂x = 1[x > θ] and ∂/∂θ = −(θ/ε)·1[|x − θ| < ε/2] (Rajamanoharan et al. 2024, eq. 11, with
    a rectangle for the kernel). θ stays in float32: in bfloat16 it stops learning.

    Args:
        input_gradient: add (θ/ε)·1[|x − θ| < ε/2] to ∂/∂x, which no paper prints.
    """
    code: Tensor = _JumpReLU.apply(pre_BL, threshold_L, bandwidth, False, input_gradient)  # type: ignore[no-untyped-call]
    return code


def jumprelu_log(
    pre_BL: Float[Tensor, "b l"],
    log_threshold_L: Float[Tensor, " l"],
    bandwidth: float,
    input_gradient: bool = False,
) -> Float[Tensor, "b l"]:
    """x·1[x > e^t], with ∂/∂t = −(e^t/ε)·1[|x − e^t| < ε/2].

    As printed in *Circuits Updates* (Anthropic, January 2025); the chain rule through θ = e^t
    would give −e^{2t}/ε.
    """
    code: Tensor = _JumpReLU.apply(pre_BL, log_threshold_L, bandwidth, True, input_gradient)  # type: ignore[no-untyped-call]
    return code


def count_active(
    pre_BL: Float[Tensor, "b l"], threshold_L: Float[Tensor, " l"], bandwidth: float
) -> tuple[Float[Tensor, " b"], Float[Tensor, " l"]]:
    """Σ_l H(x − θ) of each row, and mean_b H(x − θ) of each latent.

    Straight-through, ∂H/∂θ = −(1/ε)·1[|x − θ| < ε/2]; none to x (Rajamanoharan et al. 2024,
    eq. 12).
    """
    counts: tuple[Tensor, Tensor] = _Count.apply(pre_BL, threshold_L, bandwidth)  # type: ignore[no-untyped-call]
    return counts


def count_active_entries(
    code: SparseCode, threshold_L: Float[Tensor, " l"], bandwidth: float
) -> tuple[Float[Tensor, " b"], Float[Tensor, " l"]]:
    """`count_active` of pre-activations of which only entries are known; these must hold all that
    are above θ − ε/2."""
    at_N = code.latents_N
    _, active_N = count_active(code.pre_N[None], threshold_L[at_N], bandwidth)
    count_B = active_N.new_zeros(len(code)).index_add(0, code.lists.items_N, active_N)
    count_L = active_N.new_zeros(code.n_latents).index_add(0, at_N, active_N)
    return count_B, count_L / len(code)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        pre_BL: Tensor,
        learnt_L: Tensor,
        bandwidth: float,
        log: bool,
        input_gradient: bool,
    ) -> Tensor:
        ctx.save_for_backward(pre_BL, learnt_L)
        ctx.settings = (bandwidth, log, input_gradient)  # type: ignore[attr-defined]
        threshold_L = learnt_L.exp() if log else learnt_L
        code_BL = torch.empty_like(pre_BL)
        for pre, code in zip(split_rows(pre_BL), split_rows(code_BL), strict=True):
            torch.mul(pre, upcast(pre) > threshold_L, out=code)
        return code_BL

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        pre_BL, learnt_L = ctx.saved_tensors  # type: ignore[attr-defined]
        bandwidth, log, input_gradient = ctx.settings  # type: ignore[attr-defined]
        threshold_L = learnt_L.exp() if log else learnt_L
        pull_L = torch.zeros_like(threshold_L)
        out_BL = torch.empty_like(pre_BL)
        blocks = zip(split_rows(pre_BL), split_rows(grads[0]), split_rows(out_BL), strict=True)
        for pre, grad, out in blocks:
            distance = upcast(pre) - threshold_L
            pull = grad * (distance.abs() < bandwidth / 2)
            pull_L += pull.sum(0, dtype=threshold_L.dtype)
            torch.mul(grad, distance > 0, out=out)
            if input_gradient:
                out += (pull * (threshold_L / bandwidth)).to(out.dtype)
        return out_BL, -(threshold_L / bandwidth) * pull_L, None, None, None


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        pre_BL: Tensor,
        threshold_L: Tensor,
        bandwidth: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre_BL, threshold_L)
        ctx.bandwidth = bandwidth  # type: ignore[attr-defined]
        rows, often_L = [], torch.zeros_like(threshold_L)
        for pre in split_rows(pre_BL):
            active = upcast(pre) > threshold_L
            rows.append(active.sum(-1, dtype=threshold_L.dtype))
            often_L += active.sum(0, dtype=threshold_L.dtype)
        return torch.cat(rows), often_L / len(pre_BL)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[None, Tensor, None]:
        grad_B, grad_L = grads
        pre_BL, threshold_L = ctx.saved_tensors  # type: ignore[attr-defined]
        bandwidth: float = ctx.bandwidth  # type: ignore[attr-defined]
        pull_L = torch.zeros_like(threshold_L)
        step = split_rows(pre_BL)
        for pre, weight in zip(step, split_rows(grad_B, len(step[0])), strict=True):
            near = (upcast(pre) - threshold_L).abs() < bandwidth / 2
            pull_L += weight @ near.to(weight.dtype)
            pull_L += grad_L * near.sum(0) / len(pre_BL)
        return None, -pull_L / bandwidth, None

"""From pre-activations to a sparse code."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def relu(pre_BL: Float[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """f = max(pre, 0)."""
    return torch.relu(pre_BL)


def topk(pre_BL: Float[Tensor, "b l"], k: int) -> Float[Tensor, "b l"]:
    """Keep the k largest of each row, rectified (Gao et al. 2024, eq. 3).

    Ties at the cut are broken as `torch.topk` breaks them.
    """
    values_BK, indices_BK = torch.relu(pre_BL).topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_BL).scatter(-1, indices_BK, values_BK)


def batch_topk(
    pre_BL: Float[Tensor, "b l"], norm_L: Float[Tensor, " l"], k: int
) -> tuple[Float[Tensor, "b l"], Float[Tensor, ""]]:
    """Keep the B·k entries of the whole batch with the largest score relu(pre)·norm.

    Bussmann et al. 2024; the score's decoder norm as in Minder et al. 2025 (2504.02922).
    Returns the code, unscaled, and the smallest positive score that was kept (0 when none was):
    its running mean is the threshold at inference. The selection itself carries no gradient.
    """
    f_BL = torch.relu(pre_BL)
    with torch.no_grad():
        score_N = (f_BL.float() * norm_L.float()).flatten()
        kept_K, indices_K = score_N.topk(k * pre_BL.shape[0], sorted=False)
        mask_N = torch.zeros_like(score_N, dtype=torch.bool)
        mask_N[indices_K] = True
        smallest = kept_K.where(kept_K > 0, torch.inf).min()
        smallest = smallest.where(smallest.isfinite(), 0.0)
    return f_BL * mask_N.view_as(f_BL), smallest


def above_threshold(
    pre_BL: Float[Tensor, "b l"], norm_L: Float[Tensor, " l"], threshold: Float[Tensor, ""]
) -> Float[Tensor, "b l"]:
    """f·1[f·norm ≥ θ] with f = relu(pre): BatchTopK at inference, each row on its own."""
    f_BL = torch.relu(pre_BL)
    return f_BL * (f_BL.float() * norm_L.float() >= threshold)


def jumprelu(
    pre_BL: Float[Tensor, "b l"], threshold_L: Float[Tensor, " l"], bandwidth: float
) -> Float[Tensor, "b l"]:
    """x·1[x > θ], with a straight-through gradient to θ.

    ∂/∂x = 1[x > θ] and ∂/∂θ = −(θ/ε)·1[|x − θ| < ε/2] (Rajamanoharan et al. 2024, eq. 11, with
    a rectangle for the kernel). θ stays in float32: in bfloat16 it stops learning.
    """
    code: Tensor = _JumpReLU.apply(pre_BL, threshold_L, bandwidth)  # type: ignore[no-untyped-call]
    return code


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        pre_BL: Tensor,
        threshold_L: Tensor,
        bandwidth: float,
    ) -> Tensor:
        ctx.save_for_backward(pre_BL, threshold_L)
        ctx.bandwidth = bandwidth  # type: ignore[attr-defined]
        return pre_BL * (pre_BL > threshold_L)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        (grad_BL,) = grads
        pre_BL, threshold_L = ctx.saved_tensors  # type: ignore[attr-defined]
        bandwidth: float = ctx.bandwidth  # type: ignore[attr-defined]
        near_BL = (pre_BL - threshold_L).abs() < bandwidth / 2
        pull_L = (grad_BL * near_BL).sum(0, dtype=threshold_L.dtype)
        return grad_BL * (pre_BL > threshold_L), -(threshold_L / bandwidth) * pull_L, None

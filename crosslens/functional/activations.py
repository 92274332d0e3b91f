"""From pre-activations to a sparse code."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.functional.blocks import split_rows, upcast


def relu(pre_BL: Float[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """f = max(pre, 0)."""
    return torch.relu(pre_BL)


def topk(pre_BL: Float[Tensor, "b l"], k: int) -> Float[Tensor, "b l"]:
    """Keep the k largest of each row, rectified (Gao et al. 2024, eq. 3).

    Ties at the cut are broken as `torch.topk` breaks them.
    """
    return _keep(pre_BL, pre_BL.detach().topk(k, dim=-1, sorted=False).indices, rectify=True)


def signed_topk(pre_BL: Float[Tensor, "b l"], k: int) -> Float[Tensor, "b l"]:
    """Keep the k largest of each row, whatever their sign (seed 004)."""
    return _keep(pre_BL, pre_BL.detach().topk(k, dim=-1, sorted=False).indices, rectify=False)


def abs_topk(pre_BL: Float[Tensor, "b l"], k: int) -> Float[Tensor, "b l"]:
    """Keep the k of each row with the largest |pre|, with their signs."""
    blocks = split_rows(pre_BL.detach())
    found = [block.abs().topk(k, dim=-1, sorted=False).indices for block in blocks]
    return _keep(pre_BL, torch.cat(found), rectify=False)


def group_max(pre_BL: Float[Tensor, "b l"], k: int) -> Float[Tensor, "b l"]:
    """Keep the largest of each of k runs of L/k consecutive latents, rectified (seed 004).

    Ties go as `torch.max` breaks them.
    """
    n_rows, n_latents = pre_BL.shape
    inside_BK = pre_BL.detach().view(n_rows, k, n_latents // k).max(-1).indices
    starts_K = torch.arange(k, device=pre_BL.device) * (n_latents // k)
    return _keep(pre_BL, inside_BK + starts_K, rectify=True)


def batch_topk(
    pre_BL: Float[Tensor, "b l"], norm_L: Float[Tensor, " l"], k: int
) -> tuple[Float[Tensor, "b l"], Float[Tensor, ""]]:
    """Keep the B·k entries of the whole batch with the largest score relu(pre)·norm.

    Bussmann et al. 2024; the score's decoder norm as in Minder et al. 2025 (2504.02922).
    Returns the code, unscaled, and the smallest positive score that was kept (0 when none was):
    its running mean is the threshold at inference. The selection itself carries no gradient.
    """
    with torch.no_grad():
        kept_K, indices_K = _largest_scores(pre_BL, norm_L, k * pre_BL.shape[0])
        smallest = kept_K.where(kept_K > 0, torch.inf).min()
        smallest = smallest.where(smallest.isfinite(), 0.0)
    code: Tensor = _Keep.apply(pre_BL, indices_K, True)  # type: ignore[no-untyped-call]
    return code, smallest


def above_threshold(
    pre_BL: Float[Tensor, "b l"], norm_L: Float[Tensor, " l"], threshold: Float[Tensor, ""]
) -> Float[Tensor, "b l"]:
    """f·1[f·norm ≥ θ] with f = relu(pre): BatchTopK at inference, each row on its own."""
    with torch.no_grad():
        active_BL = torch.empty_like(pre_BL, dtype=torch.bool)
        for pre, active in zip(split_rows(pre_BL), split_rows(active_BL), strict=True):
            active.copy_((upcast(pre) * upcast(norm_L) >= threshold) & (pre > 0))
    return pre_BL.where(active_BL, 0.0)


def gated(
    pre_BL: Float[Tensor, "b l"],
    b_gate_L: Float[Tensor, " l"],
    r_mag_L: Float[Tensor, " l"],
    b_mag_L: Float[Tensor, " l"],
) -> Float[Tensor, "b l"]:
    """1[π > 0]·ReLU(e^r·(π − b_gate) + b_mag), with π the gate's pre-activations.

    The magnitude path's weights are e^r times the gate's (Rajamanoharan et al. 2024, Gated SAEs,
    eq. 7). No gradient passes through the gate.
    """
    code: Tensor = _Gated.apply(pre_BL, b_gate_L, r_mag_L, b_mag_L)  # type: ignore[no-untyped-call]
    return code


class _Gated(torch.autograd.Function):
    """By hand, because autograd would keep three more rows × latents tensors."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        pre_BL: Tensor,
        b_gate_L: Tensor,
        r_mag_L: Tensor,
        b_mag_L: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(pre_BL, b_gate_L, r_mag_L, b_mag_L)
        code_BL = torch.empty_like(pre_BL)
        for pre, code in zip(split_rows(pre_BL), split_rows(code_BL), strict=True):
            magnitude = r_mag_L.exp() * (upcast(pre) - b_gate_L) + b_mag_L
            code.copy_(torch.relu(magnitude) * (pre > 0))
        return code_BL

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pre_BL, b_gate_L, r_mag_L, b_mag_L = ctx.saved_tensors  # type: ignore[attr-defined]
        factor_L = r_mag_L.exp()
        out_BL = torch.empty_like(pre_BL)
        pull_r_L, pull_b_L = torch.zeros_like(r_mag_L), torch.zeros_like(b_mag_L)
        blocks = zip(split_rows(pre_BL), split_rows(grads[0]), split_rows(out_BL), strict=True)
        for pre, grad, out in blocks:
            scaled = factor_L * (upcast(pre) - b_gate_L)
            grad = upcast(grad) * ((pre > 0) & (scaled + b_mag_L > 0))
            pull_r_L += (grad * scaled).sum(0)
            pull_b_L += grad.sum(0)
            out.copy_(grad * factor_L)
        # The bias in `pre` gets the same sum with the other sign: the magnitude does not hold it.
        return out_BL, -out_BL.sum(0).to(b_gate_L.dtype), pull_r_L, pull_b_L


def _largest_scores(pre_BL: Tensor, norm_L: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest relu(pre)·norm of a batch, and their places in the flattened batch; a block
    of rows at a time, so that no score of the whole batch is held."""
    best_N = norm_L.new_zeros(0, dtype=upcast(pre_BL[:0]).dtype)
    place_N = torch.zeros(1, dtype=torch.long, device=pre_BL.device)
    start = 0
    for block in split_rows(pre_BL):
        score = (upcast(torch.relu(block)) * upcast(norm_L)).flatten()
        found = torch.cat([best_N, score]).topk(min(n, len(best_N) + len(score)), sorted=False)
        inside = found.indices - len(best_N)
        before = place_N[found.indices.clamp_max(len(place_N) - 1)]
        best_N, place_N = found.values, torch.where(inside >= 0, inside + start, before)
        start += len(score)
    return best_N, place_N


def _keep(pre_BL: Tensor, indices_BK: Tensor, *, rectify: bool) -> Tensor:
    """The entries of each row at its indices, zero elsewhere."""
    starts_B = torch.arange(len(pre_BL), device=pre_BL.device)[:, None] * pre_BL.shape[-1]
    code: Tensor = _Keep.apply(pre_BL, (indices_BK + starts_B).flatten(), rectify)  # type: ignore[no-untyped-call]
    return code


class _Keep(torch.autograd.Function):
    """The entries at some places of the flattened batch, zero elsewhere. Keeps only the places."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        pre_BL: Tensor,
        places_N: Tensor,
        rectify: bool,
    ) -> Tensor:
        values_N = pre_BL.flatten()[places_N]
        on_N = values_N > 0 if rectify else torch.ones_like(values_N, dtype=torch.bool)
        ctx.save_for_backward(places_N, on_N)
        return _scattered(pre_BL, places_N, values_N.where(on_N, 0.0))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        places_N, on_N = ctx.saved_tensors  # type: ignore[attr-defined]
        return (
            _scattered(grads[0], places_N, grads[0].flatten()[places_N].where(on_N, 0.0)),
            None,
            None,
        )


def _scattered(like: Tensor, places_N: Tensor, values_N: Tensor) -> Tensor:
    out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    out.view(-1)[places_N] = values_N
    return out

"""The encoder and the decoder at a code's entries only, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crosslens import functional as F
from crosslens import kernels
from crosslens.functional.adam import RowGradient
from crosslens.functional.gathers import Lists, starts_of


class Copies:
    """Weights in the format of the products.

    A copy is made each time it is asked for, unless the optimiser has vouched for it and no
    operation of torch has changed the weights since. That torch counts such changes is not enough:
    its fused optimisers do not.
    """

    def __init__(self) -> None:
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._vouched: dict[nn.Parameter, object] = {}

    def of(self, weights: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """The weights themselves where they have that format."""
        if weights.dtype == dtype:
            return weights.detach()
        copy = self._kept.get(weights)
        if copy is None or copy.dtype != dtype or copy.device != weights.device:
            copy = torch.empty_like(weights, dtype=dtype, requires_grad=False)
            self._kept[weights] = copy
            self._vouched.pop(weights, None)
        if self._vouched.get(weights) != _state(weights):
            copy.copy_(weights.detach())
        return copy

    def held(self, weights: nn.Parameter) -> Tensor | None:
        """The copy as it was last made, for a caller who is about to write all of it."""
        return self._kept.get(weights)

    def vouch(self, weights: nn.Parameter) -> None:
        """The weights and their copy, if there is one, have just been written together."""
        torch.autograd.graph.increment_version(weights)
        self._vouched[weights] = _state(weights)

    def renew(self, weights: nn.Parameter) -> None:
        """The weights have been stepped, and their copy, if there is one, has not."""
        copy = self._kept.get(weights)
        if copy is not None:
            copy.copy_(weights.detach())
            self.vouch(weights)


def _state(weights: Tensor) -> object:
    return weights._version, weights.data_ptr()


@dataclass
class RowGradients:
    """Gradients of weight matrices, as they come out of a backward pass: pairs of a latent and a
    row of the batch, with a weight. What `.grad` would hold is never made."""

    _parts: dict[nn.Parameter, list[tuple[Lists, Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, weights: nn.Parameter, lists: Lists, weight_N: Tensor, rows_BX: Tensor) -> None:
        """Add Σ weight · rows[b] to the gradient of each latent in row b's list."""
        # Detached: with their graph they would hold, in a circle, what holds them.
        self._parts.setdefault(weights, []).append((lists, weight_N.detach(), rows_BX.detach()))

    def add_rows(self, weights: nn.Parameter, latents_D: Tensor, sum_DX: Tensor) -> None:
        """Add sums that are known already to the gradient of some latents."""
        starts_D = torch.arange(len(latents_D) + 1, device=latents_D.device)
        ones_D = torch.ones(len(latents_D), device=latents_D.device)
        self.add(weights, Lists(starts_D, latents_D.int()), ones_D, sum_DX)

    def by_latent(self) -> dict[nn.Parameter, RowGradient]:
        """The same, latent by latent, for all matrices that have any."""
        return {weights: _by_latent(len(weights), p) for weights, p in self._parts.items()}


def _by_latent(n_latents: int, parts: list[tuple[Lists, Tensor, Tensor]]) -> RowGradient:
    tables: list[Tensor] = []
    latents, rows, weights = [], [], []
    for lists, weight_N, rows_BX in parts:
        pointers = [table.data_ptr() for table in tables]
        before = [*pointers, rows_BX.data_ptr()].index(rows_BX.data_ptr())
        tables += [rows_BX] * (before == len(tables))
        latents.append(lists.index_N)
        rows.append(lists.items_N + sum(map(len, tables[:before])))
        weights.append(weight_N)
    order_N = torch.cat(latents).argsort(stable=True)
    counts_L = torch.bincount(torch.cat(latents), minlength=n_latents)
    by_latent = Lists(starts_of(counts_L), torch.cat(rows)[order_N].int())
    table = tables[0] if len(tables) == 1 else torch.cat(tables)
    return RowGradient(by_latent, torch.cat(weights)[order_N], table)


def product(x_BX: Tensor, weights_LX: Tensor, copy_LX: Tensor, *, turned: bool) -> Tensor:
    """x·W, or x·Wᵀ where it is turned, computed with the weights' copy in x's format."""
    out: Tensor = _Product.apply(x_BX, weights_LX, copy_LX, turned)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    """By hand, so that a copy can stand in for the weights that get the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_BX: Tensor, weights_LX: Tensor, copy_LX: Tensor, turned: bool
    ) -> Tensor:
        ctx.save_for_backward(x_BX)
        ctx.known = weights_LX.dtype, copy_LX, turned
        return x_BX @ (copy_LX.T if turned else copy_LX)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_BX,), (dtype, copy_LX, turned) = ctx.saved_tensors, ctx.known
        pull_BL = grads[0].to(copy_LX.dtype)
        pull_x, pull_W = None, None
        if ctx.needs_input_grad[0]:
            pull_x = pull_BL @ (copy_LX if turned else copy_LX.T)
        if ctx.needs_input_grad[1]:
            pull_W = (pull_BL.T @ x_BX if turned else x_BX.T @ pull_BL).to(dtype)
        return pull_x, pull_W, None, None


@dataclass(frozen=True)
class Reading:
    """What one group of latents reads: its weights, their copy, and rows in the same format."""

    weights_LX: nn.Parameter
    copy_LX: Tensor
    x_BX: Tensor
    latents: slice


@dataclass(frozen=True)
class Known:
    """Pre-activations of a batch without the graph behind them, and what they were made from."""

    pre_BL: Tensor
    b_L: Tensor
    groups: tuple[Reading, ...]
    gradients: RowGradients

    def at(self, lists: Lists) -> Tensor:
        """Those in the lists [N], in float32 or wider, with a gradient to the encoder's input,
        weights and bias."""
        inputs = [each for group in self.groups for each in (group.weights_LX, group.x_BX)]
        taken: Tensor = _Taken.apply(self, lists, self.b_L, *inputs)  # type: ignore[no-untyped-call]
        return taken

    def columns(self, latents_D: Tensor) -> Tensor:
        """Those of some latents (ascending numbers) for all rows [B, D], likewise."""
        inputs = [each for group in self.groups for each in (group.weights_LX, group.x_BX)]
        taken: Tensor = _Columns.apply(self, latents_D, self.b_L, *inputs)  # type: ignore[no-untyped-call]
        return taken


def decoded(
    code: F.SparseCode, weights_LY: nn.Parameter, copy_LY: Tensor, gradients: RowGradients | None
) -> Tensor:
    """W_decᵀ z of entries [B, Y], in float32 or wider. Without `gradients` W_dec gets none."""
    out: Tensor = _Decoded.apply(code.values_N, weights_LY, copy_LY, code.lists, gradients)  # type: ignore[no-untyped-call]
    return out


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, known: Known, lists: Lists, b_L: Tensor, *inputs: Tensor) -> Tensor:
        ctx.known, ctx.lists = known, lists
        places_N = lists.items_N * known.pre_BL.shape[1] + lists.index_N
        return F.upcast(known.pre_BL.reshape(-1)[places_N])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_N, lists, known = grads[0], ctx.lists, ctx.known
        b_L = torch.zeros_like(known.b_L)
        b_L.index_add_(0, lists.index_N, grad_N.to(b_L.dtype))
        needed = ctx.needs_input_grad[3:]
        pulls: list[Tensor | None] = []
        for i, group in enumerate(known.groups):
            mine, weight_N = lists, grad_N
            if len(known.groups) > 1:
                mine, at_N = lists.within(group.latents)
                weight_N = grad_N[at_N]
            if needed[2 * i]:
                known.gradients.add(group.weights_LX, mine, weight_N, group.x_BX)
            pulls.append(None)
            wanted = needed[2 * i + 1]
            pulls.append(kernels.bag_sum(mine, weight_N, group.copy_LX) if wanted else None)
        return None, None, b_L, *pulls


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, known: Known, latents_D: Tensor, b_L: Tensor, *inputs: Tensor) -> Tensor:
        ctx.known, ctx.latents_D = known, latents_D
        return known.pre_BL[:, latents_D]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_BD, latents_D, known = grads[0], ctx.latents_D, ctx.known
        b_L = torch.zeros_like(known.b_L)
        b_L[latents_D] = grad_BD.sum(0, dtype=b_L.dtype)
        needed = ctx.needs_input_grad[3:]
        pulls: list[Tensor | None] = []
        for i, group in enumerate(known.groups):
            inside = (latents_D >= group.latents.start) & (latents_D < group.latents.stop)
            rows_D = latents_D[inside] - group.latents.start
            mine_BD, copy_DX = padded(grad_BD[:, inside], group.copy_LX, rows_D)
            if needed[2 * i]:
                sum_DX = (mine_BD.T @ group.x_BX)[: len(rows_D)]
                known.gradients.add_rows(group.weights_LX, rows_D, sum_DX)
            pulls.append(None)
            pulls.append(mine_BD @ copy_DX if needed[2 * i + 1] else None)
        return None, None, b_L, *pulls


def decoded_columns(
    z_BD: Tensor,
    latents_D: Tensor,
    weights_LY: nn.Parameter,
    copy_LY: Tensor,
    gradients: RowGradients,
) -> Tensor:
    """W_decᵀ z of some latents (their numbers within the matrix) for all rows [B, Y]."""
    wide_BD, copy_DY = padded(z_BD, copy_LY, latents_D)
    out: Tensor = _DecodedColumns.apply(wide_BD, weights_LY, copy_DY, latents_D, gradients)  # type: ignore[no-untyped-call]
    return out


class _DecodedColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z_BD: Tensor,
        weights_LY: Tensor,
        copy_DY: Tensor,
        latents_D: Tensor,
        gradients: RowGradients,
    ) -> Tensor:
        ctx.save_for_backward(z_BD)
        ctx.known = weights_LY, copy_DY, latents_D, gradients
        return z_BD @ copy_DY

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z_BD,), (weights_LY, copy_DY, latents_D, gradients) = ctx.saved_tensors, ctx.known
        pull_BY = grads[0].to(copy_DY.dtype)
        if ctx.needs_input_grad[1]:
            gradients.add_rows(weights_LY, latents_D, (z_BD.T @ pull_BY)[: len(latents_D)])
        return pull_BY @ copy_DY.T, None, None, None, None


def padded(z_BL: Tensor, W_LY: Tensor, rows_L: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of z·W[rows], with zeros added up to the next power of two of rows.

    The number of dead latents changes from step to step, and a CPU's matrix library keeps some
    memory for each shape that it meets: without this, gigabytes in a few hundred steps.
    """
    n = len(rows_L)
    extra = (1 << (n - 1).bit_length()) - n if n else 0
    return nn.functional.pad(z_BL, (0, extra)), W_LY[nn.functional.pad(rows_L, (0, extra))]


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values_N: Tensor,
        weights_LY: Tensor,
        copy_LY: Tensor,
        lists: Lists,
        gradients: RowGradients | None,
    ) -> Tensor:
        ctx.save_for_backward(values_N)
        ctx.known = weights_LY, copy_LY, lists, gradients
        return kernels.bag_sum(lists, values_N, copy_LY)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values_N,), (weights_LY, copy_LY, lists, gradients) = ctx.saved_tensors, ctx.known
        pull_BY = grads[0].contiguous()
        if gradients is not None and ctx.needs_input_grad[1]:
            gradients.add(weights_LY, lists, values_N, pull_BY.to(copy_LY.dtype))
        pull_N = kernels.products(lists, pull_BY, copy_LY) if ctx.needs_input_grad[0] else None
        return pull_N, None, None, None, None

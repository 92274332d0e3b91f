"""One training pass through a coder: with a whole code, or with its entries only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crosslens import functional as F
from crosslens.coder.activations import entries_per_row
from crosslens.coder.coder import Coder
from crosslens.coder.gathering import Known, Reading, RowGradients
from crosslens.coder.rows import Rows
from crosslens.functional.gathers import Lists

SAMPLE = 16
"""Rows that tell how many entries a batch has, where k does not."""


@dataclass(frozen=True)
class Pass:
    """All that one training step shows to the terms of the objective, in scaled units."""

    target_BY: Tensor
    recon_BY: Tensor
    pre_BL: Tensor
    """Pre-activations. Where the code is sparse they have no gradient, and `entries` do."""
    code: F.Code
    coder: Coder
    skipped_BY: Tensor | None = None
    """What the linear skip contributed to `recon_BY`, if there is one."""
    dead_L: Tensor | None = None
    """Latents that have not fired for long (bool)."""
    progress: float = 1.0
    """Share of the run that is done, in [0, 1]."""
    known: Known | None = None
    """What entries are taken from, where the code is sparse."""

    @property
    def gradients(self) -> RowGradients | None:
        """Where the backward pass leaves what it does not leave in `.grad`."""
        return None if self.known is None else self.known.gradients

    def entries(self, lists: Lists) -> F.SparseCode:
        """Pre-activations at some places, as a code of their own. Only where the code is sparse."""
        assert self.known is not None
        pre_N = self.known.at(lists)
        return F.SparseCode(lists, pre_N, pre_N, self.pre_BL.shape[1])

    def columns(self, latents_D: Tensor) -> Tensor:
        """Pre-activations of some latents (ascending numbers) [B, D], with their gradient."""
        return self.pre_BL[:, latents_D] if self.known is None else self.known.columns(latents_D)

    def decode_columns(self, z_BD: Tensor, latents_D: Tensor) -> Tensor:
        """`Coder.decode_scaled` of a code of some latents."""
        return self.coder.decode_scaled(z_BD, latents_D, self.gradients)

    def decode(self, code: F.Code) -> Tensor:
        """`Coder.decode_scaled`, with gradients where this pass has them."""
        return self.coder.decode_scaled(code, gradients=self.gradients)

    def decode_run(
        self, run: F.Code, group: int, start: int = 0, *, frozen: bool = False
    ) -> Tensor:
        """`Coder.decode_run`, likewise."""
        gradients = self.gradients
        return self.coder.decode_run(run, group, start, frozen=frozen, gradients=gradients)


def train_pass(
    coder: Coder,
    rows: Rows,
    dead_L: Tensor | None = None,
    progress: float = 1.0,
    *,
    all_latents: bool = False,
) -> Pass:
    """One pass over raw rows with all that the objective's terms may need.

    Where the share of entries that are not zero is below `coder.sparse_below`, only those are
    held and multiplied, and the gradients of the matrices are left in `Pass.gradients`.

    Args:
        all_latents: some term needs the gradient of every pre-activation; the code is not sparse.
    """
    coder.progress = progress
    if rows.y_BY is rows.x_BX:  # most wirings write what they read: converted once
        x_BX = rows.x_BX.float()
        rows = replace(rows, x_BX=x_BX, y_BY=x_BX)
    x_BX = coder.scaled_read(rows.x_BX, rows.site_B)
    read = coder.group_rows(x_BX)
    pre_BL = coder.multiplied(read)
    known = _known(coder, pre_BL.detach(), read)
    sparse = None if all_latents else _sparse_code(coder, known)
    code: F.Code = coder.activate(pre_BL) if sparse is None else sparse
    gradients = None if sparse is None else known.gradients
    recon_BY = F.upcast(coder.decode_scaled(code, gradients=gradients)) + coder.b_dec
    skipped_BY = coder.skip(x_BX)
    if skipped_BY is not None:
        recon_BY = recon_BY + F.upcast(skipped_BY)
    target_BY = coder.scaled_write(rows.y_BY, rows.site_B)
    of_step = (coder, skipped_BY, dead_L, progress)
    if sparse is None:
        return Pass(target_BY, recon_BY, pre_BL, code, *of_step)
    return Pass(target_BY, recon_BY, known.pre_BL, code, *of_step, known)


def _known(coder: Coder, pre_BL: Tensor, read: tuple[Tensor, ...]) -> Known:
    groups = tuple(
        Reading(W_LX, coder.copies.of(W_LX, x_BX.dtype), x_BX, span)
        for W_LX, x_BX, span in zip(coder.W_enc, read, coder.wiring.slices, strict=True)
    )
    return Known(pre_BL, coder.b_enc, groups, RowGradients())


def _sparse_code(coder: Coder, known: Known) -> F.SparseCode | None:
    """The code's entries; None where they are too many."""
    if not coder.sparse_below:
        return None
    pre_BL, activation = known.pre_BL, coder.activation
    limit = coder.sparse_below * pre_BL.shape[1]
    with torch.no_grad():
        norm_L = coder.scores()
        per_row: float | None = entries_per_row(activation, coder.progress)
        if per_row is None:
            sample_SL = pre_BL[:: max(1, len(pre_BL) // SAMPLE)]
            found = activation.entries(sample_SL, norm_L, coder)
            per_row = len(found.index_N) / max(1, len(sample_SL))
        if per_row >= limit:
            return None
        lists = activation.entries(pre_BL, norm_L, coder)
    pre_N = known.at(lists)
    values_N = activation.of_entries(pre_N, lists.index_N.long(), coder)
    return F.SparseCode(lists, values_N, pre_N, pre_BL.shape[1])

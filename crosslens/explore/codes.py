"""The sparse code of many tokens, kept entry by entry and sorted by latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crosslens.activations import Source
from crosslens.coder import Coder, all_rows
from crosslens.errors import CrosslensError

Ints: TypeAlias = NDArray[np.int32]
Places: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]
Progress: TypeAlias = Callable[[int, int], None]
"""Hears (chunks done, chunks in all)."""

MOST_ENTRIES = 150_000_000
"""About 5 GB while they are sorted."""


@dataclass(frozen=True)
class Codes:
    """All entries (row, latent, value > 0) of a code, by latent, then by row.

    12 bytes per active latent and token: with 32 active, 23 MB for 60,000 tokens, 3.8 GB for ten
    million. Sorting takes three times that for a moment.
    """

    n_latents: int
    block_length: int
    n_rows: int
    """All positions of all blocks, counted or not; row = block · block_length + position."""
    counted: int
    """Rows that the token policy keeps."""
    latent_E: Ints
    row_E: Ints
    value_E: Floats

    @property
    def count_L(self) -> Places:
        """Rows on which each latent is active."""
        return np.bincount(self.latent_E, minlength=self.n_latents)

    @property
    def start_L(self) -> Places:
        """Where each latent's entries begin."""
        return np.concatenate([[0], np.cumsum(self.count_L)[:-1]])

    @property
    def block_E(self) -> Ints:
        """The block of each entry."""
        return self.row_E // np.int32(self.block_length)


@torch.no_grad()
def collect(source: Source, coder: Coder, progress: Progress) -> Codes:
    """One pass of the models and of the coder, with its stored threshold, over all blocks.

    Raises:
        CrosslensError: the code is so dense that its entries would not fit in memory.
    """
    coder.eval()
    rows, latents, values = [], [], []
    counted = entries = 0
    for done, chunk in enumerate(source, 1):
        z_RL = _encoded(coder, chunk.rows())
        at_R, at_L = z_RL.nonzero(as_tuple=True)
        rows.append(chunk.row_R[at_R.cpu()].int())
        latents.append(at_L.int().cpu())
        values.append(z_RL[at_R, at_L].float().cpu())
        counted += len(chunk.row_R)
        entries += len(at_R)
        _check_sparse(entries, counted, coder)
        progress(done, source.n_chunks)
    if not counted:
        raise CrosslensError("The token policy keeps no token: there is nothing to look at.")
    latent_E = torch.cat(latents).numpy()
    order = np.argsort(latent_E, kind="stable")  # rows come ascending
    return Codes(
        n_latents=coder.wiring.n_latents,
        block_length=source.block_length,
        n_rows=source.blocks.tokens_NT.numel(),
        counted=counted,
        latent_E=latent_E[order],
        row_E=torch.cat(rows).numpy()[order],
        value_E=torch.cat(values).numpy()[order],
    )


def _encoded(coder: Coder, rows_RX: Tensor) -> Tensor:
    """The code of harvested rows [R, L]; of a token with a code per site, the largest of each."""
    rows = all_rows(coder.wiring, rows_RX.to(coder.b_dec.device))
    z_BL = coder.encode(rows.x_BX, rows.site_B)
    if len(z_BL) == len(rows_RX):
        return z_BL
    return z_BL.view(len(rows_RX), -1, z_BL.shape[1]).amax(1)


def _check_sparse(entries: int, counted: int, coder: Coder) -> None:
    if entries > MOST_ENTRIES:
        raise CrosslensError(
            f"On average {entries / counted:.0f} of {coder.wiring.n_latents} latents are active on "
            f"a token: too dense to keep after {counted} tokens. Ask for fewer with --tokens, or "
            "train a sparser coder."
        )

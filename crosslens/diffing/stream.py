"""Tokens of both models through the coder, chunk by chunk: what every measure is a sum over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from crosslens.activations import Source
from crosslens.coder import Coder, all_rows
from crosslens.errors import UsageError
from crosslens.functional.gathers import Lists, lists_of_mask

Progress = Callable[[int, int], None]
"""Hears (chunks done, chunks in all)."""


@dataclass(frozen=True)
class Coded:
    """The tokens of one chunk that count: their activations, codes and reconstructions.

    Entries of the code are those above 0, row by row, ascending by latent within a row.
    """

    block_R: Int64[Tensor, " r"]
    """The block each token is in, on the CPU."""
    position_R: Int64[Tensor, " r"]
    """Where it stands in it, on the CPU."""
    tokens_R: Int64[Tensor, " r"]
    """Token ids, on the CPU."""
    lists: Lists
    """The latents active on each row."""
    value_E: Float32[Tensor, " e"]
    """How strongly, per entry."""
    target_RY: Float[Tensor, "r y"]
    """What was there, in scaled units: what the coder should write."""
    recon_RY: Float[Tensor, "r y"]
    """What it writes, in scaled units, biases included."""

    @property
    def row_E(self) -> Int64[Tensor, " e"]:
        """The row of each entry."""
        return self.lists.items_N

    @property
    def latent_E(self) -> Int64[Tensor, " e"]:
        """The latent of each entry."""
        return self.lists.index_N.long()

    @property
    def error_RY(self) -> Float[Tensor, "r y"]:
        """What the coder misses."""
        return self.target_RY - self.recon_RY


def quiet(_done: int, _total: int) -> None:
    """Progress that nobody hears."""


def coded(source: Source, coder: Coder, progress: Progress = quiet) -> Iterator[Coded]:
    """One pass of the models, and of the coder with its stored threshold, over all blocks.

    Raises:
        UsageError: the coder and the source do not have the same sites, or the coder's rows are of
            one site each.
    """
    if coder.wiring.n_codes:
        raise UsageError("This coder's rows are of one site each; a diff needs whole tokens.")
    if coder.wiring.harvest != source.layout:
        raise UsageError(
            f"The coder's sites ({', '.join(coder.wiring.harvest.sites)}) are not the source's "
            f"({', '.join(source.layout.sites)})."
        )
    coder.eval()
    tokens_N = source.blocks.tokens_NT.flatten()
    for done, chunk in enumerate(source, 1):
        if len(chunk.row_R):
            yield _coded(coder, chunk.rows(), chunk.row_R, source.block_length, tokens_N)
        progress(done, source.n_chunks)


@torch.no_grad()
def _coded(
    coder: Coder, rows_RX: Tensor, row_R: Tensor, block_length: int, tokens_N: Tensor
) -> Coded:
    rows = all_rows(coder.wiring, rows_RX.to(coder.b_dec.device))
    z_RL = coder.encode(rows.x_BX, rows.site_B).float()
    active_RL = z_RL > 0
    recon_RY = coder.decode(z_RL, rows.x_BX, rows.site_B)
    # A folded coder has the scales in its weights, and still has them recorded.
    scale_Y = coder.wiring.write.spread(coder.scale_write)
    return Coded(
        block_R=row_R // block_length,
        position_R=row_R % block_length,
        tokens_R=tokens_N[row_R].long(),
        lists=lists_of_mask(active_RL),
        value_E=z_RL[active_RL],
        target_RY=rows.y_BY.float() * scale_Y,
        recon_RY=recon_RY * scale_Y,
    )

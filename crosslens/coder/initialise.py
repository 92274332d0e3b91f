"""Fill a new coder's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from crosslens.coder.coder import Coder
from crosslens.coder.rows import all_rows
from crosslens.errors import UsageError


@torch.no_grad()
def transpose_init(coder: Coder, decoder_norm: float, generator: torch.Generator) -> None:
    """Gaussian decoder directions, each (latent, site) block at `decoder_norm`; W_enc = W_decᵀ
    where a group reads and writes the same sites; biases 0.

    Anthropic, *Circuits Updates* April 2024 (one site) and crosscoders, October 2024. Groups that
    read other sites than they write get independent encoder directions of the same norm; a linear
    skip starts at 0.
    """
    if decoder_norm <= 0:
        raise UsageError(f"The decoder norm must be positive, found {decoder_norm}.")
    for group, W_enc, W_dec in zip(coder.wiring.groups, coder.W_enc, coder.W_dec, strict=True):
        write = coder.wiring.write.pick(group.writes)
        stored = write.widths[: len(write.widths) // group.copies]
        _fill_directions(W_dec, stored, decoder_norm, generator)
        if group.reads == group.writes:
            W_enc.copy_(W_dec.repeat(1, group.copies))
        else:
            read = coder.wiring.read.pick(group.reads)
            _fill_directions(W_enc, read.widths, decoder_norm, generator)
    for W_skip in coder.W_skip.values():
        W_skip.zero_()
    coder.b_enc.zero_()
    coder.b_dec.zero_()


@torch.no_grad()
def center_biases(coder: Coder, mean_X: Tensor) -> None:
    """Start from the mean: b_dec is the mean of what is to be written, and b_enc takes the mean of
    what is read out of the pre-activations, −W_enc·x̄ (not where the coder centers itself).

    Otherwise the mean, which is large, decides which latents fire first: many never do again.

    Args:
        mean_X: mean of harvested rows, raw.
    """
    rows = all_rows(coder.wiring, mean_X[None])
    coder.b_dec.copy_(coder.scaled_write(rows.y_BY, rows.site_B).mean(0))
    coder.b_enc.zero_()
    if not coder.center:
        x_BX = coder.scaled_read(rows.x_BX, rows.site_B)
        coder.b_enc.copy_(-coder.preactivations(x_BX).float().mean(0))


def _fill_directions(
    weight_LY: Tensor, widths: tuple[int, ...], norm: float, generator: torch.Generator
) -> None:
    drawn = torch.randn(weight_LY.shape, generator=generator)
    blocks = torch.split(drawn, list(widths), dim=-1)
    weight_LY.copy_(torch.cat([norm * b / b.norm(dim=-1, keepdim=True) for b in blocks], -1))

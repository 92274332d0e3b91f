"""Fill a new coder's weights."""

from __future__ import annotations

import torch

from crosslens.coder.coder import Coder
from crosslens.errors import UsageError


@torch.no_grad()
def transpose_init(coder: Coder, decoder_norm: float, generator: torch.Generator) -> None:
    """Gaussian decoder directions, each (latent, site) block at `decoder_norm`; W_enc = W_decᵀ
    where a group reads and writes the same sites; biases 0.

    Anthropic, *Circuits Updates* April 2024 (one site) and crosscoders, October 2024. Groups that
    read other sites than they write get independent encoder directions of the same norm.
    """
    if decoder_norm <= 0:
        raise UsageError(f"The decoder norm must be positive, found {decoder_norm}.")
    for group, W_enc, W_dec in zip(coder.wiring.groups, coder.W_enc, coder.W_dec, strict=True):
        write = coder.wiring.write.pick(group.writes)
        _fill_directions(W_dec, write.widths, decoder_norm, generator)
        if group.reads == group.writes and W_enc.shape == W_dec.shape:
            W_enc.copy_(W_dec)
        else:
            read = coder.wiring.read.pick(group.reads)
            _fill_directions(W_enc, read.widths, decoder_norm, generator)
    coder.b_enc.zero_()
    coder.b_dec.zero_()


def _fill_directions(
    weight_LY: torch.Tensor, widths: tuple[int, ...], norm: float, generator: torch.Generator
) -> None:
    drawn = torch.randn(weight_LY.shape, generator=generator)
    blocks = torch.split(drawn, list(widths), dim=-1)
    weight_LY.copy_(torch.cat([norm * b / b.norm(dim=-1, keepdim=True) for b in blocks], -1))

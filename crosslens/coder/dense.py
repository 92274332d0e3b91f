"""A coder's weights as two whole matrices, whatever groups they are stored in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.coder.coder import Coder, tiled
from crosslens.coder.layout import Layout


@torch.no_grad()
def dense_decoder(coder: Coder) -> Float[Tensor, "l y"]:
    """What each latent adds to a row, in scaled units; zero at sites that its group skips."""
    wiring = coder.wiring
    blocks = [tiled(W_LY, g.copies) for W_LY, g in zip(coder.W_dec, wiring.groups, strict=True)]
    W_LY = _placed(blocks, [group.writes for group in wiring.groups], wiring.write)
    return W_LY * _spread(coder, wiring.write, coder.scale_write) if coder.folded else W_LY


@torch.no_grad()
def dense_encoder(coder: Coder) -> Float[Tensor, "l x"]:
    """What each latent reads of a scaled row; zero at sites that its group does not read."""
    wiring = coder.wiring
    W_LX = _placed(list(coder.W_enc), [group.reads for group in wiring.groups], wiring.read)
    return W_LX / _spread(coder, wiring.read, coder.scale_read) if coder.folded else W_LX


def _placed(blocks: Sequence[Tensor], sites: Sequence[tuple[str, ...]], layout: Layout) -> Tensor:
    """Each group's columns at their places in a whole row."""
    rows = []
    for block_LX, own in zip(blocks, sites, strict=True):
        whole_LX = block_LX.new_zeros(len(block_LX), layout.width)
        whole_LX[:, layout.columns(own).to(block_LX.device)] = block_LX.detach()
        rows.append(whole_LX)
    return torch.cat(rows)


def _spread(coder: Coder, layout: Layout, scale_P: Tensor) -> Tensor:
    """One factor per column; where rows are of one site each, columns have none of their own."""
    if coder.wiring.n_codes:
        return torch.ones(layout.width, device=scale_P.device)
    return layout.spread(scale_P)

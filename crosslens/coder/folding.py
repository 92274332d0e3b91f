"""Move a coder's scales into its weights and back. Output and active set stay the same."""

from __future__ import annotations

import copy

import torch

from crosslens.coder.coder import Coder


@torch.no_grad()
def fold(coder: Coder) -> Coder:
    """A copy that reads and writes raw activations without scaling:
    W_enc·s_in, W_dec/s_out, b_dec/s_out; b_enc and thresholds stay."""
    return coder if coder.folded else _rescaled(coder, into_weights=True)


@torch.no_grad()
def unfold(coder: Coder) -> Coder:
    """The inverse of `fold`: a copy in the units it was trained in."""
    return _rescaled(coder, into_weights=False) if coder.folded else coder


def _rescaled(coder: Coder, *, into_weights: bool) -> Coder:
    result = copy.deepcopy(coder)
    read, write = coder.wiring.read, coder.wiring.write
    s_in_X, s_out_Y = read.spread(coder.scale_read), write.spread(coder.scale_write)
    if not into_weights:
        s_in_X, s_out_Y = 1 / s_in_X, 1 / s_out_Y
    for group, W_enc, W_dec in zip(coder.wiring.groups, result.W_enc, result.W_dec, strict=True):
        W_enc.mul_(s_in_X[read.columns(group.reads).to(s_in_X.device)])
        W_dec.div_(s_out_Y[write.columns(group.writes).to(s_out_Y.device)])
    result.b_dec.div_(s_out_Y)
    result.folded = into_weights
    return result

"""Move a coder's scales into its weights and back. Output and active set stay the same."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from crosslens.coder.coder import Coder
from crosslens.errors import UsageError


@torch.no_grad()
def fold(coder: Coder) -> Coder:
    """A copy that reads and writes raw activations without scaling:
    W_enc·s_in, W_dec/s_out, W_skip·s_in/s_out, b_dec/s_out; b_enc and thresholds stay.

    Decoders tied across sites come out untied, since the sites' scales differ.

    Raises:
        UsageError: rows are (token, site) pairs, whose scale differs from row to row.
    """
    if coder.folded:
        return coder
    if coder.wiring.n_codes:
        raise UsageError(
            "This coder's rows are (token, site) pairs with a scale for each site, which no single "
            "set of weights can hold. Use it unfolded: it reads raw activations all the same."
        )
    return _rescaled(untied(coder), into_weights=True)


@torch.no_grad()
def unfold(coder: Coder) -> Coder:
    """The inverse of `fold`: a copy in the units it was trained in."""
    return _rescaled(copy.deepcopy(coder), into_weights=False) if coder.folded else coder


@torch.no_grad()
def untied(coder: Coder) -> Coder:
    """A copy whose decoders are stored in full."""
    result = copy.deepcopy(coder)
    groups = coder.wiring.groups
    for i, group in enumerate(groups):
        if group.copies > 1:
            result.W_dec[i] = nn.Parameter(result.W_dec[i].repeat(1, group.copies))
    result.wiring = replace(coder.wiring, groups=tuple(replace(g, copies=1) for g in groups))
    return result


def _rescaled(result: Coder, *, into_weights: bool) -> Coder:
    read, write = result.wiring.read, result.wiring.write
    s_in_X, s_out_Y = read.spread(result.scale_read), write.spread(result.scale_write)
    if not into_weights:
        s_in_X, s_out_Y = 1 / s_in_X, 1 / s_out_Y
    for i, group in enumerate(result.wiring.groups):
        s_in = s_in_X[read.columns(group.reads).to(s_in_X.device)]
        s_out = s_out_Y[write.columns(group.writes).to(s_out_Y.device)]
        result.W_enc[i].mul_(s_in)
        result.W_dec[i].div_(s_out)
        if group.skip:
            result.W_skip[str(i)].mul_(s_in).div_(s_out[:, None])
    result.b_dec.div_(s_out_Y)
    result.folded = into_weights
    return result

"""Stands in for the published implementation of feature interactions (arXiv 2606.09940).

A re-implementation of its per-token algorithm, from a reading of its code and for comparison only;
none of its code is used. For each token it finds which latent contributes most to each neuron, and
writes what every active latent contributes there, weighed by ‖w_out‖, into a dense latents ×
latents matrix of that token, in the row of the largest. Matrices of a sequence are then added up.

As published, what several neurons write to one place is overwritten and not added, so that one
neuron of each pair is left. `summed` mends that: then it is the dominance of
`crosslens.functional.pairs`. Left out, in its favour: matrix products that it repeats for every
sequence, and those whose result it does not use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.interactions.neurons.contributions import SiteChunk

SEQUENCE = 128
"""Tokens whose matrices are held together, as published."""
ELEMENTS = 1 << 28
"""Of these matrices: 1 GiB. At 4096 latents as published they are 8."""


@dataclass(frozen=True, eq=False)
class Given:
    """What the loop starts from."""

    code_TL: Float[Tensor, "t l"]
    """Strengths, times the norm's scalar."""
    E_LN: Float[Tensor, "l n"]
    """What a latent of strength 1 contributes to each neuron, where gated to its gate."""
    w_N: Float[Tensor, " n"]


def given(chunk: SiteChunk, tokens: int) -> Given:
    """The first tokens of a chunk; for a gated MLP, at its gates."""
    one = chunk.effective
    some = chunk.piece(slice(0, tokens))
    code_TL = some.weight_E.new_zeros(some.lists.n_items, len(one.E_LN))
    code_TL[some.lists.items_N, some.lists.index_N.long()] = some.weight_E
    return Given(code_TL, (one.gate or one.value).E_LN, one.out_norm_N)


def published_loop(given: Given, summed: bool = False) -> Float[Tensor, "l l"]:
    """[i, j]: what j contributes where i contributes most, over all tokens; 0 for i = j."""
    n_latents = len(given.E_LN)
    size = min(SEQUENCE, max(1, ELEMENTS // n_latents**2))
    total_LL = given.w_N.new_zeros(n_latents, n_latents)
    for code_TL in given.code_TL.split(size):
        matrix_TLL = given.w_N.new_zeros(len(code_TL), n_latents, n_latents)
        for code_L, matrix_LL in zip(code_TL, matrix_TLL, strict=True):
            _of_token(code_L, given, matrix_LL, summed)
        total_LL += matrix_TLL.sum(0)
    return total_LL


def _of_token(code_L: Tensor, given: Given, matrix_LL: Tensor, summed: bool) -> None:
    active_K = torch.where(code_L != 0)[0]
    if not len(active_K):
        return
    size_KN = (given.E_LN[active_K] * code_L[active_K, None]).abs()
    largest_N = active_K[size_KN.argmax(0)]
    weighed_NK = (size_KN * given.w_N).T
    places = largest_N[:, None], active_K
    if summed:
        matrix_LL.index_put_(places, weighed_NK, accumulate=True)
    else:
        matrix_LL[places] += weighed_NK
    matrix_LL[largest_N, largest_N] = 0

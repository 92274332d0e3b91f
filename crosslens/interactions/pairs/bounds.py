"""What two latents can have of each other at a site, from the weights alone."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from crosslens.functional import pairs as F
from crosslens.functional.blocks import split_rows
from crosslens.functional.gathers import Lists, starts_of
from crosslens.interactions.neurons.contributions import Effective
from crosslens.kernels import products

PAIRS = 1024
"""Pairs whose factors are held together."""


def product_strengths(effective: Effective) -> bool:
    """Whether the bound at strengths 1 grows with a_i a_j, and then is the coupling itself; else it
    grows with √(a_i a_j) and is at least the coupling."""
    return effective.gate is not None or effective.mlp.kind == "relu2"


def factors_of(effective: Effective, at: slice | Tensor) -> tuple[Tensor, Tensor]:
    """Left and right factors of some latents; the bound of i and j is ⟨left_i, right_j⟩, where
    gated of i's value and j's gate."""
    w_N = effective.out_norm_N
    if effective.gate is not None:
        return F.gated_factors(effective.value.E_LN[at], effective.gate.E_LN[at], w_N)
    return F.factors(effective.mlp.kind, effective.value.E_LN[at], w_N)


@torch.no_grad()
def bounds_of(
    effective: Effective, i_Q: Int64[Tensor, " q"], j_Q: Int64[Tensor, " q"]
) -> Float[Tensor, " q"]:
    """The bound of some pairs at strengths 1, either way together."""
    found = [effective.out_norm_N.new_zeros(0)]
    for i, j in zip(split_rows(i_Q, PAIRS), split_rows(j_Q, PAIRS), strict=True):
        (left, right), (left_other, right_other) = (
            factors_of(effective, i),
            factors_of(effective, j),
        )
        found.append((left * right_other).sum(-1))
        if effective.gate is not None:
            found[-1] += (left_other * right).sum(-1)
    return torch.cat(found)


@torch.no_grad()
def bounds_of_many(
    effective: Effective, i_Q: Int64[Tensor, " q"], j_Q: Int64[Tensor, " q"]
) -> Float[Tensor, " q"]:
    """The same of pairs that ascend by i: of many several times as fast, while the factors of all
    latents are held."""
    n_latents = len(effective.E_LN)
    left_LN, right_LN = factors_of(effective, slice(0, n_latents))
    starts_I = starts_of(torch.bincount(i_Q, minlength=n_latents))
    lists = Lists(starts_I, j_Q.int())
    bound_Q: Tensor = products(lists, left_LN, right_LN)
    return bound_Q if effective.gate is None else bound_Q + products(lists, right_LN, left_LN)


@torch.no_grad()
def own_bounds(effective: Effective) -> Float[Tensor, " l"]:
    """⟨left_i, right_i⟩ of each latent."""
    n = len(effective.E_LN)
    spans = [slice(start, start + PAIRS) for start in range(0, n, PAIRS)]
    pairs = (factors_of(effective, span) for span in spans)
    return torch.cat([(left * right).sum(-1) for left, right in pairs])

"""A screen of all pairs of latents, also of those that never meet, from the weights alone.

What two latents of strengths a_i, a_j can have of each other at a site's neurons is bounded by
something that separates into a factor of the one and a factor of the other, so that the bounds of
all pairs are one product of two matrices. It is made block by block, and only a running list of the
highest is kept: never latents².
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from crosslens.errors import CrosslensError, UsageError
from crosslens.interactions.neurons.contributions import Effective
from crosslens.interactions.pairs.bounds import bounds_of_many, factors_of, product_strengths
from crosslens.interactions.pairs.totals import Met
from crosslens.interactions.sums import Sums


@dataclass(frozen=True, kw_only=True)
class ScreenPlan:
    """How all pairs are screened."""

    top: int = 1000
    block: int = 2048
    """Latents on either side of a product: 16 MB of bounds at a time."""

    def __post_init__(self) -> None:
        if min(self.top, self.block) < 1:
            raise UsageError("A screen needs a top list and blocks of at least 1.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Screened:
    """The highest bounds, the highest first; of equal ones the first by i, then j."""

    i_C: Int64[Tensor, " c"]
    """i < j; where gated, i's value against j's gate, in any order."""
    j_C: Int64[Tensor, " c"]
    bound_C: Float[Tensor, " c"]
    """Of the coupling of the two at strengths 1, or at those given; with `met`, divided by one more
    than the tokens on which they met."""
    met_C: Int64[Tensor, " c"] | None
    """On how many tokens they met; None where that was not asked."""


@torch.no_grad()
def screen(
    effective: Effective,
    plan: ScreenPlan = ScreenPlan(),
    *,
    strength_L: Float[Tensor, " l"] | None = None,
    met: Sums | None = None,
) -> Screened:
    """The pairs with the highest bounds `functional.pairs.factors`, over all L².

    Time: a product of [L, N] and [N, L] matrices (half of it twice where there is no gate: 13
    TFLOP for 65,536 latents and 1536 neurons); memory: a few blocks beside the weights.

    Args:
        strength_L: each latent's typical strength, times the norm's typical scalar. A latent whose
            strength is 0 is in no pair.
        met: sums over tokens; pairs then count less the oftener they met. Those whose keys were
            dropped count as never met.

    Raises:
        CrosslensError: no bound is above 0.
    """
    if strength_L is not None and len(strength_L) != len(effective.E_LN):
        raise UsageError(
            f"There are {len(strength_L)} typical strengths for {len(effective.E_LN)} latents."
        )
    top = _Top(plan.top, effective.E_LN.device)
    for rows, columns in _blocks(effective, plan.block):
        bound_IJ = _bounds(effective, rows, columns, strength_L)
        if met is not None:
            _discount(bound_IJ, rows, columns, met, len(effective.E_LN))
        top.add(bound_IJ, rows, columns)
    return top.screened(met, len(effective.E_LN), effective.site)


def weighed(met: Met) -> Float[Tensor, " u"]:
    """The screen's bound on the coupling of every pair that met, summed over tokens: the sparse
    Gram matrix of strengths (Σ_t √(a_i a_j), or Σ_t a_i a_j) times the bound at strengths 1."""
    return met.column("gram") * bounds_of_many(met.effective, *met.pairs)


def _blocks(effective: Effective, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of all pairs; without a gate a pair is the same either way, so that half will do."""
    n = len(effective.E_LN)
    for first in range(0, n, size):
        for second in range(0 if effective.gate is not None else first, n, size):
            yield slice(first, min(first + size, n)), slice(second, min(second + size, n))


def _bounds(effective: Effective, rows: slice, columns: slice, strength_L: Tensor | None) -> Tensor:
    """The bounds of a block; 0 on and, without a gate, below the diagonal."""
    left, right = factors_of(effective, rows)[0], factors_of(effective, columns)[1]
    if strength_L is not None:
        strength_L = strength_L.to(left)
        if not product_strengths(effective):
            strength_L = strength_L.sqrt()
        left, right = left * strength_L[rows, None], right * strength_L[columns, None]
    bound_IJ = left @ right.T
    if rows == columns:
        bound_IJ.fill_diagonal_(0.0)
        if effective.gate is None:
            bound_IJ.triu_()
    return bound_IJ


def _discount(bound_IJ: Tensor, rows: slice, columns: slice, met: Sums, n_latents: int) -> None:
    """Divide, in place, by one more than the tokens on which the two met."""
    for first, second, turned in ((rows, columns, False), (columns, rows, True)):
        edges = torch.tensor([first.start, first.stop], device=met.key_U.device) * n_latents
        low, high = torch.searchsorted(met.key_U, edges).tolist()
        i_U, j_U = met.key_U[low:high] // n_latents, met.key_U[low:high] % n_latents
        inside_U = (j_U >= second.start) & (j_U < second.stop)
        at_U = i_U[inside_U] - first.start, j_U[inside_U] - second.start
        part_IJ = bound_IJ.T if turned else bound_IJ
        part_IJ[at_U] /= met.count_U[low:high][inside_U] + 1


class _Top:
    """The highest pairs so far."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n = n
        self.bound_C = torch.zeros(0, device=device)
        self.i_C = torch.zeros(0, dtype=torch.int64, device=device)
        self.j_C = torch.zeros(0, dtype=torch.int64, device=device)

    def add(self, bound_IJ: Tensor, rows: slice, columns: slice) -> None:
        """Take in a block. A block brings at most about `n` pairs, and ties at its own cut."""
        if len(self.bound_C) == self.n:
            cut = self.bound_C[-1]
        else:
            cut = bound_IJ.flatten().topk(min(self.n, bound_IJ.numel())).values[-1]
        i_X, j_X = ((bound_IJ >= cut) & (bound_IJ > 0)).nonzero(as_tuple=True)
        bound_C = torch.cat([self.bound_C, bound_IJ[i_X, j_X]])
        i_C, j_C = (
            torch.cat([self.i_C, i_X + rows.start]),
            torch.cat([self.j_C, j_X + columns.start]),
        )
        order = (i_C * (1 << 31) + j_C).argsort()
        order = order[bound_C[order].argsort(descending=True, stable=True)][: self.n]
        self.bound_C, self.i_C, self.j_C = bound_C[order], i_C[order], j_C[order]

    def screened(self, met: Sums | None, n_latents: int, site: str) -> Screened:
        if not len(self.bound_C):
            raise CrosslensError(
                f"No pair of latents can interact at {site}: none have opposite signs at any "
                "neuron, or the decoder or all strengths are zero."
            )
        counts_C = None
        if met is not None:
            first, second = torch.minimum(self.i_C, self.j_C), torch.maximum(self.i_C, self.j_C)
            place_C, there_C = met.found(first * n_latents + second)
            counts_C = met.count_U[place_C].where(there_C, 0) if len(met.key_U) else place_C
        return Screened(i_C=self.i_C, j_C=self.j_C, bound_C=self.bound_C, met_C=counts_C)

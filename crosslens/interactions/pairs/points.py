"""Where neurons stand on some tokens before two latents are added: in each context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.functional import pairs as F
from crosslens.functional.gathers import Lists, starts_of
from crosslens.functional.interactions import Kind
from crosslens.interactions.neurons.contributions import Branch, SiteChunk
from crosslens.kernels import bag_sum

CONTEXTS = ("rest", "bias", "shapley")
"""All else on the token; the always-on part alone; the mean over coalitions of all else, the
always-on part being in all of them (the Shapley interaction index)."""


@dataclass(frozen=True)
class Coalition:
    """Who of a chunk is in."""

    latent_E: Tensor
    """Per entry (bool)."""
    error_R: Tensor
    """Per row."""

    @classmethod
    def drawn(cls, counts_R: Tensor, generator: torch.Generator) -> Coalition:
        """A random one for every row; see `functional.pairs.random_coalition`."""
        latent_E, error_R = F.random_coalition(counts_R, generator)
        return cls(latent_E.to(counts_R.device), error_R.to(counts_R.device))


@dataclass(frozen=True)
class Drive:
    """What goes into neurons: to what φ acts on and, where they are gated, to the value."""

    inner: Tensor
    value: Tensor | None

    def turned(self, function: Callable[..., Tensor], *others: Drive) -> Drive:
        """The function of both, with the same parts of others."""
        inner = function(self.inner, *(other.inner for other in others))
        if self.value is None:
            return Drive(inner, None)
        return Drive(inner, function(self.value, *(other.value for other in others)))


@dataclass(frozen=True)
class Context:
    """A coalition on some tokens: the sum of its members, the two latents perhaps among them."""

    point_R: Drive
    latent_E: Tensor | bool
    """Which latents are in, per entry of the chunk; or whether all are."""

    def holds(self, entry_Q: Tensor) -> Float[Tensor, " q"]:
        """1 where the latents of these entries are in, else 0."""
        if isinstance(self.latent_E, Tensor):
            return self.latent_E[entry_Q].float()
        return torch.full(entry_Q.shape, float(self.latent_E), device=entry_Q.device)

    def without(self, row_Q: Tensor, pairs: Sequence[tuple[Tensor, Drive]]) -> Drive:
        """The sum at each row without some latents (entries, contributions), if they are in."""
        point_Q = self.point_R.turned(lambda x_RN: x_RN.index_select(0, row_Q))
        for entry_Q, latent_Q in pairs:
            if isinstance(self.latent_E, Tensor):
                inside_Q = self.holds(entry_Q)[:, None]
                point_Q = point_Q.turned(
                    lambda x, y, i=inside_Q: x.addcmul_(y, i, value=-1), latent_Q
                )
            elif self.latent_E:
                point_Q = point_Q.turned(lambda x, y: x.sub_(y), latent_Q)
        return point_Q


@dataclass(frozen=True)
class Points:
    """Some tokens of a chunk in every context."""

    chunk: SiteChunk
    row_R: Tensor
    contexts: tuple[Context, ...]
    """`rest`, `bias`, then one for each drawn coalition."""

    @cached_property
    def largest_RN(self) -> Float[Tensor, "r n"]:
        """The largest |y| of any latent, y being what φ acts on."""
        return _largest(self.chunk, self.inner, *some_rows(self.chunk.lists, self.row_R))

    @property
    def inner(self) -> Branch:
        """What φ acts on."""
        return branches(self.chunk)[0]

    @property
    def value(self) -> Branch | None:
        """What a gate multiplies."""
        return branches(self.chunk)[1]

    @property
    def kind(self) -> Kind:
        return self.chunk.effective.mlp.kind

    @property
    def w_N(self) -> Tensor:
        return self.chunk.effective.out_norm_N

    def latents(self, entry_Q: Tensor) -> Drive:
        """What the latents of some entries contribute."""
        inner, value = self.inner, self.value
        latent_Q, weight_Q = self.chunk.lists.index_N[entry_Q], self.chunk.weight_E[entry_Q]

        def of(branch: Branch) -> Tensor:
            return branch.E_LN.index_select(0, latent_Q).mul_(weight_Q[:, None])

        return Drive(of(inner), None if value is None else of(value))


def points(chunk: SiteChunk, row_R: Tensor, drawn: Sequence[Coalition]) -> Points:
    """Those of some rows of a chunk, each of which has a latent."""
    lists, entry_E = some_rows(chunk.lists, row_R)
    inner, value = branches(chunk)
    sums = [_sums(chunk, branch, row_R, (lists, entry_E), drawn) for branch in (inner, value)]
    drives = [Drive(*pair) for pair in zip(*sums, strict=True)]
    inside: list[Tensor | bool] = [True, False, *(each.latent_E for each in drawn)]
    contexts = tuple(Context(*pair) for pair in zip(drives, inside, strict=True))
    return Points(chunk, row_R, contexts)


def some_rows(lists: Lists, row_R: Tensor) -> tuple[Lists, Tensor]:
    """The lists of some rows, and which entries these are."""
    counts_R = lists.counts_I[row_R]
    starts_R = starts_of(counts_R)
    shift_R = lists.starts_I[row_R] - starts_R[:-1]
    entry_E = torch.arange(int(starts_R[-1]), device=row_R.device)
    entry_E = entry_E + shift_R.repeat_interleave(counts_R)
    return Lists(starts_R, lists.index_N[entry_E]), entry_E


def branches(chunk: SiteChunk) -> tuple[Branch, Branch | None]:
    """What φ acts on and, where there is a gate, what it multiplies."""
    one = chunk.effective
    return (one.value, None) if one.gate is None else (one.gate, one.value)


def _sums(
    chunk: SiteChunk,
    branch: Branch | None,
    row_R: Tensor,
    listed: tuple[Lists, Tensor],
    drawn: Sequence[Coalition],
) -> list[Tensor | None]:
    """What goes into a branch in each context."""
    if branch is None:
        return [None] * (2 + len(drawn))
    lists, entry_E = listed
    weight_E = chunk.weight_E[entry_E]
    always_RN, error_RN = chunk.constant(branch, row_R), chunk.error(branch, row_R)
    whole_RN = bag_sum(lists, weight_E, branch.E_LN) + always_RN + error_RN
    found: list[Tensor | None] = [whole_RN, always_RN]
    for each in drawn:
        some_RN = bag_sum(lists, weight_E * each.latent_E[entry_E], branch.E_LN)
        found.append((some_RN + always_RN).addcmul_(error_RN, each.error_R[row_R, None].float()))
    return found


def _largest(chunk: SiteChunk, inner: Branch, lists: Lists, entry_E: Tensor) -> Tensor:
    size_EN = inner.E_LN.index_select(0, lists.index_N)
    size_EN.mul_(chunk.weight_E[entry_E, None]).abs_()
    return torch.stack([row.amax(0) for row in torch.split(size_EN, lists.counts_I.tolist())])

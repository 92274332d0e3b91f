"""Sums by pair of latents, over pairs that met and none else, with a bounded number of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums for some pairs. The key of a pair i < j is i·L + j, L the number of latents."""

    key_U: Int64[Tensor, " u"]
    """Ascending, each once."""
    count_U: Int64[Tensor, " u"]
    """Tokens on which both latents were active."""
    total_UM: Float[Tensor, "u m"]
    """float64, one column per measure."""
    dropped_M: Float[Tensor, " m"]
    """What was dropped to bound the number of keys, so that kept and dropped together are all."""
    slack_M: Float[Tensor, " m"]
    """A pair's total may be too low by so much at most, and one that is not among the keys has no
    more: the sum over drops of the largest total that was dropped."""
    dropped_count: int = 0
    """Likewise of the counts, summed over pairs."""

    @property
    def all_M(self) -> Tensor:
        """The sum over all pairs, also those dropped [M]."""
        return self.total_UM.sum(0) + self.dropped_M

    @property
    def all_count(self) -> int:
        """Meetings of all pairs, also of those dropped."""
        return int(self.count_U.sum()) + self.dropped_count

    def only(self, columns: slice) -> Sums:
        """Some of the columns."""
        return replace(
            self,
            total_UM=self.total_UM[:, columns],
            dropped_M=self.dropped_M[columns],
            slack_M=self.slack_M[columns],
        )

    def found(self, key_Q: Int64[Tensor, " q"]) -> tuple[Tensor, Tensor]:
        """Where these keys are, and whether they are there at all (else the place is any)."""
        return places(self.key_U, key_Q)


def places(key_U: Int64[Tensor, " u"], wanted_Q: Int64[Tensor, " q"]) -> tuple[Tensor, Tensor]:
    """Where each of some numbers is in an ascending list, and whether it is there."""
    if not len(key_U):
        nowhere_Q = torch.zeros_like(wanted_Q)
        return nowhere_Q, nowhere_Q.bool()
    place_Q = torch.searchsorted(key_U, wanted_Q).clamp_max(len(key_U) - 1)
    return place_Q, key_U[place_Q] == wanted_Q


def fresh(key_U: Tensor, count_U: Tensor, total_UM: Tensor) -> Sums:
    """Sums of which nothing was dropped."""
    nothing_M = total_UM.new_zeros(total_UM.shape[1])
    return Sums(
        key_U=key_U, count_U=count_U, total_UM=total_UM, dropped_M=nothing_M, slack_M=nothing_M
    )


def merged(parts: Sequence[Sums]) -> Sums:
    """One sum for each pair of any part. There must be at least one part."""
    if len(parts) == 1:
        return parts[0]
    key_N = torch.cat([part.key_U for part in parts])
    key_U, place_N = torch.unique(key_N, return_inverse=True)
    count_N = torch.cat([part.count_U for part in parts])
    total_NM = torch.cat([part.total_UM for part in parts])
    return Sums(
        key_U=key_U,
        count_U=summed(place_N, count_N.double(), len(key_U)).long(),
        total_UM=torch.stack([summed(place_N, x_N, len(key_U)) for x_N in total_NM.T], -1),
        dropped_M=torch.stack([part.dropped_M for part in parts]).sum(0),
        dropped_count=sum(part.dropped_count for part in parts),
        slack_M=torch.stack([part.slack_M for part in parts]).sum(0),
    )


def summed(place_N: Tensor, value_N: Tensor, n: int) -> Float[Tensor, " n"]:
    """Σ of values by their place, float64. (`index_add_` is several times slower on a CPU.)"""
    found_N: Tensor = torch.bincount(place_N, weights=value_N.double(), minlength=n)
    return found_N.double()  # of nothing, integers


def cut(sums: Sums, most: int, leading: Sequence[int] = (0,)) -> Sums:
    """The `most` pairs with the largest shares of the leading columns' wholes, added up; of equal
    ones those with the lowest keys. What the others had is added to `dropped_M`, `dropped_count`
    and `slack_M`."""
    if len(sums.key_U) <= most:
        return sums
    columns = list(leading)
    whole_M = sums.all_M[columns].clamp_min(torch.finfo(torch.float64).tiny)
    kept = highest((sums.total_UM[:, columns] / whole_M).sum(1), most)
    gone_UM = sums.total_UM[~kept]
    return Sums(
        key_U=sums.key_U[kept],
        count_U=sums.count_U[kept],
        total_UM=sums.total_UM[kept],
        dropped_M=sums.dropped_M + gone_UM.sum(0),
        slack_M=sums.slack_M + gone_UM.amax(0),
        dropped_count=sums.dropped_count + int(sums.count_U[~kept].sum()),
    )


def highest(score_U: Tensor, most: int) -> Bool[Tensor, " u"]:
    """Which are the `most` highest; of equal ones the first. All where there are no more."""
    if len(score_U) <= most:
        return torch.ones_like(score_U, dtype=torch.bool)
    bar = score_U.kthvalue(len(score_U) - most + 1).values
    above_U, level_U = score_U > bar, score_U == bar
    return above_U | (level_U & (level_U.cumsum(0) <= most - above_U.sum()))


class Gathering:
    """Sums that grow chunk by chunk: parts wait until there are many keys among them, then they are
    merged and cut, so that at most about twice `most` keys are ever held, and those of a chunk."""

    def __init__(self, most: int, leading: Sequence[int] = (0,)) -> None:
        self.most, self.leading = most, leading
        self._parts: list[Sums] = []

    def add(self, part: Sums) -> None:
        """Take in the sums of one chunk."""
        self._parts.append(part)
        if sum(len(each.key_U) for each in self._parts) > 2 * self.most:
            self._parts = [self.sums()]

    def sums(self) -> Sums:
        """The sums so far, `most` keys at most."""
        return cut(merged(self._parts), self.most, self.leading)

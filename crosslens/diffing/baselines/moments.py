"""Sums over the differences of two models' activations: what a mean and a covariance need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from crosslens.activations import Source
from crosslens.diffing.baselines.place import Place
from crosslens.diffing.stream import Progress, quiet
from crosslens.errors import CrosslensError

FIRST = 5
"""Positions at the start of a block that are also averaged by themselves (ADL)."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of b − a at one place, over the tokens of a source that count, raw."""

    place: Place
    count: int
    mean_D: Float64[Tensor, " d"]
    covariance_DD: Float64[Tensor, "d d"]
    """Divided by the count."""
    first_FD: Float64[Tensor, "f d"]
    """The mean at each of the first positions of a block; 0 where the policy keeps no token."""
    first_F: Int64[Tensor, " f"]
    """Tokens behind each of them."""
    norm_b: float
    """Mean norm of b's activation."""

    @property
    def spread(self) -> float:
        """Root mean square of the difference about its mean."""
        return float(self.covariance_DD.trace().clamp_min(0).sqrt())


@torch.no_grad()
def moments(
    source: Source, places: Sequence[Place], progress: Progress = quiet
) -> dict[str, Moments]:
    """One pass of the models over all blocks; moments by the places' `site`.

    Memory: a float64 matrix [D, D] for each place.

    Raises:
        CrosslensError: the token policy keeps fewer than two tokens.
    """
    sums = [_Sums(place) for place in places]
    for done, chunk in enumerate(source, 1):
        rows_RX, position_R = chunk.rows(), chunk.row_R % source.block_length
        for each in sums:
            each.add(rows_RX, position_R)
        progress(done, source.n_chunks)
    return {each.place.site: each.moments() for each in sums}


class _Sums:
    """Running sums in float64, on the CPU unless the device has that format."""

    def __init__(self, place: Place) -> None:
        width = place.width
        self.place = place
        self.count = 0
        self.norm = 0.0
        self.sum_D = torch.zeros(width, dtype=torch.float64)
        self.square_DD = torch.zeros(width, width, dtype=torch.float64)
        self.first_FD = torch.zeros(FIRST, width, dtype=torch.float64)
        self.first_F = torch.zeros(FIRST, dtype=torch.int64)

    def add(self, rows_RX: Tensor, position_R: Tensor) -> None:
        difference_RD = self.place.difference(rows_RX)
        if difference_RD.device.type != "cuda":
            difference_RD = difference_RD.cpu()
        difference_RD = difference_RD.double()
        self.count += len(rows_RX)
        self.norm += float(self.place.activation_b(rows_RX).norm(dim=-1).sum())
        self.sum_D += difference_RD.sum(0).cpu()
        self.square_DD += (difference_RD.T @ difference_RD).cpu()
        early_R = (position_R < FIRST).nonzero().squeeze(-1)
        at_R = position_R[early_R]
        early_RD = difference_RD[early_R.to(difference_RD.device)].cpu()
        self.first_FD.index_add_(0, at_R, early_RD)
        self.first_F += at_R.bincount(minlength=FIRST)

    def moments(self) -> Moments:
        if self.count < 2:
            raise CrosslensError(
                f"The token policy keeps {self.count} tokens: there is no mean difference to take. "
                "Give more text."
            )
        mean_D = self.sum_D / self.count
        return Moments(
            place=self.place,
            count=self.count,
            mean_D=mean_D,
            covariance_DD=self.square_DD / self.count - mean_D.outer(mean_D),
            first_FD=self.first_FD / self.first_F.clamp_min(1)[:, None],
            first_F=self.first_F,
            norm_b=self.norm / self.count,
        )

"""The post's footnote 6: features and errors taken as independent, binned distributions pushed
through a layer. An estimate of what the bounds bound; never itself a bound.

Each latent's strength becomes a distribution of few values (0 among them) with their shares, and
rows are drawn latent by latent, as if none knew of another. The coder's error becomes a binned
distribution of its norm, in a direction of its own. Errors that are independent add in squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosslens.proofs.local_gather import Gathered, padded
from crosslens.proofs.local_truth import SURROGATES, Truth

BINS = 16


@dataclass(frozen=True)
class Binned:
    """Values and their shares along the last axis; shares add up to 1."""

    value: Tensor
    share: Tensor

    @property
    def mean(self) -> Tensor:
        return (self.value * self.share).sum(-1)

    def drawn(self, n: int, generator: torch.Generator) -> Tensor:
        """n independent draws of each distribution [..., n]."""
        share = self.share.reshape(-1, self.share.shape[-1])
        at = torch.multinomial(share, n, replacement=True, generator=generator)
        return self.value.reshape(share.shape).gather(1, at).reshape(*self.value.shape[:-1], n)


def binned(sample_FR: Tensor, bins: int = BINS) -> Binned:
    """Each row's distribution [F, bins]: 0 has its own bin, the others hold equal shares of what is
    positive, each at its mean."""
    n, parts = sample_FR.shape[-1], bins - 1
    value = sample_FR.new_zeros(len(sample_FR), bins)
    share = torch.zeros_like(value)
    for row, sample in enumerate(sample_FR):
        positive = sample[sample > 0].sort().values
        pieces = [piece for piece in positive.tensor_split(parts) if len(piece)]
        for i, piece in enumerate(pieces, 1):
            value[row, i], share[row, i] = piece.mean(), len(piece) / n
        share[row, 0] = 1 - len(positive) / n
    return Binned(value, share)


def in_squares(a: Binned, b: Binned, bins: int = BINS) -> Binned:
    """The distribution of √(A² + B²) of independent A and B (one of each), binned again."""
    value = (a.value[:, None].square() + b.value[None].square()).sqrt().flatten()
    share = (a.share[:, None] * b.share[None]).flatten()
    order = value.argsort()
    value, share = value[order], share[order]
    edges = (share.cumsum(0) * bins).floor().long().clamp(0, bins - 1)
    weight = torch.zeros(bins, dtype=value.dtype).index_add_(0, edges, share)
    total = torch.zeros(bins, dtype=value.dtype).index_add_(0, edges, share * value)
    return Binned(torch.where(weight > 0, total / weight.clamp_min(1e-300), 0.0), weight)


def dense(coder: Mapping[str, Tensor]) -> Tensor:
    """Strengths [F, R]."""
    index, strength = coder["index"], coder["strength"].double()
    z_RF = torch.zeros(len(index), len(coder["decoder"]), dtype=torch.float64)
    return z_RF.scatter_add_(1, index, strength).T.contiguous()


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an average row is thought to have."""

    site: str
    bins: int
    draws: int
    interaction: Mapping[str, float]
    """Surrogate → mean ‖f(x̂) − surrogate‖ / mean ‖f(x̂)‖ of the drawn rows."""
    transition: float
    """Mean ‖f(x) − f(x̂)‖ / mean ‖f(x̂)‖, the error in a direction of its own."""
    whole: Mapping[str, float]
    """Both in squares: of ‖f(x) − surrogate‖."""

    def plain(self) -> dict[str, Any]:
        """JSON-able; says that it is no bound."""
        return {"is_bound": False, **self.__dict__}


@torch.no_grad()
def estimate(
    given: Gathered, affine_3N: Tensor, draws: int = 128, seed: int = 0, bins: int = BINS
) -> Estimate:
    """Push independent binned features, and an independent binned error, through one MLP."""
    generator = torch.Generator().manual_seed(seed)
    codes = binned(dense(given.coder), bins).drawn(draws, generator)
    index, strength = padded(codes.T.contiguous())
    coder = {**given.coder, "affine": affine_3N, "index": index, "strength": strength}
    real = Truth(given.weights, {**given.coder, "affine": affine_3N})
    drawn = Truth(given.weights, coder)
    error = (given.x_RD - real.decoded()).norm(dim=1)
    size = binned(error[None], bins).drawn(draws, generator)[0]
    way = torch.randn(draws, given.x_RD.shape[1], generator=generator, dtype=torch.float64)
    decoded = drawn.decoded()
    made = drawn.output(decoded)
    moved = drawn.output(decoded + way * (size / way.norm(dim=1))[:, None]) - made
    surrogates = drawn.surrogates()
    output = float(made.norm(dim=1).mean())
    transition = moved.norm(dim=1)
    missed = {name: (made - surrogates[name]).norm(dim=1) for name in SURROGATES}
    return Estimate(
        site=given.site,
        bins=bins,
        draws=draws,
        interaction={name: float(each.mean()) / output for name, each in missed.items()},
        transition=float(transition.mean()) / output,
        whole={name: _whole(transition, each, bins) / output for name, each in missed.items()},
    )


def _whole(a_R: Tensor, b_R: Tensor, bins: int) -> float:
    one, other = (binned(x[None], bins) for x in (a_R, b_R))
    both = in_squares(
        Binned(one.value[0], one.share[0]), Binned(other.value[0], other.share[0]), bins
    )
    return float(both.mean)

"""Which latents are of one model only: the published bins over decoder norms, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from crosslens.diffing.norms import Norms
from crosslens.errors import UsageError
from crosslens.functional.shares import wilson

NAMES = ("only_a", "only_b", "shared", "other", "dead")
"""What a label's number stands for."""
ONLY_A, ONLY_B, SHARED, OTHER, DEAD = range(len(NAMES))


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Where one class ends and another begins; all bounds are strict, as in the published code."""

    measure: Literal["relative_norm", "norm_difference"]
    """What the bounds are of: r of Kissane et al. or Δ of Minder et al."""
    only_a_below: float
    shared_above: float
    shared_below: float
    only_b_above: float

    def __post_init__(self) -> None:
        bounds = (self.only_a_below, self.shared_above, self.shared_below, self.only_b_above)
        if list(bounds) != sorted(bounds) or bounds[0] < 0 or bounds[-1] > 1:
            raise UsageError(
                "Bounds of bins must ascend from 0 to 1 (only a, shared from, shared to, only b), "
                f"found {', '.join(map(str, bounds))}."
            )


KISSANE = Bins(
    measure="relative_norm",
    only_a_below=0.3,
    shared_above=0.3,
    shared_below=0.7,
    only_b_above=0.7,
)
"""Kissane et al. 2024 bound the shared ones, .3 < r < .7; what lies beyond is of one model."""
MINDER = Bins(
    measure="norm_difference",
    only_a_below=0.1,
    shared_above=0.4,
    shared_below=0.6,
    only_b_above=0.9,
)
"""Minder et al. 2025 (2504.02922), over Δ; what lies between is `other`."""
ANTHROPIC = Bins(
    measure="relative_norm",
    only_a_below=0.05,
    shared_above=0.05,
    shared_below=0.95,
    only_b_above=0.95,
)
"""Anthropic, February 2025: r beyond .05 or .95 is exclusive."""
PUBLISHED: Mapping[str, Bins] = {"kissane": KISSANE, "minder": MINDER, "anthropic": ANTHROPIC}


@dataclass(frozen=True)
class Classes:
    """A label for each latent."""

    bins: Bins
    label_L: Int64[Tensor, " l"]
    """Index into `NAMES`."""

    def mask(self, *names: str) -> Tensor:
        """The latents of these classes [L] (bool)."""
        wanted = torch.tensor([NAMES.index(name) for name in names])
        return torch.isin(self.label_L, wanted)

    @property
    def counts(self) -> dict[str, int]:
        """How many latents are of each class."""
        counts = torch.bincount(self.label_L, minlength=len(NAMES)).tolist()
        return dict(zip(NAMES, counts, strict=True))

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Wilson's interval of each count, out of the latents that are alive (of `dead`: of all).

        It treats the latents as independent draws from all that such a training might have found.
        That is what a bootstrap over latents would give, without its noise, and unlike the normal
        approximation it holds at counts of 0 to 5, where a diff's news is. It knows nothing of how
        counts vary from seed to seed: that is for several seeds and for the nulls to say.
        """
        total = len(self.label_L)
        alive = total - self.counts["dead"]
        sizes = {name: total if name == "dead" else alive for name in NAMES}
        shares = {name: wilson(n, sizes[name], level) for name, n in self.counts.items()}
        return {name: (a * sizes[name], b * sizes[name]) for name, (a, b) in shares.items()}


def classes(norms: Norms, count_L: Int64[Tensor, " l"], bins: Bins) -> Classes:
    """The class of each latent.

    Args:
        count_L: tokens on which each latent was active. One that never was, or that writes
            nothing, is `dead`: its norms are those that it started with, or noise.
    """
    value_L = getattr(norms, f"{bins.measure}_L")
    label_L = torch.full(value_L.shape, OTHER)
    label_L[value_L < bins.only_a_below] = ONLY_A
    label_L[value_L > bins.only_b_above] = ONLY_B
    label_L[(value_L > bins.shared_above) & (value_L < bins.shared_below)] = SHARED
    label_L[(count_L.cpu() == 0) | value_L.isnan()] = DEAD
    return Classes(bins, label_L)


def near_start(norms: Norms, start_norm: float, tolerance: float = 0.02) -> Tensor:
    """Latents whose decoder norm at every site is still that of the start, within a share of it
    [L] (bool): alive or dead, they have not learnt enough for their class to mean anything.

    Args:
        start_norm: the norm at each site that the coder began with, in scaled units, such as the
            `decoder_norm` of its init.
    """
    near = [
        (n_LP - start_norm).abs() <= tolerance * start_norm for n_LP in (norms.a_LP, norms.b_LP)
    ]
    return near[0].all(-1) & near[1].all(-1)

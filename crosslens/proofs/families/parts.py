"""What a family of models is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crosslens.proofs.certificate import Refused
from crosslens.proofs.ledger import Cost
from crosslens.proofs.rounding import down

Tensors = Mapping[str, Tensor]

MOST_NUMBERS = 2**27
"""In any one tensor."""
MOST_FLOPS = 2**46
"""What a check may cost."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One step of the recursion: each at least the mean, over the data, of its term's norm."""

    site: str
    before: float
    propagation: float
    interaction: float
    transition: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a tier proves: at least `accuracy`, at most `loss` (mean, nats; infinite if unknown)."""

    accuracy: float
    loss: float
    base: float
    """At least the largest error of the coder at the embedding."""
    cost: Cost
    sites: Mapping[str, float] = field(default_factory=dict)
    """Site → at least the mean ‖x − x̂‖ there, where that is known."""
    layers: tuple[Layer, ...] = ()
    """How the errors at the sites came about, where they were got by recursion."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which tier is to bound which group of inputs, of which model."""

    tiers: Mapping[str, str]
    size: Mapping[str, int]
    """Letter → size, as the family's axes name them."""
    weights: Tensors
    coder: Tensors
    data: Tensors
    spare: float = 0.0
    """Share of the logits' size by which a margin must exceed its radius to count. The checker
    takes 0; who writes a certificate takes more, so that the same points count on a machine that
    sums in another order."""

    @property
    def tier(self) -> str:
        """Of a family that has one group only."""
        return self.tiers["all"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of model: what its tensors look like, and which tiers bound it."""

    weights: Mapping[str, str]
    """Name → its axes; one letter stands for one size everywhere."""
    coder: Mapping[str, str]
    data: Mapping[str, str]
    tiers: tuple[str, ...]
    evaluate: Callable[[Asked], Bounds]
    hints: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the coder that may be there, all or none."""
    whole: frozenset[str] = frozenset()
    """Tensors of the coder that hold int64, not floats."""
    mixes: bool = False
    """Whether groups of inputs may have tiers of their own."""


def affordable(cost: Cost, *arrays: int) -> Cost:
    """`cost`, unless it or the largest of the arrays that the check makes is too much."""
    if max(arrays) > MOST_NUMBERS:
        raise Refused(f"The check would hold {max(arrays)} numbers, more than {MOST_NUMBERS}.")
    if cost.flops > MOST_FLOPS:
        raise Refused(f"The check would take {cost.flops} flops, more than {MOST_FLOPS}.")
    return cost


def share(right: int, among: int) -> float:
    """At most right / among: the quotient rounds by at most one step."""
    quotient = torch.tensor(right / among, dtype=torch.float64)
    exact = right in (0, among)
    return float(quotient if exact else down(quotient))


def within(name: str, values: Tensor, size: int) -> None:
    """Refuse numbers of things that are not there."""
    if bool((values < 0).any()) or bool((values >= size).any()):
        raise Refused(f"{name} hold a number outside 0 … {size - 1}.")

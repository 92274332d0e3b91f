"""How far a neuron is from treating its inputs one by one.

A neuron's pre-activation is a sum of contributions y_i. Were its nonlinearity φ linear, φ(Σ y_i)
would be Σ φ(y_i); what lies between is the interaction of the contributions. I1 to I4 are the names
of the identities in docs/interactions_exact.md, where each is proved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["relu", "gelu", "gelu_tanh", "silu", "relu2"]
"""Nonlinearities that are understood; `relu2` is the square of ReLU."""
KINDS: tuple[Kind, ...] = get_args(Kind)

GAP_BOUND: dict[Kind, float] = {
    "relu": 0.0,
    "gelu": 0.1700,
    "gelu_tanh": 0.1701,
    "silu": 0.2785,
    "relu2": 0.0,
}
"""sup h, rounded up (.16997, .17004 and .27846 to five digits)."""

SLOPE_BOUND: dict[Kind, float] = {
    "relu": 1.0,
    "gelu": 1.1290,
    "gelu_tanh": 1.1292,
    "silu": 1.0999,
}
"""sup |φ′|, rounded up. relu2 has none."""

_TANH_SLOPE = math.sqrt(2 / math.pi)
_TANH_CUBE = 0.044715


def activation(kind: Kind) -> Callable[[Tensor], Tensor]:
    """φ."""
    functional = torch.nn.functional
    known: dict[Kind, Callable[[Tensor], Tensor]] = {
        "relu": torch.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
        "silu": functional.silu,
        "relu2": lambda z: torch.relu(z).square(),
    }
    return known[kind]


def degree(kind: Kind) -> int:
    """d with ψ(c z) = c^d ψ(z) for c ≥ 0, where ψ is φ without its bounded part h."""
    return 2 if kind == "relu2" else 1


def gap(kind: Kind, z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """h(z) = relu(z) − φ(z): even, between 0 and min(`GAP_BOUND`, |z|/2).

    |z| Φ(−|z|) for GELU, |z| σ(−|z|) for SiLU; 0 for ReLU and its square, which are homogeneous.
    """
    size = z.abs()
    match kind:
        case "gelu":
            return size * 0.5 * torch.erfc(size / math.sqrt(2))
        case "gelu_tanh":
            return size * torch.sigmoid(-2 * _TANH_SLOPE * (size + _TANH_CUBE * size**3))
        case "silu":
            return size * torch.sigmoid(-size)
        case _:
            return torch.zeros_like(z)


def even(kind: Kind, z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """φ(z) − z/2, which for GELU and SiLU is even: |z|/2 − h(z)."""
    return activation(kind)(z) - z / 2


@dataclass(frozen=True)
class Series:
    """c_1 z² + c_2 z⁴ + … for `even`, where |z| ≤ `SERIES_REACH`."""

    coefficients: tuple[float, ...]
    bound: float
    """The largest error there."""


SERIES_REACH = 1.0
SERIES: dict[Kind, Series] = {
    "gelu": Series((0.3989358261, -0.0664265193, 0.009775656, -0.0009404178), 2.1e-7),
    "gelu_tanh": Series((0.398935427, -0.0667518348, 0.0099927392, -0.0009845547), 2.2e-7),
    "silu": Series((0.249968729, -0.020638041, 0.001729408), 1.6e-6),
}
"""Minimax fits. Monomials are homogeneous, so that Σ u_i g_i^p is a sparse product."""


@dataclass(frozen=True)
class Signed:
    """Contributions summed with and without their signs; P and Q are the sums of their positive and
    negative parts."""

    total: Tensor
    """Σ y_i = P − Q."""
    size: Tensor
    """Σ |y_i| = P + Q."""

    @property
    def plus(self) -> Tensor:
        """P."""
        return (self.size + self.total) / 2

    @property
    def minus(self) -> Tensor:
        """Q."""
        return (self.size - self.total) / 2

    def joined(self, y: Tensor) -> Signed:
        """With one more contribution, of either sign."""
        return Signed(self.total + y, self.size + y.abs())


def cancelled(sums: Signed) -> Tensor:
    """Σ relu(y_i) − relu(Σ y_i) = min(P, Q), exactly (I1)."""
    return (sums.size - sums.total.abs()) / 2


def coupled(y: Float[Tensor, "*s k"]) -> Float[Tensor, "*s"]:
    """Σ over pairs of opposite sign of min(|y_i|, |y_j|); at least min(P, Q) (I2)."""
    return _over_opposites(y, torch.minimum)


def separable(y: Float[Tensor, "*s k"]) -> Float[Tensor, "*s"]:
    """Σ over pairs of opposite sign of √|y_i y_j|; at least `coupled` (I2)."""
    return _over_opposites(y, lambda a, b: (a * b).sqrt())


def _over_opposites(y: Tensor, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    plus, minus = torch.relu(y), torch.relu(-y)
    return term(plus[..., :, None], minus[..., None, :]).sum((-1, -2))


def beside_largest(y: Float[Tensor, "*s k"]) -> Float[Tensor, "*s"]:
    """Σ |y_i| − max |y_i|; at least min(P, Q) (I3)."""
    size = y.abs()
    return size.sum(-1) - size.amax(-1)


def alone(kind: Kind, value: Tensor, gate: Tensor | None) -> Tensor:
    """What a neuron gives for one pre-activation: φ(y), or u φ(g) where it is gated."""
    phi = activation(kind)
    return phi(value) if gate is None else value * phi(gate)


def mass(kind: Kind, value: Signed, gate: Signed | None) -> Tensor:
    """The most that contributions of these sizes could make: Σ |y_i|, for relu2 (Σ |y_i|)²; where
    gated Σ |u_i| · Σ |g_i|, for relu2 Σ |u_i| · (Σ |g_i|)²."""
    size = (gate or value).size
    size = size if degree(kind) == 1 else size**2
    return size if gate is None else value.size * size


@dataclass(frozen=True)
class Outcome:
    """What a neuron makes of its contributions, together and one by one."""

    whole: Tensor
    """φ(Σ y_i), or (Σ u_i) φ(Σ g_i)."""
    additive: Tensor
    """Σ φ(y_i), or Σ u_i φ(g_i)."""
    interaction: Tensor
    """Σ φ(y_i) − φ(Σ y_i); where gated (Σ u_i) φ(Σ g_i) − Σ u_i φ(g_i): the cross terms."""


def outcome(kind: Kind, value: Signed, gate: Signed | None, additive: Tensor) -> Outcome:
    """The interaction of all contributions at once.

    Args:
        value: sums of what goes into the neuron; where it is gated, of what the gate multiplies.
        gate: sums of what goes into the gate.
        additive: Σ φ(y_i), or Σ u_i φ(g_i), which P and Q do not tell; for ReLU without a gate it
            is P.
    """
    if gate is not None:
        whole = alone(kind, value.total, gate.total)
        return Outcome(whole, additive, whole - additive)
    whole = alone(kind, value.total, None)
    return Outcome(whole, additive, cancelled(value) if kind == "relu" else additive - whole)


def interaction(kind: Kind, sums: Signed, gaps: Tensor) -> Tensor:
    """Σ φ(y_i) − φ(Σ y_i) = min(P, Q) − Σ h(y_i) + h(Σ y_i) for φ = relu − h (I4).

    Args:
        gaps: Σ h(y_i).
    """
    return cancelled(sums) - gaps + gap(kind, sums.total)


def crossed(
    kind: Kind, u: Float[Tensor, "*s k"], g: Float[Tensor, "*s k"]
) -> Float[Tensor, "*s k"]:
    """u_i (φ(Σ g) − φ(g_i)): how the others gate what contribution i brings as a value. These sum
    to (Σ u) φ(Σ g) − Σ u_i φ(g_i)."""
    phi = activation(kind)
    return u * (phi(g.sum(-1, keepdim=True)) - phi(g))


def crossed_bound(
    kind: Kind, u: Float[Tensor, "*s k"], g: Float[Tensor, "*s k"]
) -> Float[Tensor, "*s"]:
    """sup |φ′| · Σ over i ≠ j of |u_i| |g_j|, at least |Σ crossed|. Not for relu2."""
    sizes = u.abs().sum(-1) * g.abs().sum(-1) - (u * g).abs().sum(-1)
    return SLOPE_BOUND[kind] * sizes

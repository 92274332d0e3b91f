"""What a summand of the objective is."""

from __future__ import annotations

import math
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from crosslens.coder import (
    AbsTopK,
    Activation,
    Causal,
    Coder,
    CrossLayer,
    Dedicated,
    DesignatedShared,
    Pass,
    TopK,
    Wiring,
    WiringConfig,
)
from crosslens.errors import UsageError
from crosslens.training.schedule import Span, check_span

Norm = Literal["sum", "concat"]
"""Σ_s ‖W_dec[l, s]‖ over sites (crosscoders, diffing), or the norm of all sites together
(cross-layer transcoders). The first lets latents of one site or one model appear."""


@runtime_checkable
class Term(Protocol):
    """One summand: its weight over the run, its value for one pass, and what it fits."""

    @property
    def weight(self) -> float: ...

    @property
    def ramp(self) -> Span: ...

    def __call__(self, step: Pass) -> Tensor: ...

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        """Refuse, with a UsageError that names the field, a coder that the term cannot train."""
        ...

    def check_wiring(self, wiring: Wiring) -> None:
        """The same once the sites are known."""
        ...


def weight_at(term: Term, progress: float) -> float:
    """The term's weight when `progress` of the run is done."""
    assert not isinstance(term.ramp, str), "lengths are turned into shares of the run first"
    return term.weight * (min(1.0, progress / term.ramp) if term.ramp > 0 else 1.0)


def check_weight(term: Term, field: str) -> None:
    """Refuse a negative weight and a ramp that is none. `field` is where the term stands."""
    if not 0 <= term.weight < math.inf:
        raise UsageError(f"{field}.weight must not be negative, found {term.weight}.")
    check_span(term.ramp, f"{field}.ramp")


def check_positive(term: Term, field: str, *names: str) -> None:
    """Refuse values that are not positive and finite."""
    for name in names:
        value = getattr(term, name)
        if not 0 < value < math.inf:
            raise UsageError(f"{field}.{name} must be positive, found {value}.")


def latent_norms(coder: Coder, norm: Norm) -> Tensor:
    """The decoder norm of each latent [L], in scaled units."""
    norm_LP = coder.decoder_norms()
    return norm_LP.sum(-1) if norm == "sum" else norm_LP.norm(dim=-1)


def factor_per_latent(coder: Coder, factors: tuple[float, ...]) -> Tensor:
    """One factor per group of latents → one per latent [L]; ones if there are none."""
    ones_L = coder.b_enc.new_ones(coder.wiring.n_latents)
    for span, factor in zip(coder.wiring.slices, factors, strict=bool(factors)):
        ones_L[span] = factor
    return ones_L


def check_factors(factors: tuple[float, ...], field: str) -> None:
    """Refuse negative factors."""
    if any(not 0 <= factor < math.inf for factor in factors):
        raise UsageError(f"{field} must not be negative, found {factors}.")


def check_factor_count(factors: tuple[float, ...], field: str, wiring: WiringConfig) -> None:
    """Refuse a number of factors that is not the wiring's number of groups, where that is known
    before the sites are."""
    match wiring:
        case Causal() | CrossLayer():
            return
        case Dedicated():
            groups = 3
        case DesignatedShared():
            groups = 2
        case _:
            groups = 1
    _refuse_count(factors, field, groups)


def check_factor_groups(factors: tuple[float, ...], field: str, wiring: Wiring) -> None:
    """Refuse a number of factors that is not the wiring's number of groups."""
    _refuse_count(factors, field, len(wiring.groups))


def check_not_signed(field: str, activation: Activation) -> None:
    """Refuse codes with negative entries, which a penalty on their size would reward."""
    if isinstance(activation, AbsTopK) or (isinstance(activation, TopK) and activation.signed):
        raise UsageError(
            f"{field} would reward negative latents, and this activation lets them through. "
            f"Set {field}.weight to 0, or take an activation that rectifies."
        )


def _refuse_count(factors: tuple[float, ...], field: str, groups: int) -> None:
    if factors and len(factors) != groups:
        raise UsageError(
            f"{field} has {len(factors)} factors, and this wiring has {groups} "
            f"group{'s' * (groups != 1)} of latents: give one factor for each, or none."
        )

"""Everything that goes into the neurons of some tokens, and what each latent alone makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from crosslens.functional.gathers import Lists, starts_of
from crosslens.functional.interactions import (
    SERIES,
    SERIES_REACH,
    Kind,
    Outcome,
    Signed,
    activation,
    alone,
    degree,
    even,
    mass,
    outcome,
)
from crosslens.interactions.neurons.contributions import Branch, Effective, SiteChunk
from crosslens.interactions.neurons.entries import entry_by_entry
from crosslens.interactions.neurons.scalar import through_scalar
from crosslens.kernels import bag_sum

Additive = Literal["series", "exact"]
"""How Σ φ(y_i) over latents is had for GELU and SiLU where no kernel computes it: from the sparse
products that a series asks for, with a bound of its error; or entry by entry."""


@dataclass(frozen=True, eq=False)
class Table:
    """A branch's contributions per unit of strength."""

    branch: Branch
    size_LN: Float[Tensor, "l n"]

    @property
    def signed_LN(self) -> Tensor:
        """Contributions with their signs."""
        return self.branch.E_LN


@dataclass(frozen=True, eq=False)
class Tables:
    """What one site's sparse products are taken from."""

    effective: Effective
    kind: Kind
    additive: Additive
    value: Table
    gate: Table | None
    terms: tuple[tuple[int, Tensor], ...]
    """(p, table [L, N]): Σ over latents of strength^p · table, summed, is the part of Σ φ(y_i), or
    Σ u_i φ(g_i), that P, Q and the total do not tell."""
    reach_L: Float[Tensor, " l"]
    """The largest contribution to what φ acts on, per unit of strength."""

    @property
    def acting(self) -> tuple[Tensor, Tensor | None]:
        """Contributions per unit of strength to what φ acts on, and to what that multiplies."""
        value_LN = self.effective.value.E_LN
        gate = self.effective.gate
        return (value_LN, None) if gate is None else (gate.E_LN, value_LN)

    @property
    def corrected(self) -> bool:
        """Whether φ is none that sparse products give exactly."""
        return self.kind in SERIES


def tables_of(effective: Effective, additive: Additive) -> Tables:
    """The tables of a site."""

    def table(branch: Branch) -> Table:
        return Table(branch, branch.E_LN.abs())

    kind, gate = effective.mlp.kind, effective.gate
    value, gate_table = table(effective.value), None if gate is None else table(gate)
    one_by_one = kind in SERIES and additive == "exact"
    tables = Tables(effective, kind, additive, value, gate_table, (), _reach(value, gate_table))
    return tables if one_by_one else replace(tables, terms=_terms(kind, *tables.acting))


def _reach(value: Table, gate: Table | None) -> Tensor:
    return (gate or value).size_LN.amax(1)


def _terms(kind: Kind, inner_LN: Tensor, outer_LN: Tensor | None) -> tuple[tuple[int, Tensor], ...]:
    """Monomials of φ, times the value where there is a gate; without one, those that the total and
    P give (y/2 of a series, relu) are left out."""
    power = degree(kind)
    series = SERIES.get(kind)
    if series is not None:
        even_terms = enumerate(series.coefficients, 1)
        terms = [(2 * p, c * inner_LN ** (2 * p)) for p, c in even_terms]
        terms = terms if outer_LN is None else [(1, inner_LN / 2), *terms]
    elif outer_LN is None and power == 1:
        terms = []
    else:
        terms = [(power, torch.relu(inner_LN) ** power)]
    if outer_LN is None:
        return tuple(terms)
    return tuple((p + 1, table_LN.mul_(outer_LN)) for p, table_LN in terms)


@dataclass(frozen=True, eq=False)
class Inputs:
    """All that goes into one branch, per token and neuron."""

    branch: Branch
    scalar_R: Float[Tensor, " r"]
    latents: Signed
    error_RN: Float[Tensor, "r n"]
    """What the coder's error contributes."""

    @property
    def always_RN(self) -> Tensor:
        """What the biases contribute."""
        always_RN = self.scalar_R[:, None] * self.branch.moving_N
        return always_RN.add_(self.branch.fixed_N) if self.branch.has_fixed else always_RN

    def rows(self, at: slice) -> Inputs:
        """Of some of the tokens."""
        latents = Signed(self.latents.total[at], self.latents.size[at])
        return Inputs(self.branch, self.scalar_R[at], latents, self.error_RN[at])


@dataclass(frozen=True, eq=False)
class Neurons:
    """All that goes into the neurons of a site, per token."""

    value: Inputs
    gate: Inputs | None
    additive_RN: Float[Tensor, "r n"]
    """Σ over latents of φ(y_i), or of u_i φ(g_i)."""
    slack: float
    """How far that may be off, times Σ |u_i| or, without a gate, the number of latents."""
    count_R: Int64[Tensor, " r"]
    """Latents active on each token."""
    through_R: Float[Tensor, " r"]
    """`through_scalar`."""

    def rows(self, at: slice) -> Neurons:
        """Of some of the tokens."""
        return replace(
            self,
            value=self.value.rows(at),
            gate=None if self.gate is None else self.gate.rows(at),
            additive_RN=self.additive_RN[at],
            count_R=self.count_R[at],
            through_R=self.through_R[at],
        )


@dataclass(frozen=True, eq=False)
class Made:
    """What the neurons make of it, per token and neuron."""

    known: Outcome
    """Of latents and biases."""
    full: Outcome
    """With the coder's error: the whole is what the model's own neurons give."""
    mass_RN: Float[Tensor, "r n"]
    """The most that contributions of these sizes could make."""
    moving: tuple[Signed, ...]
    """Of each branch, the contributions that the norm's scalar multiplies."""


def slack_of(neurons: Neurons) -> Float[Tensor, " n"]:
    """How far the sums over tokens of the additive part may be off."""
    if neurons.gate is None:
        return neurons.slack * neurons.count_R.sum().expand(neurons.additive_RN.shape[1])
    return neurons.slack * neurons.value.latents.size.sum(0)


def made_of(kind: Kind, neurons: Neurons) -> Made:
    """Elementwise on what goes in."""
    value, gate = neurons.value, neurons.gate
    always_u, always_g = value.always_RN, None if gate is None else gate.always_RN
    u, g = value.latents.joined(always_u), _joined(None if gate is None else gate.latents, always_g)
    additive_RN = alone(kind, always_u, always_g).add_(neurons.additive_RN)
    known = outcome(kind, u, g, additive_RN)
    error_g = None if gate is None else gate.error_RN
    u, g = u.joined(value.error_RN), _joined(g, error_g)
    full = outcome(kind, u, g, alone(kind, value.error_RN, error_g).add_(additive_RN))
    moving = [_without_fixed(value.branch, u, always_u)]
    if gate is not None and g is not None and always_g is not None:
        moving.append(_without_fixed(gate.branch, g, always_g))
    return Made(known, full, mass(kind, u, g), tuple(moving))


def _joined(sums: Signed | None, y_RN: Tensor | None) -> Signed | None:
    return None if sums is None or y_RN is None else sums.joined(y_RN)


def _without_fixed(branch: Branch, full: Signed, always_RN: Tensor) -> Signed:
    """The contributions less what the norm's scalar does not multiply."""
    if not branch.has_fixed:
        return full
    fixed_N = branch.fixed_N
    size_RN = full.size - always_RN.abs() + (always_RN - fixed_N).abs()
    return Signed(full.total - fixed_N, size_RN)


def neurons_of(chunk: SiteChunk, tables: Tables) -> Neurons:
    """The sparse and dense products of some tokens."""
    value = _inputs(chunk, tables.value)
    gate = None if tables.gate is None else _inputs(chunk, tables.gate)
    if tables.corrected and tables.additive == "exact":
        slack = 0.0
        phi = activation(tables.kind)
        additive_RN = entry_by_entry(phi, chunk.lists, chunk.weight_E, *tables.acting)
    else:
        slack = SERIES[tables.kind].bound if tables.corrected else 0.0
        additive_RN = _by_terms(chunk, tables, value.latents)
    count_R, through_R = chunk.lists.counts_I, through_scalar(chunk)
    return Neurons(value, gate, additive_RN, slack, count_R, through_R)


def _inputs(chunk: SiteChunk, table: Table) -> Inputs:
    total_RN, size_RN = (
        bag_sum(chunk.lists, chunk.weight_E, table_LN)
        for table_LN in (table.signed_LN, table.size_LN)
    )
    latents = Signed(total_RN, size_RN)
    return Inputs(table.branch, chunk.scalar_R, latents, chunk.error(table.branch))


def _by_terms(chunk: SiteChunk, tables: Tables, value: Signed) -> Tensor:
    """Σ over latents of φ(y_i), or of u_i φ(g_i); entries beyond the reach of the series are
    computed one by one."""
    lists, weight_E, gated = chunk.lists, chunk.weight_E, tables.gate is not None
    near_E = weight_E
    if tables.corrected:
        far_E = weight_E * tables.reach_L[lists.index_N.long()] > SERIES_REACH
        near_E = weight_E.masked_fill(far_E, 0.0)
    if gated or degree(tables.kind) == 2:
        sum_RN = torch.zeros_like(value.total)
    else:
        sum_RN = value.total / 2 if tables.corrected else value.plus
    for power, table_LN in tables.terms:
        linear = tables.corrected and power == 1 + gated
        sum_RN += bag_sum(lists, (weight_E if linear else near_E) ** power, table_LN)
    return sum_RN.add_(_even_of(chunk, tables, far_E)) if tables.corrected else sum_RN


def _even_of(chunk: SiteChunk, tables: Tables, chosen_E: Tensor) -> Tensor:
    """Σ over the chosen entries of φ(y_i) − y_i/2, or of u_i times that of the gate."""
    items_E, lists = chunk.lists.items_N[chosen_E], chunk.lists
    counts_R = torch.bincount(items_E, minlength=lists.n_items)
    few = Lists(starts_of(counts_R), lists.index_N[chosen_E])
    part = partial(even, tables.kind)
    return entry_by_entry(part, few, chunk.weight_E[chosen_E], *tables.acting)

"""Identities and bounds of interactions, on random and on awkward numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.functional.interactions import (
    GAP_BOUND,
    KINDS,
    SERIES,
    SERIES_REACH,
    SLOPE_BOUND,
    Signed,
    activation,
    beside_largest,
    cancelled,
    coupled,
    crossed,
    crossed_bound,
    degree,
    even,
    gap,
    interaction,
    mass,
    outcome,
    separable,
)

NUMBER = st.floats(-50, 50, allow_nan=False, width=32)
MANY = st.lists(NUMBER, min_size=1, max_size=9)
PAIRS = st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=9)
QUICK = settings(max_examples=200, deadline=None)
kinds = pytest.mark.parametrize("kind", KINDS)
smooth = pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])


def phi(kind: str, z: float) -> float:
    """Each nonlinearity from its definition."""
    cube = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    known = {
        "relu": lambda: max(z, 0.0),
        "relu2": lambda: max(z, 0.0) ** 2,
        "gelu": lambda: z * 0.5 * math.erfc(-z / math.sqrt(2)),
        "gelu_tanh": lambda: 0.5 * z * (1 + math.tanh(cube)),
        "silu": lambda: z / (1 + math.exp(-z)) if z > -700 else 0.0,
    }
    return known[kind]()


def signed(y: list[float]) -> Signed:
    numbers = torch.tensor(y, dtype=torch.float64)
    return Signed(numbers.sum(), numbers.abs().sum())


def many(y) -> torch.Tensor:
    return torch.tensor(y, dtype=torch.float64)


@kinds
@QUICK
@given(z=NUMBER)
def test_nonlinearities_are_their_equations(kind, z):
    assert float(activation(kind)(many(z))) == pytest.approx(phi(kind, z), abs=1e-9)


@QUICK
@given(y=MANY)
def test_sums_of_positive_and_negative_parts(y):
    assert float(signed(y).plus) == pytest.approx(sum(max(each, 0.0) for each in y), abs=1e-9)
    assert float(signed(y).minus) == pytest.approx(sum(max(-each, 0.0) for each in y), abs=1e-9)


@QUICK
@given(y=MANY)
def test_relu_fails_to_add_by_the_smaller_of_both_sums(y):
    """I1."""
    failure = sum(max(each, 0.0) for each in y) - max(sum(y), 0.0)
    assert float(cancelled(signed(y))) == pytest.approx(failure, abs=1e-9)


@QUICK
@given(y=MANY)
def test_the_chain_of_bounds(y):
    """I2 and I3, and each sum against its loop."""
    least, pairs, roots = cancelled(signed(y)), coupled(many(y)), separable(many(y))
    largest = beside_largest(many(y))
    opposite = [(a, b) for i, a in enumerate(y) for b in y[:i] if a * b < 0]
    assert float(pairs) == pytest.approx(sum(min(abs(a), abs(b)) for a, b in opposite), abs=1e-9)
    assert float(roots) == pytest.approx(sum(math.sqrt(-a * b) for a, b in opposite), abs=1e-6)
    assert float(largest) == pytest.approx(sum(map(abs, y)) - max(map(abs, y)), abs=1e-9)
    assert least <= pairs + 1e-9
    assert pairs <= roots + 1e-9
    assert least <= largest + 1e-9


@smooth
@QUICK
@given(y=MANY)
def test_smooth_forms_differ_by_their_gaps(kind, y):
    """I4."""
    failure = sum(phi(kind, each) for each in y) - phi(kind, sum(y))
    gaps = gap(kind, many(y)).sum()
    assert float(interaction(kind, signed(y), gaps)) == pytest.approx(failure, abs=1e-8)


@kinds
@QUICK
@given(z=NUMBER)
def test_gaps_are_even_and_bounded(kind, z):
    found = float(gap(kind, many(z)))
    base = max(z, 0.0) ** degree(kind)
    assert found == pytest.approx(base - phi(kind, z), abs=1e-9)
    assert found == float(gap(kind, many(-z)))
    assert 0 <= found <= min(GAP_BOUND[kind], abs(z) / 2)


@smooth
def test_the_constants_are_the_largest_values_rounded_up(kind):
    """On a grid of steps of 10⁻⁵ around the maxima; what lies between two points of it is less
    than the step higher, since all slopes are below 1.2 and curvatures below 1."""
    grid = torch.arange(-6, 6, 1e-5, dtype=torch.float64)
    largest = float(gap(kind, grid).max())
    assert largest <= GAP_BOUND[kind] - 1e-5
    assert largest >= GAP_BOUND[kind] - 1e-4
    slopes = activation(kind)(grid).diff() / 1e-5
    assert float(slopes.abs().max()) <= SLOPE_BOUND[kind] - 1e-5
    assert float(slopes.abs().max()) >= SLOPE_BOUND[kind] - 4e-4


@smooth
@QUICK
@given(z=NUMBER)
def test_the_even_part_is_what_half_the_input_leaves(kind, z):
    found = float(even(kind, many(z)))
    assert found == pytest.approx(phi(kind, z) - z / 2, abs=1e-9)
    assert found == pytest.approx(float(even(kind, many(-z))), abs=1e-9)
    assert found == pytest.approx(abs(z) / 2 - float(gap(kind, many(z))), abs=1e-9)


@smooth
def test_series_are_within_their_bounds(kind):
    """On a grid so fine that nothing between two points matters."""
    z = torch.linspace(-SERIES_REACH, SERIES_REACH, 20_001, dtype=torch.float64)
    terms = [c * z ** (2 * p) for p, c in enumerate(SERIES[kind].coefficients, 1)]
    worst = float((sum(terms) - even(kind, z)).abs().max())
    assert 0.9 * SERIES[kind].bound < worst < SERIES[kind].bound


@pytest.mark.parametrize("kind", SLOPE_BOUND)
@QUICK
@given(pairs=PAIRS)
def test_the_gated_bound(kind, pairs):
    u, g = many(pairs).T
    whole, total = float(u.sum()), float(g.sum())
    error = whole * phi(kind, total) - sum(a * phi(kind, b) for a, b in pairs)
    terms = crossed(kind, u, g)
    assert float(terms.sum()) == pytest.approx(error, abs=1e-7)
    bound = sum(
        abs(a) * abs(b)
        for i, (a, _) in enumerate(pairs)
        for j, (_, b) in enumerate(pairs)
        if i != j
    )
    assert float(crossed_bound(kind, u, g)) == pytest.approx(SLOPE_BOUND[kind] * bound, abs=1e-7)
    assert abs(error) <= SLOPE_BOUND[kind] * bound + 1e-7


@kinds
@QUICK
@given(pairs=PAIRS)
def test_outcomes_are_their_loops_and_at_most_the_mass(kind, pairs):
    values, gates = ([pair[i] for pair in pairs] for i in (0, 1))
    power = degree(kind)
    additive = sum(phi(kind, each) for each in values)
    found = outcome(kind, signed(values), None, many(additive))
    assert float(found.whole) == pytest.approx(phi(kind, sum(values)), abs=1e-7)
    assert float(found.interaction) == pytest.approx(additive - phi(kind, sum(values)), abs=1e-7)
    most = float(mass(kind, signed(values), None))
    assert most == pytest.approx(sum(map(abs, values)) ** power)
    share = 1.0 if kind == "relu2" else 0.5
    assert abs(float(found.interaction)) <= share * most + 1e-7
    additive = sum(u * phi(kind, g) for u, g in pairs)
    found = outcome(kind, signed(values), signed(gates), many(additive))
    whole = sum(values) * phi(kind, sum(gates))
    assert float(found.interaction) == pytest.approx(whole - additive, abs=1e-5)
    most = sum(map(abs, values)) * sum(map(abs, gates)) ** power
    assert float(mass(kind, signed(values), signed(gates))) == pytest.approx(most)
    assert abs(whole - additive) <= SLOPE_BOUND.get(kind, 1.0) * most + 1e-5


@QUICK
@given(y=MANY, more=NUMBER)
def test_one_more_contribution_of_either_sign(y, more):
    joined, expected = signed(y).joined(many(more)), signed([*y, more])
    assert float(joined.total) == pytest.approx(sum([*y, more]), abs=1e-9)
    assert float(joined.size) == pytest.approx(float(expected.size), abs=1e-9)
    assert float(cancelled(joined)) == pytest.approx(float(cancelled(expected)), abs=1e-9)

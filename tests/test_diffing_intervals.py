"""Intervals over groups of tokens against closed forms, and what falls into which group."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from crosslens.diffing.groups import block_groups, document_groups
from crosslens.diffing.intervals import (
    bootstrap_ratio,
    clustered_ratio,
    degrees_of_freedom,
    students_t,
)
from crosslens.errors import UsageError
from crosslens.functional.shares import wilson
from crosslens.text import Blocks


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_sums(groups: int = 16, latents: int = 5, noise: float = 0.3):
    generator = torch.Generator().manual_seed(0)
    weight = 1 + torch.rand(groups, latents, generator=generator, dtype=torch.float64)
    shocks = torch.randn(2, groups, latents, generator=generator, dtype=torch.float64)
    return 0.4 * weight + noise * shocks[0], 2.0 * weight + noise * shocks[1], weight


def test_student_s_t_is_the_printed_table():
    found = students_t(doubles([1, 2, 5, 15, 1000, 1e9, 0.5, math.nan]), 0.95)
    expected = [12.706, 4.3027, 2.5706, 2.1314, 1.9623, 1.96]
    assert found[:6].tolist() == pytest.approx(expected, rel=3e-5)
    assert found[6:].isnan().all()
    assert students_t(doubles([3]), 0.9).item() == pytest.approx(2.3534, rel=3e-5)


def test_student_s_t_of_two_degrees_of_freedom_is_its_closed_form():
    """P(|T| ≤ t) = t / √(2 + t²)."""
    for level in (0.5, 0.8, 0.99):
        t = students_t(doubles([2]), level).item()
        assert t / math.sqrt(2 + t * t) == pytest.approx(level, abs=1e-9)


def test_degrees_of_freedom_are_satterthwaite_s():
    """tr(C)²/tr(C²), with C the covariance of the corrected residuals of independent noise."""
    share = doubles([0.5, 0.2, 0.2, 0.1])
    cov = torch.diag(share) - share[:, None] * share
    corrected = cov / ((1 - share)[:, None] * (1 - share)).sqrt()
    expected = corrected.trace() ** 2 / (corrected @ corrected).trace()
    assert degrees_of_freedom(share[:, None]).item() == pytest.approx(expected.item())
    assert degrees_of_freedom(torch.full((16, 1), 1 / 16).double()).item() == pytest.approx(15)


def test_two_groups_have_one_degree_of_freedom_however_they_are_rounded():
    first_L = torch.linspace(0.01, 0.99, 500, dtype=torch.float64)
    freedom_L = degrees_of_freedom(torch.stack([first_L, 1 - first_L]))
    torch.testing.assert_close(freedom_L, torch.ones_like(first_L))
    assert students_t(freedom_L, 0.95).isfinite().all()
    assert degrees_of_freedom(doubles([1.0, 0.0])[:, None]).isnan()


@pytest.mark.parametrize("rest", [1e-3, 1e-7, 1e-9, 1e-12])
def test_a_group_with_nearly_everything_leaves_one_degree_of_freedom(rest):
    """In exact fractions."""
    shares = [1 - 3 * Fraction(rest), *[Fraction(rest)] * 3]
    a = [h * h / (1 - h) for h in shares]
    exact = 1 / (sum(h * h for h in shares) + sum(a) ** 2 - sum(x * x for x in a))
    found = degrees_of_freedom(doubles([float(h) for h in shares])[:, None]).item()
    assert found == pytest.approx(float(exact), rel=1e-9)


def test_a_slope_s_interval_is_that_of_the_regression():
    """Equal weights: the mean of the groups' ratios, and Student's interval of a mean."""
    generator = torch.Generator().manual_seed(1)
    ratios = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    weight = torch.full((9, 3), 2.0).double()
    found = clustered_ratio(ratios * weight, weight, weight)
    error = ratios.std(0) / 3
    assert torch.allclose(found.value_L, ratios.mean(0))
    assert torch.allclose(found.high_L - found.value_L, 2.3060 * error, rtol=1e-3)
    assert torch.allclose(found.value_L - found.low_L, 2.3060 * error, rtol=1e-3)


def test_a_ratio_s_bounds_are_where_its_test_turns():
    """At either end the combination top − ρ·bottom is just t standard errors from 0."""
    top, bottom, weight = random_sums()
    found = clustered_ratio(top, bottom, weight)
    for rho in (found.low_L, found.high_L):
        at = clustered_ratio(top - rho * bottom, weight, weight)
        nearest = torch.minimum(at.low_L.abs(), at.high_L.abs())
        assert nearest.max() < 1e-9
    assert (found.low_L < found.value_L).all()
    assert (found.value_L < found.high_L).all()


def test_what_the_tokens_do_not_bound_is_unbounded():
    """One group has everything; the denominator may be 0; there is nothing at all."""
    top, bottom, weight = random_sums(latents=3)
    for each in (top, bottom, weight):
        each[1:, 0] = 0
        each[:, 2] = 0
    bottom[:, 1] -= bottom[:, 1].mean() - 0.01
    found = clustered_ratio(top, bottom, weight)
    assert found.low_L[:2].tolist() == [-math.inf, -math.inf]
    assert found.high_L[:2].tolist() == [math.inf, math.inf]
    assert found.value_L[2].isnan()
    assert found.low_L[2].isnan()


def test_halves_are_the_figure_of_each_half_of_the_groups():
    top, bottom, weight = random_sums()
    found = clustered_ratio(top, bottom, weight)
    for half, at in zip(found.halves_HL, (slice(0, 8), slice(8, 16)), strict=True):
        assert torch.allclose(half, top[at].sum(0) / bottom[at].sum(0))


def test_the_bootstrap_is_the_loop_over_draws():
    """Ratio of sums inside each draw; other draws, so equal up to their noise."""
    top, bottom, _ = random_sums()
    found = bootstrap_ratio(top, bottom, draws=4000)
    random = np.random.default_rng(0)
    for j in range(top.shape[1]):
        values = []
        for _ in range(4000):
            drawn = random.integers(0, 16, 16)
            values.append(
                sum(top[g, j].item() for g in drawn) / sum(bottom[g, j].item() for g in drawn)
            )
        width = np.quantile(values, 0.975) - np.quantile(values, 0.025)
        assert found.low_L[j].item() == pytest.approx(np.quantile(values, 0.025), abs=0.05 * width)
        assert found.high_L[j].item() == pytest.approx(np.quantile(values, 0.975), abs=0.05 * width)
    again = bootstrap_ratio(top, bottom, draws=4000)
    assert torch.equal(found.low_L, again.low_L)


def test_wilson_s_interval():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_an_interval_s_level_is_a_share():
    with pytest.raises(UsageError, match="level"):
        students_t(doubles([3]), 95.0)


def test_blocks_fall_evenly_into_groups():
    groups = block_groups(1600)
    counts = torch.bincount(groups.of_block_N, minlength=16)
    assert counts.min() >= 90
    assert counts.max() <= 110
    assert torch.equal(block_groups(50).of_block_N, groups.of_block_N[:50])
    with pytest.raises(UsageError, match="2 groups"):
        block_groups(10, 1)


def test_blocks_of_one_document_stay_together():
    docs = torch.tensor([[-1, 0, 0], [-1, 0, 0], [-1, 0, 1], [-1, 1, 2], [2, 2, 2]]).int()
    blocks = Blocks(torch.zeros(5, 3).int(), docs, ("x", "y", "z"), 0, 0, ())
    found = document_groups(blocks).of_block_N.tolist()
    assert found[0] == found[1] == found[2]
    assert len({found[0], found[3], found[4]}) == 3

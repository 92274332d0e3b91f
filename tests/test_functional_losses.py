"""Each loss and penalty against a nested-loop oracle of its equation, and gradcheck."""

from __future__ import annotations

import math

import pytest
import torch

from crosslens import functional as F
from crosslens.functional import blocks


@pytest.fixture(autouse=True, params=[1 << 21, 8], ids=["whole", "blocks"])
def _blocks(request, monkeypatch):
    """Everything holds however the rows are cut into blocks."""
    monkeypatch.setattr(blocks, "BLOCK", request.param)


def rows(b: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(n: int, seed: int = 0) -> torch.Tensor:
    return rows(1, n, seed)[0].abs() + 0.1


def entries(b: int, n: int):
    return [(i, j) for i in range(b) for j in range(n)]


def test_errors_are_the_loops():
    x, y = rows(4, 6), rows(4, 6, seed=1)
    total = sum((float(x[b, i]) - float(y[b, i])) ** 2 for b, i in entries(4, 6))
    assert float(F.squared_error(x, y)) == pytest.approx(total / 4)
    means = [sum(float(x[b, i]) for b in range(4)) / 4 for i in range(6)]
    spread = sum((float(x[b, i]) - means[i]) ** 2 for b, i in entries(4, 6))
    assert float(F.variance(x)) == pytest.approx(spread / 4)
    left = (x - y).square().sum()
    assert float(F.share_of_residual(left, x)) == pytest.approx(total / spread)


def test_weighted_errors_are_the_loops():
    x, y, w = rows(4, 6), rows(4, 6, seed=1), positive(6, seed=2)
    means = [sum(float(x[b, i]) for b in range(4)) / 4 for i in range(6)]
    total = sum(float(w[i]) * (float(x[b, i]) - float(y[b, i])) ** 2 for b, i in entries(4, 6))
    spread = sum(float(w[i]) * (float(x[b, i]) - means[i]) ** 2 for b, i in entries(4, 6))
    assert float(F.squared_error(x, y, w)) == pytest.approx(total / 4)
    assert float(F.variance(x, w)) == pytest.approx(spread / 4)


def test_nested_error_is_the_loop():
    x, bias = rows(3, 4), rows(1, 4, seed=1)[0]
    parts = [rows(3, 4, seed=s) for s in (2, 3, 4)]
    total = 0.0
    for last in range(3):
        for b, i in entries(3, 4):
            recon = float(bias[i]) + sum(float(parts[j][b, i]) for j in range(last + 1))
            total += (float(x[b, i]) - recon) ** 2
    assert float(F.nested_error(x, bias, parts)) == pytest.approx(total / 3)


def test_penalties_are_the_loops():
    z, pre = rows(5, 4).relu(), rows(5, 4, seed=7)
    n, w, theta = positive(4, 1), positive(4, 2), positive(4, 3)
    score = [[float(z[b, i]) * float(n[i]) for i in range(4)] for b in range(5)]
    every = [(b, i, score[b][i]) for b, i in entries(5, 4)]
    assert float(F.l1_of_norms(z, n)) == pytest.approx(sum(s for *_, s in every) / 5)
    tanh = sum(float(w[i]) * math.tanh(3 * s) for _, i, s in every) / 5
    assert float(F.tanh_of_norms(z, n, w, 3.0)) == pytest.approx(tanh)
    rate = [sum(math.tanh(3 * score[b][i]) for b in range(5)) / 5 for i in range(4)]
    assert F.tanh_frequency(z, n, 3.0).tolist() == pytest.approx(rate)
    quadratic = sum(p * (1 + p / 0.01) for p in rate)
    assert float(F.quadratic_frequency(torch.tensor(rate), 0.01)) == pytest.approx(quadratic)
    gap = sum(max(0.0, float(theta[i] - pre[b, i])) * float(n[i]) for b, i in entries(5, 4)) / 5
    assert float(F.preactivation_gap(pre, theta, n)) == pytest.approx(gap)
    power = sum(s**0.3 for *_, s in every if s > 0) / 5
    assert float(F.power_of_norms(z, n, 0.3)) == pytest.approx(power)
    gate = sum(max(0.0, float(pre[b, i])) * float(n[i]) for b, i in entries(5, 4)) / 5
    assert float(F.rectified_l1(pre, n)) == pytest.approx(gate)


def test_a_constant_residual_costs_nothing():
    error = torch.ones(4, 3, dtype=torch.float64)
    for left in (0.0, 12.0):
        assert float(F.share_of_residual(torch.tensor(left).double(), error)) == 0.0


def test_latents_that_do_not_fire_have_no_slope():
    z, n = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True), positive(2)
    F.power_of_norms(z, n, 0.2).backward()
    assert z.grad.tolist() == [[0.0, 0.0]] * 3


def test_error_gradients():
    inputs = (rows(4, 5), rows(4, 5, seed=3).requires_grad_())
    assert torch.autograd.gradcheck(F.squared_error, inputs)
    parts = [rows(4, 5, seed=s).requires_grad_() for s in (4, 5)]
    nested = lambda bias, *parts: F.nested_error(rows(4, 5), bias, parts)  # noqa: E731
    assert torch.autograd.gradcheck(nested, (inputs[1], *parts))


def test_which_latents_fire():
    z = torch.zeros(9, 4)
    z[3, 1], z[8, 2] = 1.0, -1.0
    assert F.fires(z).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    "penalty",
    [
        lambda z, n, w: F.l1_of_norms(z, n),
        lambda z, n, w: F.tanh_of_norms(z, n, w, 4.0),
        lambda z, n, w: F.quadratic_frequency(F.tanh_frequency(z, n, 4.0), 0.01),
        lambda z, n, w: F.preactivation_gap(z, w, n),
        lambda z, n, w: F.power_of_norms(z, n, 0.5),
        lambda z, n, w: F.rectified_l1(z - 1, n),
    ],
    ids=["l1", "tanh", "quadratic", "gap", "power", "rectified"],
)
def test_penalty_gradients(penalty):
    inputs = [v.requires_grad_() for v in (rows(4, 5).abs() + 0.2, positive(5, 1), positive(5, 2))]
    assert torch.autograd.gradcheck(penalty, inputs)


def test_penalties_of_short_formats_are_summed_in_float32():
    z = torch.full((4000, 3), 0.001, dtype=torch.bfloat16)
    exact = float(z[0, 0]) * 3
    assert float(F.l1_of_norms(z, torch.ones(3))) == pytest.approx(exact, rel=1e-4)

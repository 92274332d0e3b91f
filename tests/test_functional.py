"""Each activation and loss against a nested-loop oracle of its equation, and gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens import functional as F


def rows(b: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop_topk(pre: list[list[float]], k: int) -> list[list[float]]:
    out = []
    for row in pre:
        order = sorted(range(len(row)), key=lambda i: -row[i])[:k]
        out.append([max(v, 0.0) if i in order else 0.0 for i, v in enumerate(row)])
    return out


def loop_batch_topk(pre, norm, k):
    scored = [(max(v, 0.0) * norm[i], b, i) for b, row in enumerate(pre) for i, v in enumerate(row)]
    kept = sorted(scored, reverse=True)[: k * len(pre)]
    out = [[0.0] * len(norm) for _ in pre]
    for score, b, i in kept:
        if score > 0:
            out[b][i] = pre[b][i]
    positive = [s for s, _, _ in kept if s > 0]
    return out, min(positive) if positive else 0.0


@pytest.mark.parametrize("k", [1, 3, 7])
def test_topk_is_the_loop(k):
    pre = rows(5, 7)
    assert F.topk(pre, k).tolist() == loop_topk(pre.tolist(), k)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_batch_topk_is_the_loop(k):
    pre, norm = rows(4, 6), rows(1, 6, seed=1)[0].abs() + 0.1
    z, smallest = F.batch_topk(pre.float(), norm.float(), k)
    expected, low = loop_batch_topk(pre.float().tolist(), norm.float().tolist(), k)
    assert torch.allclose(z, torch.tensor(expected))
    assert float(smallest) == pytest.approx(low)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.data())
def test_batch_topk_counts_exactly(b, n, data):
    k = data.draw(st.integers(1, n))
    pre = rows(b, n, seed=data.draw(st.integers(0, 99))).float()
    z, _ = F.batch_topk(pre, torch.ones(n), k)
    assert int((z > 0).sum()) == min(k * b, int((pre > 0).sum()))


@pytest.mark.parametrize(
    "pre",
    [torch.zeros(3, 4), -torch.ones(3, 4), torch.ones(3, 4)],
    ids=["empty", "all negative", "all tied"],
)
def test_batch_topk_on_degenerate_rows(pre):
    z, smallest = F.batch_topk(pre, torch.ones(4), 2)
    assert int((z != 0).sum()) == (6 if pre.max() > 0 else 0)
    assert float(smallest) == max(0.0, float(pre.max()))


def test_above_threshold_scores_by_decoder_norm():
    pre = torch.tensor([[1.0, 1.0, -5.0]])
    z = F.above_threshold(pre, torch.tensor([0.4, 2.0, 9.0]), torch.tensor(0.5))
    assert z.tolist() == [[0.0, 1.0, 0.0]]


def test_batch_topk_then_its_threshold_agree():
    pre, norm = rows(8, 16).float(), torch.ones(16)
    z, smallest = F.batch_topk(pre, norm, 3)
    assert torch.equal(F.above_threshold(pre, norm, smallest), z)


def test_jumprelu_forward_and_gradients_are_the_loop():
    pre = rows(6, 3).requires_grad_()
    theta = torch.tensor([0.3, 0.5, 0.01], dtype=torch.float64, requires_grad=True)
    width = 0.8
    weight = rows(6, 3, seed=5)
    (F.jumprelu(pre, theta, width) * weight).sum().backward()
    d_theta = [0.0] * 3
    code = F.jumprelu(pre, theta, width).detach()
    for b in range(6):
        for i in range(3):
            x, t, g = pre[b, i].item(), theta[i].item(), weight[b, i].item()
            assert code[b, i].item() == (x if x > t else 0.0)
            assert float(pre.grad[b, i]) == (g if x > t else 0.0)
            if abs(x - t) < width / 2:
                d_theta[i] += -(t / width) * g
    assert theta.grad.tolist() == pytest.approx(d_theta)


def test_jumprelu_threshold_gradient_is_that_of_the_smoothed_objective():
    """E over x of the smoothed objective, differentiated, is what the straight-through form gives.

    Smoothing the step by the rectangle of width ε makes f(x, θ) = x·clamp((x−θ)/ε + ½, 0, 1),
    whose θ-derivative is −x/ε inside the window; with x ≈ θ there, −θ/ε.
    """
    width, theta = 1e-3, torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    x = torch.linspace(0.69, 0.71, 20001, dtype=torch.float64)[:, None]
    F.jumprelu(x, theta, width).sum().backward()
    smooth = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    (x * ((x - smooth) / width + 0.5).clamp(0, 1)).sum().backward()
    assert float(theta.grad) == pytest.approx(float(smooth.grad), rel=2e-3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x),
        lambda x: F.topk(x, 2),
        lambda x: F.batch_topk(x, torch.ones(5, dtype=torch.float64), 2)[0],
        lambda x: F.above_threshold(
            x, torch.ones(5, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
        ),
    ],
    ids=["relu", "topk", "batch_topk", "above_threshold"],
)
def test_activation_gradients(function):
    assert torch.autograd.gradcheck(function, rows(4, 5).requires_grad_())


def test_losses_are_the_loops():
    x, y = rows(4, 6), rows(4, 6, seed=1)
    total = sum((float(x[b, i]) - float(y[b, i])) ** 2 for b in range(4) for i in range(6))
    assert float(F.squared_error(x, y)) == pytest.approx(total / 4)
    means = [sum(float(x[b, i]) for b in range(4)) / 4 for i in range(6)]
    spread = sum((float(x[b, i]) - means[i]) ** 2 for b in range(4) for i in range(6))
    assert float(F.variance(x)) == pytest.approx(spread / 4)
    e_means = [sum(float(x[b, i]) for b in range(4)) / 4 for i in range(6)]
    denominator = sum((float(x[b, i]) - e_means[i]) ** 2 for b in range(4) for i in range(6))
    assert float(F.residual_error(x, y)) == pytest.approx(total / denominator)


def test_l1_sums_norms_over_sites():
    z, norms = rows(3, 4).abs(), rows(4, 2, seed=2).abs()
    total = 0.0
    for b in range(3):
        for latent in range(4):
            total += float(z[b, latent]) * sum(float(norms[latent, s]) for s in range(2))
    assert float(F.l1_of_norms(z, norms)) == pytest.approx(total / 3)


def test_a_constant_residual_costs_nothing():
    error = torch.ones(4, 3, dtype=torch.float64)
    assert float(F.residual_error(error, torch.zeros_like(error))) == 0.0
    assert not math.isnan(float(F.residual_error(error, error)))


@pytest.mark.parametrize("loss", [F.squared_error, F.residual_error])
def test_loss_gradients(loss):
    assert torch.autograd.gradcheck(loss, (rows(4, 5), rows(4, 5, seed=3).requires_grad_()))

"""JumpReLU and its count: loops, and gradients of the smoothed objective."""

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


def test_the_printed_form_for_log_thresholds_is_the_loop():
    """−e^t/ε in the window: one factor e^t short of the chain rule, as printed."""
    pre, weight = rows(6, 3).requires_grad_(), rows(6, 3, seed=5)
    t = torch.tensor([-1.2, 0.1, -3.0], dtype=torch.float64, requires_grad=True)
    width = 0.8
    code = F.jumprelu_log(pre, t, width)
    (code * weight).sum().backward()
    d_t = [0.0] * 3
    for b in range(6):
        for i in range(3):
            x, theta, g = pre[b, i].item(), math.exp(t[i].item()), weight[b, i].item()
            assert code[b, i].item() == (x if x > theta else 0.0)
            assert float(pre.grad[b, i]) == (g if x > theta else 0.0)
            if abs(x - theta) < width / 2:
                d_t[i] += -(theta / width) * g
    assert t.grad.tolist() == pytest.approx(d_t)


@pytest.mark.parametrize("log", [False, True])
def test_the_input_gradient_is_an_option(log):
    theta = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    jump, learnt = (F.jumprelu_log, theta.log()) if log else (F.jumprelu, theta)
    pre, weight = rows(9, 3).requires_grad_(), rows(9, 3, seed=5)
    (jump(pre, learnt, 0.8, True) * weight).sum().backward()
    near = (pre - theta).abs() < 0.4
    expected = weight * ((pre > theta) + near * theta / 0.8)
    assert torch.allclose(pre.grad, expected.detach())


def test_counts_and_their_gradients_are_the_loop():
    pre, theta = rows(7, 3).requires_grad_(), torch.tensor([0.3, 0.5, 0.01], dtype=torch.float64)
    theta.requires_grad_()
    width = 0.8
    of_rows, of_latents = F.count_active(pre, theta, width)
    a, c = rows(7, 1, seed=1)[:, 0], rows(1, 3, seed=2)[0]
    ((of_rows * a).sum() + (of_latents * c).sum()).backward()
    d_theta = [0.0] * 3
    active = [[pre[b, i].item() > theta[i].item() for i in range(3)] for b in range(7)]
    assert of_rows.tolist() == [sum(row) for row in active]
    assert of_latents.tolist() == pytest.approx([sum(r[i] for r in active) / 7 for i in range(3)])
    for b in range(7):
        for i in range(3):
            if abs(pre[b, i].item() - theta[i].item()) < width / 2:
                d_theta[i] -= (a[b].item() + c[i].item() / 7) / width
    assert theta.grad.tolist() == pytest.approx(d_theta)
    assert pre.grad is None, "the penalty moves thresholds only"


def test_the_count_s_gradient_is_a_finite_difference_of_the_smoothed_count():
    """The step smoothed over the window is what the straight-through gradient descends."""
    width = 0.2
    x = torch.rand(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    theta = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)
    F.count_active(x, theta, width)[0].mean().backward()

    def smooth(theta):
        return ((x - theta) / width + 0.5).clamp(0, 1).sum(-1).mean()

    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-6
        slope = (smooth(theta.detach() + step) - smooth(theta.detach() - step)) / 2e-6
        assert float(theta.grad[i]) == pytest.approx(float(slope), rel=1e-3)

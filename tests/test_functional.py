"""Each activation against a nested-loop oracle of its equation, and gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crosslens import functional as F
from crosslens.functional import blocks

FIXTURE = [HealthCheck.function_scoped_fixture]


@pytest.fixture(autouse=True, params=[1 << 21, 8], ids=["whole", "blocks"])
def _blocks(request, monkeypatch):
    """Everything holds however the rows are cut into blocks."""
    monkeypatch.setattr(blocks, "BLOCK", request.param)


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


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURE)
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


@pytest.mark.parametrize("k", [1, 3, 7])
def test_signed_and_absolute_topk_are_the_loops(k):
    pre = rows(5, 7)
    signed, absolute = [], []
    for row in pre.tolist():
        largest = sorted(range(7), key=lambda i: -row[i])[:k]
        strongest = sorted(range(7), key=lambda i: -abs(row[i]))[:k]
        signed.append([v if i in largest else 0.0 for i, v in enumerate(row)])
        absolute.append([v if i in strongest else 0.0 for i, v in enumerate(row)])
    assert F.signed_topk(pre, k).tolist() == signed
    assert F.abs_topk(pre, k).tolist() == absolute


@pytest.mark.parametrize("k", [1, 2, 4, 12])
def test_group_max_is_the_loop(k):
    pre = rows(5, 12)
    expected = []
    for row in pre.tolist():
        out = [0.0] * 12
        for g in range(k):
            run = range(g * 12 // k, (g + 1) * 12 // k)
            best = max(run, key=lambda i: row[i])
            out[best] = max(0.0, row[best])
        expected.append(out)
    assert F.group_max(pre, k).tolist() == expected


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURE)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_counts_of_selections(b, k, share, seed):
    pre = rows(b, k * share, seed)
    assert ((F.topk(pre, k) != 0).sum(-1) <= k).all()
    assert ((F.signed_topk(pre, k) != 0).sum(-1) == k).all()
    assert ((F.abs_topk(pre, k) != 0).sum(-1) == k).all()
    runs = (F.group_max(pre, k) != 0).view(b, k, share).sum(-1)
    assert torch.equal(runs, (pre.view(b, k, share) > 0).any(-1).long())


def test_gated_and_its_gradients_are_the_loop():
    pre = rows(6, 3).requires_grad_()
    b_gate, r, b_mag = (rows(1, 3, seed=s)[0].requires_grad_() for s in (1, 2, 3))
    weight = rows(6, 3, seed=5)
    code = F.gated(pre, b_gate, r, b_mag)
    (code * weight).sum().backward()
    d_gate, d_r, d_mag = [0.0] * 3, [0.0] * 3, [0.0] * 3
    for b in range(6):
        for i in range(3):
            plain = pre[b, i].item() - b_gate[i].item()
            factor = math.exp(r[i].item())
            magnitude = factor * plain + b_mag[i].item()
            on = pre[b, i].item() > 0 and magnitude > 0
            assert code[b, i].item() == pytest.approx(magnitude if on else 0.0)
            g = weight[b, i].item() * on
            assert float(pre.grad[b, i]) == pytest.approx(g * factor)
            d_gate[i] -= g * factor
            d_r[i] += g * factor * plain
            d_mag[i] += g
    assert b_gate.grad.tolist() == pytest.approx(d_gate)
    assert r.grad.tolist() == pytest.approx(d_r)
    assert b_mag.grad.tolist() == pytest.approx(d_mag)


def test_short_formats_select_what_their_exact_values_would():
    pre, norm = rows(9, 16).bfloat16(), rows(1, 16, seed=4)[0].abs().float() + 0.1
    for select in (
        lambda x: F.topk(x, 3),
        lambda x: F.abs_topk(x, 3),
        lambda x: F.group_max(x, 4),
        lambda x: F.batch_topk(x, norm, 3)[0],
        lambda x: F.above_threshold(x, norm, torch.tensor(0.4)),
        lambda x: F.jumprelu(x, norm, 0.5),
    ):
        assert select(pre).dtype == torch.bfloat16
        assert torch.equal(select(pre).float(), select(pre.float()))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x),
        lambda x: F.topk(x, 2),
        lambda x: F.signed_topk(x, 2),
        lambda x: F.abs_topk(x, 2),
        lambda x: F.group_max(x, 2),
        lambda x: F.batch_topk(x, torch.ones(6, dtype=torch.float64), 2)[0],
        lambda x: F.above_threshold(
            x, torch.ones(6, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
        ),
    ],
    ids=["relu", "topk", "signed", "abs", "group_max", "batch_topk", "above_threshold"],
)
def test_activation_gradients(function):
    assert torch.autograd.gradcheck(function, rows(4, 6).requires_grad_())


def test_gated_gradcheck():
    inputs = [rows(4, 5).requires_grad_()]
    inputs += [rows(1, 5, seed=s)[0].requires_grad_() for s in (1, 2, 3)]
    assert torch.autograd.gradcheck(F.gated, inputs)

"""Each measure of a pair against loops over its equation, and the bounds that tie them together."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.functional import pairs as F
from crosslens.functional.interactions import KINDS, SLOPE_BOUND, activation
from tests.interactions_pairs_toy import phi, shapley

SMOOTH = ["gelu", "gelu_tanh", "silu"]
NUMBER = st.floats(-4, 4, allow_subnormal=False)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def weights(n: int) -> torch.Tensor:
    return rows(n, seed=99).abs() + 0.1


def signed_sums(y) -> tuple[float, float]:
    return sum(max(v, 0.0) for v in y), sum(max(-v, 0.0) for v in y)


def over_pairs(matrix_KK: torch.Tensor) -> float:
    return float(matrix_KK.triu(1).sum())


def members(y: list[float]) -> torch.Tensor:
    """As contributions to one neuron [1, K, 1]."""
    return torch.tensor(y, dtype=torch.float64)[None, :, None]


ONE = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_difference_is_the_loop(kind):
    c, a, b = rows(3, 40).unbind()
    found = F.mixed_difference(kind, c, a, b)
    for q in range(40):
        x, y, z = float(c[q]), float(a[q]), float(b[q])
        true = phi(kind, x + y + z) - phi(kind, x + y) - phi(kind, x + z) + phi(kind, x)
        assert float(found[q]) == pytest.approx(true, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gated_parts_sum_to_the_mixed_difference(kind):
    cu, cg, ui, gi, uj, gj = rows(6, 40).unbind()
    context, first, second = F.Gated(cu, cg), F.Gated(ui, gi), F.Gated(uj, gj)
    found = F.gated_mixed_difference(kind, context, first, second)
    for q in range(40):

        def h(*parts, q=q):
            value = sum(float(part.value[q]) for part in parts)
            return value * phi(kind, sum(float(part.gate[q]) for part in parts))

        true = h(context, first, second) - h(context, first) - h(context, second) + h(context)
        assert float(found.total[q]) == pytest.approx(true, abs=1e-12)
        opened = phi(kind, float(cg[q] + gi[q] + gj[q])) - phi(kind, float(cg[q] + gi[q]))
        assert float(found.first_by_second[q]) == pytest.approx(float(ui[q]) * opened, abs=1e-12)
    assert (context + first).value is not None
    swapped = F.gated_mixed_difference(kind, context, second, first)
    torch.testing.assert_close(swapped.second_by_first, found.first_by_second)


@pytest.mark.parametrize("kind", SMOOTH)
def test_small_strengths_give_the_second_derivative(kind):
    c = rows(30).requires_grad_()
    (slope,) = torch.autograd.grad(activation(kind)(c).sum(), c, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), c)
    step = torch.full_like(c, 1e-4).detach()
    found = F.mixed_difference(kind, c.detach(), step, -step) / -(1e-8)
    torch.testing.assert_close(found, bend, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", SMOOTH)
def test_small_gated_strengths_give_the_second_derivative(kind):
    directions = rows(2, 2, 30, seed=3)  # of i and j: value, gate
    c = rows(2, 30, seed=4)
    h = 1e-4

    def at(s, t):
        value, gate = c + s * directions[0] + t * directions[1]
        return value * activation(kind)(gate)

    s, t = torch.zeros(30, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
    s.requires_grad_(), t.requires_grad_()
    (by_s,) = torch.autograd.grad(at(s, t).sum(), s, create_graph=True)
    (bend,) = torch.autograd.grad(by_s.sum(), t)
    first, second = (F.Gated(h * d[0], h * d[1]) for d in directions)
    found = F.gated_mixed_difference(kind, F.Gated(*c), first, second).total / h**2
    torch.testing.assert_close(found, bend, atol=2e-3, rtol=2e-3)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), NUMBER, NUMBER, NUMBER)
def test_mixed_differences_stay_within_their_limit(kind, c, a, b):
    c, a, b = (torch.tensor([x], dtype=torch.float64) for x in (c, a, b))
    limit = float(F.mixed_limit(kind, a, b))
    assert math.isfinite(limit)
    assert float(F.mixed_difference(kind, c, a, b).abs()) <= limit + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_limits_are_the_smallest(kind):
    """A limit a thousandth lower would be exceeded somewhere."""
    limit, x = F.LIMITS[kind], torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    slope = torch.gradient(activation(kind)(x), spacing=(x,))[0]
    if math.isfinite(limit.smaller):
        assert limit.smaller * 0.999 < float(slope.max() - slope.min()) <= limit.smaller + 1e-9
    if math.isfinite(limit.product):
        bend = torch.gradient(slope, spacing=(x,))[0][2:-2]
        assert limit.product * 0.999 < float(bend.abs().max()) <= limit.product + 1e-7


def test_drawn_coalitions_have_the_weights_of_the_shapley_index():
    y = [0.7, -1.1, 0.9, 0.4, -0.3]
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    inside_E, error_I = F.random_coalition(torch.full((draws,), 4), generator)
    inside = torch.cat([inside_E.view(draws, 4), error_I[:, None]], 1)
    named = {m: [v] for m, v in enumerate(y)} | {"always": [-0.2]}
    for i, j in [(0, 1), (2, 3)]:
        others = [m for m in range(5) if m not in (i, j)]
        true = shapley("relu", named, None, others, i, j, 0)
        context = -0.2 + inside[:, others].double() @ torch.tensor([y[m] for m in others]).double()
        a, b = (torch.full((draws,), y[m], dtype=torch.float64) for m in (i, j))
        found = F.mixed_difference("relu", context, a, b)
        error = float(found.std()) / math.sqrt(draws)
        assert 0 < error < 0.01
        assert abs(float(found.mean()) - true) < 4 * error


def test_coupling_and_reach_are_the_loops():
    y, w = rows(2, 4, 6), weights(6)
    coupling = F.coupling("gelu", y, w)
    square = F.coupling("relu2", y, w)
    for b in range(2):
        for i in range(4):
            for j in range(4):
                if i == j:
                    continue
                low = [min(abs(float(y[b, i, n])), abs(float(y[b, j, n]))) for n in range(6)]
                opposed = [float(y[b, i, n] * y[b, j, n]) < 0 for n in range(6)]
                negative = [float(y[b, i, n]) < 0 and float(y[b, j, n]) < 0 for n in range(6)]
                product = [abs(float(y[b, i, n] * y[b, j, n])) for n in range(6)]
                true = sum(float(w[n]) * low[n] for n in range(6) if opposed[n])
                assert float(coupling[b, i, j]) == pytest.approx(true, abs=1e-12)
                true = sum(float(w[n]) * low[n] for n in range(6))
                reach = float(F.reach(y[b, i, None], y[b, j, None], w))
                assert reach == pytest.approx(true, abs=1e-12)
                true = sum(2 * float(w[n]) * product[n] for n in range(6) if not negative[n])
                assert float(square[b, i, j]) == pytest.approx(true, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(NUMBER, min_size=2, max_size=7))
def test_coupling_bounds_what_is_shared_and_that_is_exact(y):
    p, q = signed_sums(y)
    coupling, shared = F.coupling("relu", members(y), ONE)[0], F.shared("relu", members(y), ONE)[0]
    assert over_pairs(shared) == pytest.approx(min(p, q), abs=1e-9)
    assert over_pairs(coupling) >= min(p, q) - 1e-9
    apart = ~torch.eye(len(y), dtype=torch.bool)
    assert bool((shared <= coupling + 1e-9)[apart].all())
    left, right = F.factors("relu", members(y)[0], ONE)
    assert bool((coupling <= left @ right.T + 1e-9)[apart].all())
    torch.testing.assert_close((left @ right.T)[apart], (right @ left.T)[apart])


@settings(deadline=None, max_examples=60)
@given(st.lists(NUMBER, min_size=2, max_size=7))
def test_squared_relu_is_bounded_by_its_coupling(y):
    error = sum(phi("relu2", v) for v in y) - phi("relu2", sum(y))
    coupling = F.coupling("relu2", members(y), ONE)[0]
    assert abs(error) <= over_pairs(coupling) + 1e-9
    left, right = F.factors("relu2", members(y)[0], ONE)
    apart = ~torch.eye(len(y), dtype=torch.bool)
    torch.testing.assert_close((left @ right.T)[apart], coupling[apart])
    shared = over_pairs(F.shared("relu2", members(y), ONE)[0])
    cross = sum(abs(v * u) for at, v in enumerate(y) for u in y[:at])
    assert shared == pytest.approx(2 * cross if sum(y) > 0 else 0.0, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), NUMBER, NUMBER, NUMBER)
def test_reach_bounds_the_mixed_difference_in_every_context(kind, c, a, b):
    smaller = F.LIMITS[kind].smaller
    if not math.isfinite(smaller):
        return
    reach = float(F.reach(*(torch.tensor([[x]], dtype=torch.float64) for x in (a, b)), ONE))
    delta = F.mixed_difference(kind, *(torch.tensor([x], dtype=torch.float64) for x in (c, a, b)))
    assert float(delta.abs()) <= smaller * reach + 1e-9


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["relu", "silu", "gelu"]),
    st.lists(st.tuples(NUMBER, NUMBER), min_size=2, max_size=6),
)
def test_gated_coupling_bounds_the_cross_terms(kind, pairs):
    u, g = members([p[0] for p in pairs]), members([p[1] for p in pairs])
    whole = sum(p[1] for p in pairs)
    cross = sum(p[0] * (phi(kind, whole) - phi(kind, p[1])) for p in pairs)
    coupling = F.gated_coupling(u, g, ONE)[0]
    apart = float(coupling.sum() - coupling.diagonal().sum())
    assert abs(cross) <= SLOPE_BOUND[kind] * apart + 1e-9
    left, right = F.gated_factors(u[0], g[0], ONE)
    torch.testing.assert_close(left @ right.T, coupling)


@pytest.mark.parametrize("kind", KINDS)
def test_gating_is_the_loop(kind):
    u, g, w = rows(2, 3, 4), rows(2, 3, 4, seed=1), weights(4)
    found = F.gating(kind, u.abs(), g, w)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                true = 0.0
                for n in range(4):
                    whole = float(g[b, :, n].sum())
                    lost = phi(kind, whole) - phi(kind, whole - float(g[b, j, n]))
                    true += float(w[n]) * abs(float(u[b, i, n])) * abs(lost)
                assert float(found[b, i, j]) == pytest.approx(true, abs=1e-12)


def test_dominance_sums_over_neurons():
    """Many neurons share a dominant latent: the published code would keep one of them."""
    y, w = rows(3, 50), weights(50)
    y[0, 7] = y[1, 7] = 9.0  # each of equal ones
    true = [0.0, 0.0]
    for n in range(50):
        size = [abs(float(y[k, n])) for k in range(3)]
        true[0] += float(w[n]) * size[1] * (size[0] == max(size))
        true[1] += float(w[n]) * size[0] * (size[1] == max(size))
    found = F.dominance(y[:1], y[1:2], y.abs().amax(0)[None], w)
    assert [float(x) for x in found] == pytest.approx(true)
    led = [int((y[k].abs() == y.abs().amax(0)).sum()) for k in (0, 1)]
    assert min(led) > 5


def test_ratio_and_hadamard_are_the_loops():
    a, b, w = rows(3, 5), rows(3, 5, seed=1), weights(5)
    a[0, 0] = b[0, 0] = b[1, 2] = 0.0
    ratio, proxy = F.ratio(a, b, w), F.hadamard(a, b, w)
    for q in range(3):
        total, square = 0.0, 0.0
        for n in range(5):
            x, y = abs(float(a[q, n])), abs(float(b[q, n]))
            total += float(w[n]) * (min(x / y, y / x) if x and y else 0.0)
            square += (float(w[n]) * x * y) ** 2
        assert float(ratio[q]) == pytest.approx(total / float(w.sum()))
        assert float(proxy[q]) == pytest.approx(math.sqrt(square))

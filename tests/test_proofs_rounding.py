"""Directed rounding against exact rationals, and python-flint where it is installed."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from crosslens.errors import CrosslensError
from crosslens.proofs import rounding as R

KINDS = ("plain", "cancelling", "huge", "tiny", "mixed")


def numbers(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    x = torch.randn(*shape, dtype=torch.float64)
    match kind:
        case "cancelling":
            return torch.where(torch.rand_like(x) < 0.5, x * 1e-17, x.sign() * 1e3)
        case "huge":
            return x * 1e120
        case "tiny":
            return x * 1e-170
        case "mixed":
            return x * torch.exp(30 * torch.randn_like(x))
        case _:
            return x


def rational(x: torch.Tensor) -> list[Fraction]:
    return [Fraction(v) for v in x.flatten().tolist()]


def exact_product(a: torch.Tensor, b: torch.Tensor) -> list[list[Fraction]]:
    rows = [rational(row) for row in a]
    columns = [rational(column) for column in b.T]
    return [[sum(map(Fraction.__mul__, r, c), Fraction(0)) for c in columns] for r in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_of_balls_holds_the_exact_product(kind: str) -> None:
    a, b = numbers(kind, 4, 17), numbers(kind, 17, 3, seed=1)
    found = R.matmul(R.exact(a), R.exact(b))
    for row, true in zip(range(4), exact_product(a, b), strict=True):
        for column, value in enumerate(true):
            mid = Fraction(float(found.mid[row, column]))
            assert abs(value - mid) <= Fraction(float(found.rad[row, column]))


def test_a_product_of_balls_holds_every_product_of_their_corners() -> None:
    a, b = numbers("plain", 2, 5), numbers("plain", 5, 2, seed=1)
    ra, rb = a.abs() * 0.1, b.abs() * 0.2
    found = R.matmul(R.Ball(a, ra), R.Ball(b, rb))
    furthest = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(300):
        torch.manual_seed(seed)
        p = a + ra * torch.sign(torch.randn_like(a))
        q = b + rb * torch.sign(torch.randn_like(b))
        furthest = torch.maximum(furthest, ((p @ q) - found.mid).abs() / found.rad)
    # The corner that moves everything the same way attains it: the radius is tight.
    p = a + ra * a.sign()
    q = b + rb * b.sign()
    one = torch.ones(1, 5, dtype=torch.float64)
    tight = R.matmul(R.Ball(one, 0.5 * one), R.Ball(one.T, 0.25 * one.T))
    assert float(furthest.max()) <= 1
    assert 5 * 1.5 * 1.25 - 5 <= float(tight.rad) < (5 * 1.5 * 1.25 - 5) / 0.99
    assert ((p @ q - found.mid).abs() <= found.rad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sums_norms_and_dots_are_outside_and_near(kind: str) -> None:
    for seed in range(20):
        x, y = numbers(kind, 9, seed=seed), numbers(kind, 9, seed=seed + 50)
        exact_x, exact_y = rational(x), rational(y)
        square = sum((v * v for v in exact_x), Fraction(0))
        dot = sum((abs(v * w) for v, w in zip(exact_x, exact_y, strict=True)), Fraction(0))
        assert Fraction(float(R.norm_up(x))) ** 2 >= square
        assert Fraction(float(R.norm_down(x))) ** 2 <= square
        assert Fraction(float(R.sum_up(x.abs()))) >= sum(map(abs, exact_x), Fraction(0))
        assert Fraction(float(R.dot_up(x.abs(), y.abs()))) >= dot
        if kind in ("plain", "cancelling"):
            assert float(R.norm_up(x)) <= float(R.norm_down(x)) * (1 + 1e-13)
            assert 0.99 * float(R.dot_up(x.abs(), y.abs())) < dot


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_balls(kind: str) -> None:
    a, b = numbers(kind, 30), numbers(kind, 30, seed=1)
    found = R.subtract(R.exact(a), R.exact(b))
    for p, q, mid, rad in zip(a, b, found.mid, found.rad, strict=True):
        true = Fraction(float(p)) - Fraction(float(q))
        assert abs(true - Fraction(float(mid))) <= Fraction(float(rad))
    total, lost = R.exact_sum(a, b)
    for p, q, s, e in zip(a, b, total, lost, strict=True):
        assert Fraction(float(p)) + Fraction(float(q)) == Fraction(float(s)) + Fraction(float(e))


def _exp(x: Fraction, terms: int = 120) -> Fraction:
    """e^x by its series: far more digits than float64 has, for |x| ≤ 20."""
    total = term = Fraction(1)
    for n in range(1, terms):
        term = term * x / n
        total += term
    return total


def test_exp_and_log_enclose() -> None:
    torch.manual_seed(0)
    x = torch.rand(40, dtype=torch.float64) * 20 - 10
    for value, up, down in zip(x.tolist(), R.exp_up(x), R.exp_down(x), strict=True):
        true = _exp(Fraction(value))
        assert Fraction(float(down)) < true < Fraction(float(up))
        assert float(up) < float(down) * (1 + 1e-14)
    positive = x.exp()
    for value, up in zip(positive.tolist(), R.log_up(positive), strict=True):
        assert _exp(Fraction(float(up))) >= Fraction(value)


def test_functions_enclose_by_flint() -> None:
    flint = pytest.importorskip("flint")
    torch.manual_seed(0)
    x = torch.rand(200, dtype=torch.float64) * 30 - 15
    positive = x.abs()
    pairs = [
        (R.exp_up(x), x, "exp", 1),
        (R.exp_down(x), x, "exp", -1),
        (R.log_up(positive), positive, "log", 1),
        (R.tanh_up(positive), positive, "tanh", 1),
        (R.sqrt_up(positive), positive, "sqrt", 1),
    ]
    with flint.ctx.workprec(200):
        for found, given, name, side in pairs:
            for bound, value in zip(found.tolist(), given.tolist(), strict=True):
                true = getattr(flint.arb(value), name)()
                assert (flint.arb(bound) >= true) if side > 0 else (flint.arb(bound) <= true)


@pytest.mark.parametrize("kind", ["plain", "huge", "mixed"])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4)])
def test_the_spectral_bound_is_outside_and_near(kind: str, shape: tuple[int, int]) -> None:
    x = numbers(kind, *shape)
    true = float(torch.linalg.matrix_norm(x / x.abs().max(), ord=2))
    found = float(R.spectral_up(x)) / float(x.abs().max())
    assert true * (1 - 1e-12) <= found <= true * 1.04


def test_the_spectral_bound_is_tight_and_zero_at_zero() -> None:
    one = torch.zeros(3, 3, dtype=torch.float64)
    one[1, 2] = 7.0
    assert 7.0 <= float(R.spectral_up(one)) < 7.0 / 0.99
    assert float(R.spectral_up(torch.zeros(3, 2, dtype=torch.float64))) == 0
    assert float(R.norm_up(torch.zeros(3, dtype=torch.float64))) == 0


def test_gamma_is_above_the_formula() -> None:
    for n in (1, 7, 1000, 10**6):
        true = Fraction(n, 2**53) / (1 - Fraction(n, 2**53))
        assert true <= Fraction(R.gamma(n)) <= true * (1 + Fraction(1, 10**12))


def test_flushed_subnormals_are_refused() -> None:
    R.require_ieee()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        with pytest.raises(CrosslensError, match="subnormal"):
            R.require_ieee()
    finally:
        torch.set_flush_denormal(False)
    assert math.isfinite(R.TINY)

"""The screen of all pairs against the whole matrix of bounds."""

from __future__ import annotations

import pytest
import torch

from crosslens.errors import CrosslensError, UsageError
from crosslens.interactions.neurons.contributions import Effective
from crosslens.interactions.pairs.bounds import (
    bounds_of,
    bounds_of_many,
    own_bounds,
    product_strengths,
)
from crosslens.interactions.pairs.screen import ScreenPlan, screen, weighed
from crosslens.interactions.pairs.totals import meet
from crosslens.interactions.sums import fresh
from tests.interactions_pairs_toy import SITES, L, chunk, codes, site

MANY = 23


def bound(one: Effective, i: int, j: int) -> float:
    """Of two latents at strengths 1, from a loop over neurons."""
    total = 0.0
    for n, w in enumerate(one.out_norm_N.double().tolist()):
        a, b = float(one.value.E_LN[i, n]), float(one.value.E_LN[j, n])
        if one.gate is not None:
            total += w * abs(a) * abs(float(one.gate.E_LN[j, n]))
        elif one.mlp.kind == "relu2":
            total += 0.0 if a < 0 and b < 0 else 2 * w * abs(a * b)
        elif a * b < 0:
            total += w * (abs(a) * abs(b)) ** 0.5
    return total


def brute(one: Effective, strength=None, count=None) -> list[tuple[float, int, int]]:
    """All pairs with a bound above 0, the highest first."""
    n, found = len(one.E_LN), []
    power = 1.0 if product_strengths(one) else 0.5
    for i in range(n):
        for j in range(n):
            if i == j or (one.gate is None and i > j):
                continue
            value = bound(one, i, j)
            if strength is not None:
                value *= float(strength[i] * strength[j]) ** power
            if count is not None:
                value /= count.get((min(i, j), max(i, j)), 0) + 1
            if value > 0:
                found.append((value, i, j))
    return sorted(found, key=lambda each: (-each[0], each[1], each[2]))


def check(found, true, top: int) -> None:
    assert len(found.i_C) == min(top, len(true))
    expected = torch.tensor([value for value, _, _ in true[:top]])
    torch.testing.assert_close(found.bound_C, expected, rtol=1e-4, atol=1e-6)
    assert list(zip(found.i_C.tolist(), found.j_C.tolist(), strict=True)) == [
        (i, j) for _, i, j in true[:top]
    ]


@pytest.mark.parametrize(("kind", "gated"), SITES)
@pytest.mark.parametrize("block", [5, 23, 64])
def test_the_top_list_is_that_of_all_pairs(kind, gated, block):
    one = site(kind, gated, latents=MANY)
    for top in (1, 17, 5000):
        check(screen(one, ScreenPlan(top=top, block=block)), brute(one), top)


@pytest.mark.parametrize(("kind", "gated"), SITES)
def test_strengths_and_meetings_weigh(kind, gated):
    one = site(kind, gated, latents=MANY)
    strength = torch.rand(MANY, generator=torch.Generator().manual_seed(0))
    strength[4] = 0.0
    count = {(0, 1): 3, (2, 9): 100, (7, 22): 1, (11, 12): 5}
    met = fresh(
        torch.tensor([i * MANY + j for i, j in sorted(count)]),
        torch.tensor([count[pair] for pair in sorted(count)]),
        torch.zeros(4, 1, dtype=torch.float64),
    )
    for block in (5, 64):
        plan = ScreenPlan(top=5000, block=block)
        found = screen(one, plan, strength_L=strength, met=met)
        check(found, brute(one, strength, count), 5000)
        assert 4 not in found.i_C.tolist() + found.j_C.tolist()
        pairs = zip(found.i_C.tolist(), found.j_C.tolist(), strict=True)
        assert found.met_C is not None
        assert found.met_C.tolist() == [count.get((min(p), max(p)), 0) for p in pairs]


def test_of_equal_bounds_the_first_pairs_come_first():
    one = site("relu", False, latents=6)
    one.value.E_LN[:] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])[:, None]
    for block in (2, 6):
        found = screen(one, ScreenPlan(top=4, block=block))
        pairs = list(zip(found.i_C.tolist(), found.j_C.tolist(), strict=True))
        assert pairs == [(0, 1), (0, 3), (0, 5), (1, 2)]


@pytest.mark.parametrize(("kind", "gated"), SITES)
def test_over_tokens_the_screen_is_at_least_the_coupling(kind, gated):
    one = site(kind, gated)
    met = meet([{"a": chunk(one, codes(30, seed), seed)} for seed in range(3)])["a"]
    bounds = weighed(met)
    assert bool((met.column("coupling") <= bounds * (1 + 1e-5) + 1e-6).all())
    if product_strengths(one):
        torch.testing.assert_close(met.column("coupling"), bounds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "gated"), SITES)
def test_bounds_of_some_pairs(kind, gated):
    one = site(kind, gated)
    i, j = torch.triu_indices(L, L, 1).unbind()
    both_ways = [
        bound(one, a, b) + (bound(one, b, a) if gated else 0.0)
        for a, b in zip(i.tolist(), j.tolist(), strict=True)
    ]
    torch.testing.assert_close(bounds_of(one, i, j), torch.tensor(both_ways))
    torch.testing.assert_close(bounds_of_many(one, i, j), torch.tensor(both_ways))
    if kind != "relu" or gated:
        true = [bound(one, a, a) for a in range(L)]
        torch.testing.assert_close(own_bounds(one), torch.tensor(true))


def test_nothing_to_find_is_one_sentence():
    one = site("relu", False, latents=6)
    with pytest.raises(CrosslensError, match=r"No pair of latents can interact at mlp_in\.0"):
        screen(one, strength_L=torch.zeros(6))
    with pytest.raises(UsageError, match="5 typical strengths for 6 latents"):
        screen(one, strength_L=torch.ones(5))
    with pytest.raises(UsageError, match="at least 1"):
        ScreenPlan(top=0)

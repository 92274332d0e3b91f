"""The Pareto frontier and the score over the baseline."""

from __future__ import annotations

import pytest

from crosslens.errors import UsageError
from crosslens.proofs.frontier import Line, frontier, local_frontier
from crosslens.proofs.local import local
from tests.proofs_local_toy import gathered, toy

TIERS = [
    {"name": "dear", "bound": 1.0, "flops": 90},
    {"name": "cheap", "bound": 6.0, "flops": 10},
    {"name": "worse", "bound": 7.0, "flops": 20},
    {"name": "middle", "bound": 2.0, "flops": 50},
]


def test_a_tier_is_on_the_frontier_if_none_is_cheaper_and_better() -> None:
    found = frontier(TIERS, Line(start=10.0, truth=0.0, brute=100.0))
    assert [point.name for point in found.points] == ["cheap", "worse", "middle", "dear"]
    for point in found.points:
        beaten = any(tier["flops"] <= point.flops and tier["bound"] < point.bound for tier in TIERS)
        assert point.on_front == (not beaten)
    assert [point.on_front for point in found.points] == [True, False, True, True]


def test_improvement_is_the_height_over_the_line() -> None:
    line = Line(start=10.0, truth=0.0, brute=100.0)
    found = {point.name: point for point in frontier(TIERS, line).points}
    assert line.at(0.0) == 10.0
    assert line.at(100.0) == line.at(500.0) == 0.0
    assert found["middle"].improvement == pytest.approx((5.0 - 2.0) / 10)
    assert found["dear"].improvement == pytest.approx(0.0)
    assert frontier(TIERS, line).score == pytest.approx(0.3)
    late = [{"name": "late", "bound": 0.0, "flops": 300}]
    assert frontier(late, line).score == 0.0
    assert frontier([{"name": "bad", "bound": 9.9, "flops": 50}], line).score == 0.0


def test_claims_of_at_least_count_upwards() -> None:
    line = Line(start=0.0, truth=0.99, brute=100.0)
    tiers = [
        {"name": "box", "bound": 0.0, "flops": 1},
        {"name": "pairs", "bound": 0.9, "flops": 10},
        {"name": "worse", "bound": 0.8, "flops": 11},
    ]
    found = frontier(tiers, line)
    assert [point.on_front for point in found.points] == [True, True, False]
    assert found.points[1].improvement == pytest.approx((0.9 - 0.099) / 0.99)


def test_without_brute_force_there_is_no_baseline() -> None:
    with pytest.raises(UsageError, match="no baseline"):
        Line(start=1.0, truth=0.0, brute=0.0)


def test_a_sites_frontiers_are_of_its_figures() -> None:
    weights, coder, x = toy("silu", True, "rms")
    site = local(gathered(weights, coder, x), lambda _: None).plain()
    cap = next(tier["bound"] for tier in site["tiers"] if tier["name"] == "nothing/cap")
    for amortised, key in ((False, "flops"), (True, "flops_per_token")):
        found = local_frontier(site, amortised=amortised)
        assert found.line.start == cap
        assert found.line.truth == 0.0
        own = {tier["name"]: tier[key] for tier in site["tiers"]}
        assert {point.name: point.flops for point in found.points} == own
        assert found.plain()["score"] == found.score

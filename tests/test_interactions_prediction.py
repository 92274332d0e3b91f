"""Rank correlations of metrics and effects against scipy, and planted relations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.diffing.resampling import draws
from crosslens.errors import UsageError
from crosslens.interactions.effects.choice import Chosen
from crosslens.interactions.effects.measure import FIGURES, Effects
from crosslens.interactions.effects.prediction import BASELINES, metrics, prediction
from crosslens.interactions.effects.runs import Summed
from crosslens.interactions.effects.statistics import compared, correlated, rank_correlation
from crosslens.interactions.pairs.table import Triplets

NUMBERS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=5, max_size=12)


def one_stratum(x: list[float], y: list[float], count: list[float]) -> float:
    given_x, given_y = (torch.tensor(each, dtype=torch.float64) for each in (x, y))
    same = torch.zeros(len(x), dtype=torch.int64)
    return float(rank_correlation(given_x, given_y, same, torch.tensor([count]))[0])


@settings(deadline=None, max_examples=60)
@given(NUMBERS, st.integers(0, 99))
def test_a_draw_is_the_usual_correlation_of_what_was_drawn(numbers, seed):
    """With ties, and with pairs that are drawn twice or not at all."""
    from scipy.stats import spearmanr

    x, y = ([float(pair[k]) for pair in numbers] for k in (0, 1))
    for count in draws(len(x), seed, times=3).tolist():
        again = [c for c, n in enumerate(count) for _ in range(int(n))]
        drawn_x, drawn_y = ([each[c] for c in again] for each in (x, y))
        found = one_stratum(x, y, count)
        if len(set(drawn_x)) == 1 or len(set(drawn_y)) == 1:
            assert np.isnan(found)
        else:
            assert found == pytest.approx(spearmanr(drawn_x, drawn_y).statistic, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=8, max_size=14))
def test_partial_correlations_are_those_of_the_formula(numbers):
    """(r_xy − r_xz r_yz) / √((1 − r_xz²)(1 − r_yz²)), r being Spearman's."""
    from scipy.stats import spearmanr

    x, y, z = (np.array(each, np.float64) for each in zip(*numbers, strict=True))
    found = correlated(x, y, np.zeros(len(x), np.int64), z)
    if min(len(set(each.tolist())) for each in (x, y, z)) == 1:
        return
    xy, xz, yz = (spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    rest = (1 - xz**2) * (1 - yz**2)
    if rest > 1e-6:
        assert found is not None
        assert found.value == pytest.approx((xy - xz * yz) / rest**0.5, abs=1e-6)


def test_sites_of_other_units_say_nothing_about_one_another():
    """Within each site the order is reversed; together the numbers would look well ordered."""
    x = np.array([1.0, 2.0, 3.0, 101.0, 102.0, 103.0])
    y = np.array([3.0, 2.0, 1.0, 903.0, 902.0, 901.0])
    site = np.array([0, 0, 0, 1, 1, 1])
    found = correlated(x, y, site)
    assert found is not None
    assert found.value == pytest.approx(-1.0)
    together = correlated(x, y, 0 * site)
    assert together is not None
    assert together.value > 0.5


def test_nothing_is_said_of_few_pairs_or_equal_numbers():
    x, site = np.arange(8.0), np.zeros(8, np.int64)
    assert correlated(x, np.ones(8), site) is None
    y = np.where(x < 4, x, np.nan)
    assert correlated(x, y, site) is None
    assert correlated(x, np.where(x < 5, x, np.inf), site) is not None


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside, true = 0, 6 / np.pi * np.arcsin(0.5 / 2)  # of a normal pair of correlation ½
    for trial in range(120):
        x = rng.normal(size=60)
        y = 0.5 * x + np.sqrt(0.75) * rng.normal(size=60)
        found = correlated(x, y, np.zeros(60, np.int64), seed=trial)
        assert found is not None
        inside += found.low <= true <= found.high
    assert 0.88 < inside / 120 < 0.99


def test_means_are_compared_with_the_baselines():
    value = np.array([*np.arange(10.0), *(3 * np.arange(10.0)), 7.0, np.nan])
    kind = np.array([*["random"] * 10, *["top"] * 10, "few", "top"])
    found = compared(value, kind, "random")
    assert found["top"]["mean"] == pytest.approx(13.5)
    assert found["top"]["pairs"] == 10
    assert found["top"]["median"] == pytest.approx(13.5)
    assert found["top"]["ratio"] == pytest.approx(3.0)
    low, high = found["top"]["ratio_ci"]
    assert 1.2 < low < 3.0 < high < 8.0
    assert found["few"] == {
        "pairs": 1,
        "mean": 7.0,
        "ci": None,
        "median": 7.0,
        "ratio": pytest.approx(7 / 4.5),
        "ratio_ci": None,
    }
    assert "ratio" not in compared(value[10:20], kind[10:20], "random")["top"]


N = 24
SITES = ("a", "b")


def measured(effect: np.ndarray, later: np.ndarray | None = None) -> Effects:
    """Pairs (c, c + 1), half at each site, whose signed interaction is given; two documents."""
    chosen = Chosen(
        sites=SITES,
        site_C=np.arange(N) % 2,
        i_C=np.arange(N),
        j_C=np.arange(N) + 1,
        kind_C=np.array(["top", "random", "cooccurring", "random"] * (N // 4)),
    )
    rng = np.random.default_rng(5)
    return Effects(
        chosen=chosen,
        here=sums(effect),
        later=sums(effect if later is None else later),
        cosine_C=-rng.random(N),
        cooccurrence_C=rng.random(N),
        size_C=rng.random(N),
        others=None,
    )


def sums(effect: np.ndarray) -> Summed:
    found = Summed.blank(N, 2)
    figures = torch.zeros(1, len(FIGURES), dtype=torch.float64)
    for c, value in enumerate(effect.tolist()):
        for name, x in (("interaction", value), ("interaction_abs", abs(value))):
            figures[0, FIGURES.index(name)] = x
        for document in (0, 1):
            found.add(c, torch.tensor([document]), figures)
    return found


def table(**measures: np.ndarray) -> Triplets:
    """The same pairs, in another order."""
    rng = np.random.default_rng(6)
    order = np.array([*range(N - 2, -1, -2), *range(N - 1, 0, -2)])
    count = rng.integers(5, 90, N)
    return Triplets(
        sites=SITES,
        tokens=100,
        site_C=order % 2,
        i_C=order,
        j_C=order + 1,
        count_C=count,
        measured_C=count,
        strength_C=rng.random(N),
        low_C=np.zeros(N),
        high_C=np.ones(N),
        signed_C=rng.normal(size=N),
        signed_low_C=np.full(N, -1.0),
        signed_high_C=np.full(N, 1.0),
        measures={name: each[order] for name, each in measures.items()},
    )


def test_a_metric_that_orders_the_effects_is_found():
    rng = np.random.default_rng(1)
    effect = rng.normal(size=N)
    scale = np.where(np.arange(N) % 2, 1.0, 1000.0)  # sites have units of their own
    noise, blank = rng.random(N), np.full(N, np.nan)
    given = table(
        good=np.exp(np.abs(effect)) * scale,
        signed_good=effect * scale,
        noise=noise,
        blank=blank,
        constant=np.ones(N),
        first_dominant=np.abs(effect) / 4,
        second_dominant=3 * np.abs(effect) / 4,
        shapley_error=np.abs(effect),
    )
    found = prediction(measured(effect), given)
    assert found["good"] == {"spearman": pytest.approx(1.0), "ci": pytest.approx([1.0, 1.0])}
    assert found["signed_good"]["spearman"] == pytest.approx(1.0), "sizes are compared with sizes"
    assert found["dominance"]["spearman"] == pytest.approx(1.0)
    low, high = found["noise"]["ci"]
    assert low < found["noise"]["spearman"] < high
    assert low < 0 < high
    assert {"strength", "product", "frequency", "signed", *BASELINES} <= set(found)
    left_out = {"blank", "constant", "first_dominant", "shapley_error", "strength_low", "sign", "i"}
    assert not left_out & set(found)
    signed = prediction(measured(effect), given, target="interaction")
    assert signed["signed_good"]["spearman"] == pytest.approx(1.0)
    assert abs(signed["good"]["spearman"]) < 0.6


def test_figures_of_a_metric_are_those_of_its_own_pairs():
    """However the table is ordered, and where some pairs are in another one."""
    rng = np.random.default_rng(2)
    effect, mine = rng.normal(size=N), rng.random(N)
    whole = table(mine=mine)
    assert metrics(measured(effect), whole)["mine"].tolist() == mine.tolist()
    even = whole.i_C % 3 == 0

    def some(at: np.ndarray) -> Triplets:
        fields = {name: x[at] for name, x in vars(whole).items() if isinstance(x, np.ndarray)}
        return replace(whole, **fields, measures={"mine": whole.measures["mine"][at]})

    joined = replace(measured(effect), others=some(even))
    found = metrics(joined, some(~even))
    assert found["mine"].tolist() == mine.tolist()
    half = metrics(measured(effect), some(~even))["mine"]
    assert np.isnan(half).tolist() == [c % 3 == 0 for c in range(N)]
    assert found["decoder_cosine"].tolist() == joined.cosine_C.tolist()


def test_it_can_be_asked_of_some_kinds_and_of_what_comes_later():
    rng = np.random.default_rng(3)
    effect, later = rng.normal(size=N), rng.normal(size=N)
    given = table(mine=np.abs(effect), then=np.abs(later))
    found = measured(effect, later)
    assert prediction(found, given, target="later_interaction_abs")["then"]["spearman"] == (
        pytest.approx(1.0)
    )
    kinds = found.chosen.kind_C
    wrong = np.where(kinds == "random", np.abs(effect), -np.abs(effect))
    given = table(mine=np.exp(wrong))
    assert prediction(found, given, among=["random"])["mine"]["spearman"] == pytest.approx(1.0)
    assert prediction(found, given)["mine"]["spearman"] < 0.9
    assert prediction(found, given, among=["top"])["mine"]["spearman"] == pytest.approx(-1.0)
    assert prediction(found, given, among=["none"]) == {}


def test_what_a_metric_knows_beyond_another():
    """The effect is of the sizes and of one thing more; a metric of sizes alone knows nothing more.

    With N normal draws the partial correlations are far from the bounds asserted."""
    rng = np.random.default_rng(8)
    size, more = rng.normal(size=N), rng.normal(size=N)
    given = table(of_size=np.exp(size + 0.3 * rng.normal(size=N)), of_both=np.exp(size + more))
    found = replace(measured(np.exp(size + more)), size_C=np.exp(size))
    plain, rest = prediction(found, given), prediction(found, given, beyond="size_product")
    assert plain["of_size"]["spearman"] > 0.5
    assert abs(rest["of_size"]["spearman"]) < 0.35
    assert rest["of_both"]["spearman"] == pytest.approx(1.0)
    assert "size_product" not in rest
    with pytest.raises(UsageError, match=r"no metric 'size'.*Did you mean.*size_product"):
        prediction(found, given, beyond="size")


def test_reliability_is_one_where_documents_agree():
    found = measured(np.random.default_rng(4).normal(size=N))
    assert found.reliability() == pytest.approx(1.0)
    assert found.reliability("kl_from_additive") is None, "nothing was measured"


def test_a_few_pairs_of_each_site_say_nothing_of_reliability():
    """However many sites there are."""
    found = measured(np.random.default_rng(4).normal(size=N))
    sites = np.arange(N) // 4
    chosen = replace(found.chosen, site_C=sites, sites=tuple(map(str, range(sites.max() + 1))))
    assert replace(found, chosen=chosen).reliability() is None
    one_more = replace(chosen, site_C=np.where(sites == 1, 0, sites))
    assert replace(found, chosen=one_more).reliability() == pytest.approx(1.0)

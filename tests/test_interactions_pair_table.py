"""Choosing, ranking and saving pairs; sums with bounded keys; intervals over documents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.errors import UsageError
from crosslens.functional import pairs as F
from crosslens.interactions.intervals import mean_interval
from crosslens.interactions.pairs.contexts import ContextPlan
from crosslens.interactions.pairs.measure import PairPlan, Pairs, candidates, measure_pairs
from crosslens.interactions.pairs.table import Triplets
from crosslens.interactions.sums import Gathering, Sums, cut, fresh, merged, places
from tests.interactions_pairs_toy import SITES, L, chunk, codes, site


def sums(table: dict[int, tuple[int, float]]) -> Sums:
    """{key: (count, total)} with one column."""
    keys = sorted(table)
    return fresh(
        torch.tensor(keys, dtype=torch.int64),
        torch.tensor([table[key][0] for key in keys], dtype=torch.int64),
        torch.tensor([[table[key][1]] for key in keys], dtype=torch.float64).view(-1, 1),
    )


TABLE = st.dictionaries(
    st.integers(0, 30), st.tuples(st.integers(1, 5), st.floats(0, 9)), max_size=12
)


@settings(deadline=None, max_examples=60)
@given(st.lists(TABLE, min_size=1, max_size=8), st.integers(1, 12))
def test_gathered_sums_are_those_of_a_dictionary(tables, most):
    gathering = Gathering(most)
    total: dict[int, float] = {}
    count: dict[int, int] = {}
    for table in tables:
        gathering.add(sums(table))
        for key, (n, x) in table.items():
            total[key], count[key] = total.get(key, 0.0) + x, count.get(key, 0) + n
    found = gathering.sums()
    assert len(found.key_U) == min(most, len(found.key_U)) <= len(total)
    assert found.key_U.tolist() == sorted(set(found.key_U.tolist()))
    assert float(found.all_M[0]) == pytest.approx(sum(total.values()))
    assert found.all_count == sum(count.values())
    slack = float(found.slack_M)
    kept = dict(zip(found.key_U.tolist(), found.total_UM[:, 0].tolist(), strict=True))
    for key, true in total.items():
        assert true - slack - 1e-9 <= kept.get(key, 0.0) <= true + 1e-9
    if slack == 0 and len(total) <= most:
        assert kept == pytest.approx(total)


def test_a_cut_keeps_the_first_of_equal_pairs():
    found = cut(sums({5: (1, 2.0), 1: (1, 2.0), 3: (4, 2.0), 9: (1, 7.0)}), 2)
    assert found.key_U.tolist() == [1, 9]
    assert (found.dropped_count, float(found.slack_M)) == (5, 2.0)
    assert merged([found]) is found


def test_a_cut_goes_by_shares_of_several_columns():
    total = torch.tensor([[100.0, 0.0], [0.0, 3.0], [50.0, 1.0], [40.0, 0.5]]).double()
    table = fresh(torch.arange(4), torch.ones(4, dtype=torch.int64), total)
    found = cut(table, 2, leading=(0, 1))
    assert found.key_U.tolist() == [0, 1] or found.key_U.tolist() == [1, 2]
    share = total[:, 0] / 190 + total[:, 1] / 4.5
    assert found.key_U.tolist() == sorted(share.argsort(descending=True)[:2].tolist())
    assert found.slack_M.tolist() == total[share.argsort(descending=True)[2:]].amax(0).tolist()
    assert found.only(slice(1, 2)).all_M.tolist() == [4.5]


def test_places_of_keys():
    place, there = places(torch.tensor([2, 5, 9]), torch.tensor([5, 1, 10, 9]))
    assert there.tolist() == [True, False, False, True]
    assert place[there].tolist() == [1, 2]
    _, there = places(torch.zeros(0, dtype=torch.int64), torch.tensor([5]))
    assert there.tolist() == [False]


def test_intervals_of_equal_groups_are_students():
    values = [3.0, 5.0, 4.0, 8.0]
    total = torch.tensor([values], dtype=torch.float64) * 10
    mean, low, high = mean_interval(total, torch.full((1, 4), 10))
    deviation = math.sqrt(sum((v - 5) ** 2 for v in values) / 3)
    assert float(mean) == pytest.approx(5.0)
    assert float(high - mean) == pytest.approx(3.1824463 * deviation / 2)
    assert float(mean - low) == pytest.approx(float(high - mean))


def test_intervals_of_unequal_groups_leave_out_one_at_a_time():
    total, count = [6.0, 1.0, 0.0, 9.0], [3, 2, 0, 4]
    mean, low, high = mean_interval(torch.tensor([total]).double(), torch.tensor([count]))
    without = [(16 - total[g]) / (9 - count[g]) for g in (0, 1, 3)]
    variance = 2 / 3 * sum((theta - 16 / 9) ** 2 for theta in without)
    assert float(mean) == pytest.approx(16 / 9)
    assert float(high) == pytest.approx(16 / 9 + 4.3026527 * math.sqrt(variance))
    assert float(low) == pytest.approx(16 / 9 - 4.3026527 * math.sqrt(variance))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Tokens of a group share an offset: an interval over tokens would fail nearly always."""
    generator = torch.Generator().manual_seed(0)
    count = torch.randint(5, 15, (400, 12), generator=generator)
    offset = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    _, low, high = mean_interval((1.0 + offset) * count, count)
    inside = float(((low <= 1.0) & (high >= 1.0)).double().mean())
    assert 0.90 < inside < 0.99


def test_one_group_knows_no_interval():
    mean, low, high = mean_interval(
        torch.tensor([[2.0, 0.0], [0.0, 0.0]]).double(), torch.tensor([[4, 0], [0, 0]])
    )
    assert float(mean[0]) == 0.5
    assert all(math.isnan(float(x)) for x in (low[0], high[0], mean[1]))


def measured(kind: str = "silu", gated: bool = True, **plan: int) -> Pairs:
    one = site(kind, gated)
    chunks = [{"mlp_in.0": chunk(one, codes(12, seed), seed)} for seed in range(3)]
    contexts = ContextPlan(groups=4)
    return measure_pairs(lambda: chunks, PairPlan(contexts=contexts, **plan))


@pytest.mark.parametrize(("kind", "gated"), SITES)
def test_triplets_are_the_sums(kind, gated):
    pairs = measured(kind, gated)
    table, met, found = pairs.triplets, pairs.met["mlp_in.0"], pairs.in_context["mlp_in.0"]
    assert len(table) == len(met.sums.key_U) == pairs.measured
    for c in range(len(table)):
        key = int(table.i_C[c]) * L + int(table.j_C[c])
        place = met.sums.key_U.tolist().index(key)
        n = int(met.sums.count_U[place])
        assert table.count_C[c] == table.measured_C[c] == n == int(found.met_CG[c].sum())
        assert table.frequency_C[c] == pytest.approx(n / 36)
        assert table.strength_C[c] == pytest.approx(float(found.total_CGM[c, :, 0].sum()) / n)
        assert table.product_C[c] == pytest.approx(float(found.total_CGM[c, :, 0].sum()) / 36)
        assert table.measures["shared"][c] == pytest.approx(float(met.column("shared")[place]) / n)
        inner = (met.effective.gate if gated else met.effective.value).E_LN
        rows = (inner[int(table.i_C[c])], inner[int(table.j_C[c])])
        proxy = F.hadamard(rows[0][None], rows[1][None], met.effective.out_norm_N)
        assert table.measures["hadamard"][c] == pytest.approx(float(proxy), rel=1e-5)
        assert abs(table.signed_C[c]) <= table.strength_C[c] + 1e-6
        if table.sign_C[c]:
            assert table.signed_low_C[c] * table.signed_high_C[c] > 0
            assert table.sign_C[c] == np.sign(table.signed_C[c])
    assert set(table.sign_C.tolist()) <= {-1, 0, 1}
    assert (table.measures["coupling"] > 0).any()


def test_mixed_differences_keep_below_their_reach():
    table = measured("gelu", False).triplets
    for name in ("rest_size", "bias_size", "shapley_size"):
        size = table.strength_C if name == "rest_size" else table.measures[name]
        assert (size <= F.LIMITS["gelu"].smaller * table.measures["reach"] * (1 + 1e-5)).all()


def table_of(strength: list[float], count: list[int]) -> Triplets:
    n = len(strength)
    zeros = np.zeros(n)
    return Triplets(
        sites=("a",),
        tokens=10,
        site_C=np.zeros(n, np.int64),
        i_C=np.arange(n),
        j_C=np.arange(n) + 1,
        count_C=np.array(count),
        measured_C=np.array(count),
        strength_C=np.array(strength),
        low_C=zeros,
        high_C=zeros,
        signed_C=zeros,
        signed_low_C=np.array([-1.0, 0.5, -2.0, np.nan]),
        signed_high_C=np.array([1.0, 1.0, -1.0, np.nan]),
        measures={},
    )


def test_ranks_put_the_first_of_equals_first():
    table = table_of([2.0, 4.0, 2.0, 1.0], [4, 2, 4, 9])
    assert table.ranked("strength").tolist() == [1, 0, 2, 3]
    assert table.ranked("frequency").tolist() == [3, 0, 2, 1]
    assert table.ranked("product").tolist() == [3, 0, 1, 2]
    assert table.ranked(n=2).tolist() == [3, 0]
    assert table.sign_C.tolist() == [0, 1, -1, 0]


def test_coverage_is_the_share_of_the_highest():
    pairs = measured("relu", False)
    shared = sorted(pairs.met["mlp_in.0"].column("shared").tolist(), reverse=True)
    found = pairs.coverage([1, 3, 10_000])
    assert found[1] == pytest.approx(shared[0] / sum(shared))
    assert found[3] == pytest.approx(sum(shared[:3]) / sum(shared))
    assert found[10_000] == pytest.approx(1.0)
    parts = pairs.latent_share()
    assert sum(parts.values()) == pytest.approx(1.0)
    whole = pairs.met["mlp_in.0"].whole
    assert parts["latents"] == pytest.approx(sum(shared) / whole)
    assert pairs.dropped == 0.0


def test_coverage_counts_what_was_dropped():
    everything = measured("relu", False)
    bounded = measured("relu", False, most_keys=5, candidates=5)
    assert bounded.dropped > 0
    assert bounded.coverage([3])[3] <= everything.coverage([3])[3] + 1e-9
    assert bounded.coverage([100])[100] == pytest.approx(1 - bounded.dropped)


def test_candidates_are_the_highest_of_each_list():
    pairs = measured("relu", False)
    met = pairs.met["mlp_in.0"]
    chosen = candidates(met, PairPlan(candidates=8, least=2)).tolist()
    assert chosen == sorted(chosen)
    assert len(chosen) == 8
    keys = met.sums.key_U
    highest = keys[met.column("shared").argsort(descending=True, stable=True)[:4]]
    assert set(highest.tolist()) <= set(chosen)
    left = [c for c in range(len(keys)) if int(keys[c]) not in highest.tolist()]
    often = [c for c in left if int(met.sums.count_U[c]) >= 2]
    strength = met.column("shared") / met.sums.count_U
    assert int(keys[max(often, key=lambda c: float(strength[c]))]) in chosen


def test_top_is_plain_and_parquet_holds_everything(tmp_path):
    import pyarrow.parquet

    pairs = measured()
    first = pairs.top(1)[0]
    table = pairs.triplets
    c = int(table.ranked("product", 1)[0])
    assert (first["i"], first["j"], first["site"]) == (table.i_C[c], table.j_C[c], "mlp_in.0")
    assert first["ci"] is None or first["ci"][0] <= first["strength"] <= first["ci"][1]
    table.save(tmp_path / "pairs.parquet")
    read = pyarrow.parquet.read_table(tmp_path / "pairs.parquet")
    assert read.schema.metadata[b"tokens"] == b"36"
    assert read.column_names == list(table.columns())
    assert read["strength"].to_pylist() == table.strength_C.tolist()
    assert read["site"].to_pylist() == ["mlp_in.0"] * len(table)


def test_plans_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="at least 1 candidate"):
        PairPlan(candidates=0)
    with pytest.raises(UsageError, match="raise most_keys"):
        PairPlan(candidates=10, most_keys=5)
    with pytest.raises(UsageError, match="at least 2 groups"):
        PairPlan(contexts=ContextPlan(groups=1))

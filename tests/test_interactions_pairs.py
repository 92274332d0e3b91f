"""Both passes over pairs against loops over tokens, pairs, neurons and coalitions."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from crosslens.errors import CrosslensError
from crosslens.interactions.pairs.blocks import pair_index
from crosslens.interactions.pairs.contexts import (
    IN_CONTEXT,
    ContextPlan,
    InContext,
    Wanted,
    measure_in_context,
)
from crosslens.interactions.pairs.totals import Met, meet
from crosslens.kernels import pairs as kernel
from tests.interactions_pairs_toy import (
    SITES,
    L,
    N,
    both,
    chunk,
    codes,
    latents_of,
    mixed,
    phi,
    shapley,
    site,
)

NAME = "mlp_in.0"


def some_chunks(kind: str, gated: bool, rows: int = 9):
    """Three chunks of one site."""
    one = site(kind, gated)
    return [{NAME: chunk(one, codes(rows, seed), seed)} for seed in range(3)]


def w_of(these) -> list[float]:
    return [float(w) for w in these.effective.out_norm_N]


def pairs_of(these, row):
    return combinations(latents_of(these, row), 2)


def close(value: float):
    return pytest.approx(value, rel=2e-4, abs=1e-5)


def test_pairs_are_listed_once_however_tokens_are_blocked():
    lists = chunk(site("relu", False), codes(20)).lists
    true: dict[int, int] = defaultdict(int)
    for row in range(20):
        start, stop = lists.starts_I[row : row + 2].tolist()
        for i, j in combinations(lists.index_N[start:stop].tolist(), 2):
            true[i * L + j] += 1
    for slots in (1, 12, 512):
        index = pair_index(lists, L, slots)
        assert dict(zip(index.key_U.tolist(), index.count_U.tolist(), strict=True)) == true
        assert index.key_U.tolist() == sorted(true)
        assert sorted(torch.cat([b.row_B for b in index.blocks]).tolist()) == list(range(20))
        for block in index.blocks:
            assert block.entry_BK.numel() + 2 * len(block.row_B) <= slots or len(block.row_B) == 1


def oracle_totals(chunks) -> tuple[dict, dict, dict[str, float]]:
    """{key: count}, {key: {measure: sum}} and sums of `shared` and `coupling` beside pairs of
    latents, from loops."""
    count: dict[int, int] = defaultdict(int)
    sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    beside: dict[str, float] = defaultdict(float)
    for by_site in chunks:
        these = by_site[NAME]
        for row in range(these.lists.n_items):
            strength = dict(zip(latents_of(these, row), these_weights(these, row), strict=True))
            for i, j, name, amount in row_terms(these, row):
                if isinstance(j, int):
                    sums[i * L + j][name] += amount
                else:
                    beside[f"{name} {j}"] += amount
            for i, j in pairs_of(these, row):
                count[i * L + j] += 1
                product = strength[i] * strength[j]
                quadratic = these.effective.gate or these.effective.mlp.kind == "relu2"
                sums[i * L + j]["gram"] += product if quadratic else math.sqrt(product)
    return count, sums, beside


def these_weights(these, row) -> list[float]:
    start, stop = these.lists.starts_I[row : row + 2].tolist()
    return [float(v) * float(these.scalar_R[row]) for v in these.value_E[start:stop]]


def row_terms(these, row):
    """(i, j, measure, amount) of one token; j may be `always` or `error`."""
    inner, value = both(these, row)
    kind, w = these.effective.mlp.kind, w_of(these)
    for n in range(N):
        y = {m: inner[m][n] for m in inner}
        u = None if value is None else {m: value[m][n] for m in value}
        for i, j in combinations(y, 2):
            for name, amount in pair_terms(kind, y, u, i, j):
                yield i, j, name, w[n] * amount


def pair_terms(kind, y, u, i, j):
    whole = sum(y.values())
    if u is not None:
        lost = {m: abs(phi(kind, whole) - phi(kind, whole - y[m])) for m in (i, j)}
        yield "shared", abs(u[i]) * lost[j] + abs(u[j]) * lost[i]
        yield "coupling", abs(u[i]) * abs(y[j]) + abs(u[j]) * abs(y[i])
        return
    low, product = min(abs(y[i]), abs(y[j])), abs(y[i] * y[j])
    if kind == "relu2":
        yield "coupling", 0.0 if y[i] < 0 and y[j] < 0 else 2 * product
        yield "shared", 2 * product if whole > 0 else 0.0
        return
    p, q = (sum(max(s * v, 0.0) for v in y.values()) for s in (1, -1))
    opposed = y[i] * y[j] < 0
    yield "coupling", low if opposed else 0.0
    yield "shared", product / max(p, q) if opposed else 0.0


@pytest.fixture(params=["kernels", "stock"])
def _form(request, monkeypatch):
    """With compiled kernels where there are any, and without."""
    if request.param == "stock":
        monkeypatch.setattr(kernel, "takes", lambda *_: False)


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize(("kind", "gated"), SITES)
def test_totals_are_the_loops(kind, gated):
    chunks = some_chunks(kind, gated)
    met = meet(chunks)[NAME]
    count, sums, beside = oracle_totals(chunks)
    assert met.tokens == 27
    assert met.sums.key_U.tolist() == sorted(count)
    assert met.sums.count_U.tolist() == [count[key] for key in sorted(count)]
    for name in ("shared", "gram", "coupling"):
        for key, found in zip(sorted(count), met.column(name).tolist(), strict=True):
            assert found == close(sums[key][name]), (name, key)
        assert met.total(name) == close(sum(each[name] for each in sums.values()))
    assert met.always == close(beside["shared always"])
    assert met.error == close(beside["shared error"])
    assert not met.sums.slack_M.any()


def test_all_that_is_shared_is_the_interaction_itself():
    chunks = some_chunks("relu", False)
    met, true = meet(chunks)[NAME], 0.0
    for by_site in chunks:
        these = by_site[NAME]
        for row in range(these.lists.n_items):
            inner, _ = both(these, row)
            for n, w in enumerate(w_of(these)):
                y = [inner[m][n] for m in inner]
                true += w * min(sum(max(v, 0.0) for v in y), sum(max(-v, 0.0) for v in y))
    assert met.whole == close(true)


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("kind", ["relu", "gelu", "relu2"])
def test_a_neuron_that_nothing_reaches_shares_nothing(kind):
    """However long what it would write."""
    found = []
    for w in (0.0, 1e3):
        (by_site,) = some_chunks(kind, False)[:1]
        these = by_site[NAME]
        one = these.effective
        kept_N = torch.arange(len(one.out_norm_N)) > 0
        names = ("E_LN", "moving_N", "fixed_N", "through_DN")
        value = replace(one.value, **{name: getattr(one.value, name) * kept_N for name in names})
        w_N = torch.where(kept_N, one.out_norm_N, w)
        dead = replace(these, effective=replace(one, value=value, out_norm_N=w_N))
        found.append(meet([{NAME: dead}])[NAME])
    without, with_it = found
    assert with_it.column("shared").isfinite().all()
    assert torch.equal(with_it.column("shared"), without.column("shared"))
    assert with_it.whole == without.whole


def test_bounded_keys_lose_nothing_unnoticed():
    chunks = some_chunks("relu", False)
    everything = meet(chunks)[NAME]
    true = dict(zip(everything.sums.key_U.tolist(), everything.column("shared"), strict=True))
    met = meet(chunks, most_keys=6)[NAME]
    kept = dict(zip(met.sums.key_U.tolist(), met.column("shared"), strict=True))
    assert len(kept) == 6 < len(true)
    slack = float(met.sums.slack_M[met.columns.index("shared")])
    assert slack > 0
    for name in met.columns:
        assert met.total(name) == pytest.approx(everything.total(name))
    assert met.sums.all_count == everything.sums.all_count
    for key, total in true.items():
        assert float(total) - slack <= float(kept.get(key, 0.0)) + 1e-9
        assert float(kept.get(key, 0.0)) <= float(total) + 1e-9


def test_short_products_are_near(monkeypatch):
    """Without kernels, which take what a gate multiplies as it is."""
    monkeypatch.setattr("crosslens.kernels.pairs.takes", lambda *_: False)
    chunks = some_chunks("silu", True)
    exact, short = meet(chunks)[NAME], meet(chunks, dtype=torch.bfloat16)[NAME]
    torch.testing.assert_close(short.column("shared"), exact.column("shared"), rtol=0.02, atol=0.01)
    assert not torch.equal(short.column("shared"), exact.column("shared"))
    assert short.total("coupling") == pytest.approx(exact.total("coupling"), rel=0.01)
    assert short.whole == pytest.approx(exact.whole, rel=0.01)


def test_sites_that_share_a_code_are_each_measured():
    one, other = site("relu", False), site("relu", False, seed=7)
    first = chunk(one, codes(9))
    second = chunk(other, codes(9))
    object.__setattr__(second, "lists", first.lists)
    found = meet([{"a": first, "b": second}])
    alone = meet([{"b": chunk(other, codes(9))}])["b"]
    torch.testing.assert_close(found["b"].sums.total_UM, alone.sums.total_UM)
    assert not torch.equal(found["a"].sums.total_UM, found["b"].sums.total_UM)


def test_sites_of_other_codes_are_refused():
    one = site("relu", False)
    with pytest.raises(ValueError, match="share the lists of one code"):
        meet([{"a": chunk(one, codes(9)), "b": chunk(one, codes(9))}])


def test_no_pair_at_all_is_one_sentence():
    lonely = chunk(site("relu", False), [{0: 1.0}, {1: 1.0}, {}])
    with pytest.raises(CrosslensError, match="No two latents are active together on any of 3"):
        meet([{NAME: lonely}])


def in_context(kind: str, gated: bool, plan: ContextPlan) -> tuple[list, Met, InContext]:
    chunks = some_chunks(kind, gated)
    met = meet(chunks)[NAME]
    share = torch.ones(len(met.sums.key_U))
    wanted = {NAME: Wanted(met.sums.key_U, share)}
    return chunks, met, measure_in_context(chunks, wanted, plan)[NAME]


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize(("kind", "gated"), SITES)
@pytest.mark.parametrize("rows", [2, 1000])
def test_mixed_differences_in_context_are_the_loops(kind, gated, rows, monkeypatch):
    """Some rows at a time, and all."""
    monkeypatch.setattr("crosslens.interactions.pairs.contexts.ROWS", rows)
    monkeypatch.setattr("crosslens.interactions.pairs.contexts.MANY_ROWS", rows)
    chunks, met, found = in_context(kind, gated, ContextPlan(groups=3))
    true: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for by_site in chunks:
        these = by_site[NAME]
        for row in range(these.lists.n_items):
            inner, value = both(these, row)
            group = int(these.document_R[row]) % 3
            for i, j in pairs_of(these, row):
                cell = true[i * L + j, group]
                cell["count"] += 1
                rest = [m for m in inner if m not in (i, j)]
                for n, w in enumerate(w_of(these)):
                    for name, context in (("rest", rest), ("bias", ["always"])):
                        delta = mixed(kind, inner, value, context, i, j, n)
                        cell[f"{name}_size"] += w * abs(delta)
                        cell[f"{name}_signed"] += w * delta
                    a, b = abs(inner[i][n]), abs(inner[j][n])
                    largest = max(abs(inner[m][n]) for m in latents_of(these, row))
                    cell["reach"] += w * min(a, b)
                    cell["first_dominant"] += w * b * (a == largest)
                    cell["second_dominant"] += w * a * (b == largest)
                    cell["ratio"] += w * min(a / b, b / a) / sum(w_of(these))
                    if value is not None:
                        for name, one, other in (("first", i, j), ("second", j, i)):
                            whole = sum(inner[m][n] for m in inner)
                            lost = phi(kind, whole) - phi(kind, whole - inner[other][n])
                            cell[f"{name}_gated"] += w * abs(value[one][n] * lost)
    assert found.key_C.tolist() == met.sums.key_U.tolist()
    for c, key in enumerate(found.key_C.tolist()):
        for group in range(3):
            count = true[key, group]["count"]
            assert int(found.met_CG[c, group]) == int(found.measured_CG[c, group]) == count
            for m, name in enumerate(IN_CONTEXT):
                if not name.startswith("shapley"):
                    total = float(found.total_CGM[c, group, m])
                    assert total == close(true[key, group][name]), name


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize(("kind", "gated"), [("relu", False), ("silu", True)])
def test_drawn_coalitions_come_near_the_exact_shapley_index(kind, gated):
    chunks, _, found = in_context(kind, gated, ContextPlan(coalitions=200))
    signed, noise = (IN_CONTEXT.index(f"shapley_{name}") for name in ("signed", "noise"))
    true: dict[int, float] = defaultdict(float)
    for by_site in chunks:
        these = by_site[NAME]
        for row in range(these.lists.n_items):
            inner, value = both(these, row)
            for i, j in pairs_of(these, row):
                others = [m for m in inner if m not in (i, j, "always")]
                for n, w in enumerate(w_of(these)):
                    true[i * L + j] += w * shapley(kind, inner, value, others, i, j, n)
    total_CM = found.total_CGM.sum(1)
    away = [
        (float(total_CM[c, signed]) - true[key]) / math.sqrt(float(total_CM[c, noise]) + 1e-9)
        for c, key in enumerate(found.key_C.tolist())
    ]
    assert max(map(abs, away)) < 4.5
    assert 0.5 < float(np.std(away)) < 1.5  # the noise is told neither too small nor too large


def test_coalitions_come_from_the_seed_alone():
    _, _, first = in_context("silu", True, ContextPlan())
    _, _, again = in_context("silu", True, ContextPlan())
    _, _, other = in_context("silu", True, ContextPlan(seed=1))
    assert torch.equal(first.total_CGM, again.total_CGM)
    rest = IN_CONTEXT.index("rest_size")
    assert torch.equal(first.total_CGM[..., rest], other.total_CGM[..., rest])
    assert not torch.equal(first.total_CGM, other.total_CGM)


def test_drawn_meetings_estimate_all_of_them():
    chunks, met, everything = in_context("silu", True, ContextPlan())
    wanted = {NAME: Wanted(met.sums.key_U, torch.full((len(met.sums.key_U),), 0.5))}
    means = []
    for seed in range(25):
        found = measure_in_context(chunks, wanted, ContextPlan(seed=seed))[NAME]
        assert torch.equal(found.met_CG, everything.met_CG)
        assert bool((found.measured_CG <= found.met_CG).all())
        rest = float(found.total_CGM[..., IN_CONTEXT.index("rest_size")].sum())
        means.append(rest / 0.5)
    true = float(everything.total_CGM[..., IN_CONTEXT.index("rest_size")].sum())
    assert abs(np.mean(means) - true) < 4 * np.std(means) / math.sqrt(25)
    assert np.std(means) > 0

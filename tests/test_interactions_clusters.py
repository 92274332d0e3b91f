"""Clusters of planted graphs, and every figure of them against loops."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.errors import CrosslensError, UsageError
from crosslens.interactions.clusters.agreement import adjusted_rand
from crosslens.interactions.clusters.measure import (
    ClusterPlan,
    Edges,
    clusters,
    modularity,
    rewired,
)
from crosslens.interactions.pairs.table import Triplets

Weighted = dict[tuple[int, int], float]


def table_of(sites: dict[str, Weighted], tokens: int = 1000) -> Triplets:
    """A table with these pairs, of these strengths, which meet on a tenth of the tokens."""
    rows = [
        (number, i, j, weight)
        for number, pairs in enumerate(sites.values())
        for (i, j), weight in sorted(pairs.items())
    ]
    site, i, j, strength = (np.array(column) for column in zip(*rows, strict=True))
    count = np.full(len(rows), tokens // 10)
    zeros = np.zeros(len(rows))
    return Triplets(
        sites=tuple(sites),
        tokens=tokens,
        site_C=site.astype(np.int64),
        i_C=i.astype(np.int64),
        j_C=j.astype(np.int64),
        count_C=count,
        measured_C=count,
        strength_C=strength.astype(np.float64),
        low_C=zeros,
        high_C=zeros,
        signed_C=zeros,
        signed_low_C=zeros,
        signed_high_C=zeros,
        measures={},
    )


def groups_of(n_groups: int, size: int, seed: int, stray: float = 0.02) -> Weighted:
    """Latents 10, 13, 16, …: group g is g, g + n_groups, …; many edges within, few between."""
    generator = np.random.default_rng(seed)
    found = {}
    for a, b in combinations(range(n_groups * size), 2):
        inside = a % n_groups == b % n_groups
        if generator.random() < (0.4 if inside else stray):
            found[10 + 3 * a, 10 + 3 * b] = float(generator.uniform(0.5, 1.5))
    return found


def true_label(latents: np.ndarray, n_groups: int) -> np.ndarray:
    return (latents - 10) // 3 % n_groups


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_groups_are_found_again(seed):
    first, second = groups_of(4, 15, seed), groups_of(6, 12, seed + 10)
    found = clusters(table_of({"a": first, "b": second}))
    for site, n_groups in (("a", 4), ("b", 6)):
        one = found.sites[site]
        agreement = adjusted_rand(one.label_V, true_label(one.latent_V, n_groups))
        assert agreement > 0.9
        assert one.seed_agreement > 0.95
        assert one.modularity > one.null_modularity + 0.15
        assert len(one.sizes) == n_groups
        assert (one.half_agreement, one.half_latents) == (None, 0)


def test_a_graph_without_groups_is_no_better_than_its_null():
    generator = np.random.default_rng(0)
    pairs = {p: 1.0 for p in combinations(range(60), 2) if generator.random() < 0.1}
    one = clusters(table_of({"a": pairs})).sites["a"]
    assert abs(one.modularity - one.null_modularity) < 0.05
    assert one.seed_agreement < 0.8


def test_halves_agree_where_groups_are_the_same_and_not_where_they_are_others():
    whole, again = table_of({"a": groups_of(4, 15, 0)}), table_of({"a": groups_of(4, 15, 1)})
    same = clusters(whole, halves=(whole, again)).sites["a"]
    assert same.half_agreement is not None
    assert same.half_agreement > 0.95
    assert same.half_latents >= 58
    shuffled = 10 + 3 * np.random.default_rng(3).permutation(60)
    moved: Weighted = {}
    for (i, j), weight in groups_of(4, 15, 1).items():
        low, high = sorted(int(shuffled[(v - 10) // 3]) for v in (i, j))
        moved[low, high] = weight
    other = clusters(whole, halves=(whole, table_of({"a": moved}))).sites["a"]
    assert other.half_agreement is not None
    assert abs(other.half_agreement) < 0.15
    nowhere = clusters(whole, halves=(whole, table_of({"b": groups_of(4, 15, 1)}))).sites["a"]
    assert (nowhere.half_agreement, nowhere.half_latents) == (None, 0)


def test_every_cluster_hangs_together():
    """What Leiden promises and Louvain does not."""
    for seed in range(5):
        pairs = groups_of(3, 20, seed, stray=0.1)
        one = clusters(table_of({"a": pairs})).sites["a"]
        label = dict(zip(one.latent_V.tolist(), one.label_V.tolist(), strict=True))
        for cluster in set(label.values()):
            members = {v for v in label if label[v] == cluster}
            reached, border = set(), {min(members)}
            while border:
                reached |= border
                ends = [p for p in pairs if set(p) <= members and set(p) & border]
                border = {v for pair in ends for v in pair} - reached
            assert reached == members


def test_labels_go_by_weight_and_the_same_plan_gives_the_same():
    pairs = groups_of(4, 15, 0)
    table = table_of({"a": pairs})
    found, again = clusters(table), clusters(table)
    one = found.sites["a"]
    assert one.label_V.tolist() == again.sites["a"].label_V.tolist()
    degree = {v: sum(w for p, w in pairs.items() if v in p) for v in one.latent_V.tolist()}
    assert one.degree_V == pytest.approx([w / 10 for w in degree.values()])
    sums = [one.degree_V[one.label_V == c].sum() for c in range(len(one.sizes))]
    assert sums == sorted(sums, reverse=True)
    assert sum(one.sizes) == len(one.latent_V) == len(degree)


def test_triplets_between_clusters_have_none():
    pairs = groups_of(4, 15, 0)
    table = table_of({"a": pairs, "b": {(1, 2): 0.0, (3, 4): 1.0}})
    found = clusters(table)
    label = dict(zip(found.sites["a"].latent_V.tolist(), found.sites["a"].label_V, strict=True))
    of_C = found.of(table)
    for i, j, c in zip(table.i_C, table.j_C, of_C, strict=True):
        if i >= 10:
            assert c == (label[i] if label[i] == label[j] else -1)
    assert of_C[-2:].tolist() == [-1, 0]
    assert found.sites["b"].latent_V.tolist() == [3, 4]
    columns = found.columns()
    assert {len(column) for column in columns.values()} == {len(label) + 2}
    assert columns["site"].tolist()[-2:] == ["b", "b"]
    assert columns["cluster"].tolist()[: len(label)] == list(label.values())
    told = json.loads(json.dumps(found.plain()))
    assert told["a"]["clusters"] == 4
    assert told["a"]["half_agreement"] is None


def test_a_site_in_which_nothing_happens_is_left_out():
    found = clusters(table_of({"a": {(0, 1): 0.0, (1, 2): 0.0}}))
    assert dict(found.sites) == {}
    assert found.plain() == {}
    assert [len(column) for column in found.columns().values()] == [0, 0, 0, 0]


def test_strength_may_be_what_edges_weigh():
    """Rare strong edges within the pairs (0, 1), (2, 3); frequent weak ones across."""
    table = table_of({"a": {(0, 1): 9.0, (0, 2): 1.0, (1, 3): 1.0, (2, 3): 9.0}})
    table = replace(table, count_C=np.array([1, 900, 900, 1]))
    by_strength = clusters(table, ClusterPlan(by="strength")).sites["a"].label_V
    by_product = clusters(table).sites["a"].label_V
    assert by_strength[0] == by_strength[1] != by_strength[2] == by_strength[3]
    assert by_product[0] == by_product[2] != by_product[1] == by_product[3]


LABELS = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 3), min_size=n, max_size=n) for _ in range(2)))
)


@settings(deadline=None, max_examples=80)
@given(LABELS)
def test_the_adjusted_rand_index_counts_pairs(labels):
    a, b = labels
    both = in_a = in_b = total = 0
    for v, w in combinations(range(len(a)), 2):
        total += 1
        in_a += a[v] == a[w]
        in_b += b[v] == b[w]
        both += a[v] == a[w] and b[v] == b[w]
    expected, highest = in_a * in_b / total, (in_a + in_b) / 2
    true = 1.0 if highest == expected else (both - expected) / (highest - expected)
    found = adjusted_rand(np.array(a), np.array(b))
    assert found == pytest.approx(true)
    assert found == pytest.approx(adjusted_rand(np.array(b), np.array(a)))
    assert adjusted_rand(np.array(a), np.array(a)) == 1.0


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda p: p[0] < p[1]),
        st.floats(0.1, 5),
        min_size=1,
    ),
    st.lists(st.integers(0, 2), min_size=7, max_size=7),
    st.floats(0.5, 2),
)
def test_modularity_is_the_double_sum(pairs, labels, resolution):
    ends = np.array(list(pairs))
    edges = Edges(
        first_E=ends[:, 0], second_E=ends[:, 1], weight_E=np.array(list(pairs.values())), n_nodes=7
    )
    weight = np.zeros((7, 7))
    for (v, w), x in pairs.items():
        weight[v, w] = weight[w, v] = x
    twice = weight.sum()
    true = sum(
        (weight[v, w] - resolution * weight[v].sum() * weight[w].sum() / twice) / twice
        for v in range(7)
        for w in range(7)
        if labels[v] == labels[w]
    )
    assert modularity(edges, np.array(labels), resolution) == pytest.approx(true)


def test_a_rewired_graph_keeps_edges_per_latent_and_loses_groups():
    ends = np.array(list(groups_of(4, 15, 0))) // 3 - 3
    edges = Edges(first_E=ends[:, 0], second_E=ends[:, 1], weight_E=np.ones(len(ends)), n_nodes=60)
    null = rewired(edges, 0)
    assert (null.first_E != null.second_E).all()
    assert 0.9 * len(ends) < len(null.weight_E) <= len(ends)
    assert (null.degree_V <= edges.degree_V).all()
    label = np.arange(60) % 4
    assert modularity(edges, label) > 0.4
    assert abs(modularity(null, label)) < 0.1


def test_what_cannot_be_is_one_sentence(monkeypatch):
    with pytest.raises(UsageError, match="at least 2 seeds, 1 rewired graph and a"):
        ClusterPlan(seeds=1)
    with pytest.raises(UsageError, match="resolution above 0"):
        ClusterPlan(resolution=0.0)
    real = builtins.__import__

    def without(name, *rest):
        if name == "graspologic_native":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CrosslensError, match="graspologic-native, which is not installed: pip"):
        clusters(table_of({"a": groups_of(2, 5, 0)}))

"""Interactions of two models compared: every corner against loops, and planted changes found."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from crosslens.activations import Source, TokenPolicy
from crosslens.coder import Layout
from crosslens.errors import UsageError
from crosslens.interactions.changes.corners import CORNERS, ratios_interval
from crosslens.interactions.changes.measure import ChangePlan, Changes, changes
from crosslens.interactions.intervals import mean_interval
from crosslens.interactions.neurons.contributions import effective, site_chunks
from crosslens.interactions.pairs.contexts import ContextPlan
from crosslens.interactions.pairs.measure import PairPlan, measure_pairs
from tests.interaction_sites import blocks, coder_at, model_of
from tests.interactions_pairs_toy import (
    SITES,
    L,
    N,
    both,
    chunk,
    codes,
    latents_of,
    mixed,
    random,
    site,
)

A, B = "base/mlp_in.0", "chat/mlp_in.0"
CONTEXTS = ContextPlan(groups=3)
PLAN = ChangePlan(contexts=CONTEXTS)


def shared_code(kind: str, gated: bool, other_seed: int = 7):
    """Chunks of both models, of one code; scalars and errors are each model's own."""
    ones = site(kind, gated), site(kind, gated, seed=other_seed)
    found = []
    for seed in range(2):
        first = chunk(ones[0], codes(11, seed), seed)
        second = chunk(ones[1], codes(11, seed), seed + 40)
        found.append({A: first, B: replace(second, lists=first.lists)})
    return ones, found


def table_at(chunks, at: str):
    only = [{at: by_site[at]} for by_site in chunks]
    return measure_pairs(lambda: only, PairPlan(contexts=CONTEXTS)).triplets


def compared(ones, chunks, more=None, plan: ChangePlan = PLAN) -> Changes:
    """All that there is of two models; `more` are the second's chunks, if of another code."""
    first, second = (lambda: chunks), (lambda: more)
    tables = table_at(chunks, A), table_at(more or chunks, B)
    walks = (first, first if more is None else second)
    return changes(*tables, {A: ones[0]}, {B: ones[1]}, walks, plan)


def loops(chunks, at: str, weights) -> dict[tuple[int, int], list[float]]:
    """Σ w|Δ| of each meeting of each pair, with a model's code and weights."""
    found = defaultdict(list)
    for by_site in chunks:
        these = replace(by_site[at], effective=weights)
        w = weights.out_norm_N.tolist()
        for row in range(these.lists.n_items):
            inner, value = both(these, row)
            latents = latents_of(these, row)
            for i, j in [(i, j) for i in latents for j in latents if i < j]:
                rest = [m for m in inner if m not in (i, j)]
                kind = weights.mlp.kind
                found[i, j].append(
                    sum(w[n] * abs(mixed(kind, inner, value, rest, i, j, n)) for n in range(N))
                )
    return found


def check_corners(found: Changes, ones, chunks_a, chunks_b) -> None:
    true = {
        code + weights: loops(chunks, at, one)
        for code, chunks, at in (("a", chunks_a, A), ("b", chunks_b, B))
        for weights, one in zip("ab", ones, strict=True)
    }
    pairs = set(true["aa"]) | set(true["bb"])
    assert set(zip(found.i_C.tolist(), found.j_C.tolist(), strict=True)) == pairs
    tokens = [sum(c[at].lists.n_items for c in chunks) for chunks, at in
              ((chunks_a, A), (chunks_b, B))]  # fmt: skip
    for c, pair in enumerate(zip(found.i_C.tolist(), found.j_C.tolist(), strict=True)):
        for k, corner in enumerate(CORNERS):
            sizes = true[corner].get(pair, [])
            mean = sum(sizes) / len(sizes) if sizes else math.nan
            assert found.strength_KC[k, c] == pytest.approx(mean, rel=2e-4, abs=1e-5, nan_ok=True)
        for x, corner in enumerate(("aa", "bb")):
            met = len(true[corner].get(pair, []))
            assert found.frequency_XC[x, c] == pytest.approx(met / tokens[x])


@pytest.mark.parametrize(("kind", "gated"), SITES)
def test_corners_of_a_shared_code_are_the_loops(kind, gated):
    ones, chunks = shared_code(kind, gated)
    found = compared(ones, chunks)
    check_corners(found, ones, chunks, chunks)
    aa, ab, ba, bb = found.strength_KC
    np.testing.assert_allclose(found.change("total"), bb - aa)
    np.testing.assert_allclose(found.change("weights"), (ab - aa + bb - ba) / 2)
    np.testing.assert_allclose(found.change("code"), (ba - aa + bb - ab) / 2)
    for by in ("strength", "product"):
        parts = found.change("weights", by) + found.change("code", by)
        np.testing.assert_allclose(parts, found.change("total", by), atol=1e-12)
    products = [table_at(chunks, at).product_C for at in (A, B)]
    np.testing.assert_allclose(
        found.change("total", "product"), products[1] - products[0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(("kind", "gated"), [("relu", False), ("silu", True)])
def test_corners_of_two_codes_are_the_loops_and_pairs_of_one_have_no_strength_in_the_other(
    kind, gated
):
    ones = site(kind, gated), site(kind, gated, seed=7)
    chunks_a = [{A: chunk(ones[0], codes(9, seed), seed)} for seed in range(2)]
    chunks_b = [{B: chunk(ones[1], codes(9, seed + 20), seed)} for seed in range(2)]
    found = compared(ones, chunks_a, chunks_b)
    check_corners(found, ones, chunks_a, chunks_b)
    lone_C = np.isnan(found.strength_KC).any(0)
    assert lone_C.any()
    assert not lone_C.all()
    assert np.isnan(found.change("total")[lone_C]).all()
    total_C = found.change("total", "product")
    assert np.isfinite(total_C).all()
    gone = int(np.flatnonzero(np.isnan(found.strength_KC[3]))[0])
    assert total_C[gone] == pytest.approx(-found.strength_KC[0, gone] * found.frequency_XC[0, gone])
    aa, ab, ba, bb = np.nan_to_num(found.strength_KC)
    of_a, of_b = found.frequency_XC
    weights_C, code_C = (found.change(name, "product") for name in ("weights", "code"))
    np.testing.assert_allclose(weights_C, ((ab - aa) * of_a + (bb - ba) * of_b) / 2, atol=1e-12)
    np.testing.assert_allclose(weights_C + code_C, total_C, atol=1e-12)
    json.dumps(found.plain(), allow_nan=False)


def test_a_model_against_itself_has_not_changed():
    one = site("silu", True)
    chunks = [{A: c, B: replace(c)} for c in (chunk(one, codes(11, s), s) for s in range(2))]
    found = compared((one, one), chunks)
    for name in ("total", "weights", "code"):
        assert not found.change(name).any()
        assert not found.change(name, "product").any()
        assert not np.nan_to_num(found.interval_C[name]).any()
    assert not found.changed_IC.any()
    assert found.weights_share() == 0.0


def test_other_weights_alone_are_all_weights_and_another_scalar_alone_is_all_code():
    one, other = site("relu", False), site("relu", False, seed=7)
    base = [chunk(one, codes(11, seed), seed) for seed in range(2)]
    tuned = [{A: c, B: replace(c, effective=other)} for c in base]
    found = compared((one, other), tuned)
    assert np.abs(found.change("weights")).max() > 0.1
    assert not found.change("code").any()
    assert found.weights_share() == 1.0
    scaled = [{A: c, B: replace(c, scalar_R=2 * c.scalar_R)} for c in base]
    found = compared((one, one), scaled)
    assert np.abs(found.change("code")).max() > 0.1
    assert not found.change("weights").any()
    assert found.weights_share() == 0.0


def test_intervals_of_a_shared_code_are_those_of_the_differences():
    generator = torch.Generator().manual_seed(0)
    total = torch.rand(4, 6, 5, generator=generator, dtype=torch.float64)
    count = torch.randint(1, 9, (6, 5), generator=generator).expand(4, 6, 5)
    weight = torch.tensor([-0.5, 0.5, -0.5, 0.5], dtype=torch.float64)
    found = ratios_interval(total, count, weight)
    true = mean_interval(torch.einsum("k,kcg->cg", weight, total), count[0])
    for ours, theirs in zip(found, true, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_intervals_of_two_codes_leave_a_group_out_of_both():
    total = torch.tensor([[[6.0, 1.0, 9.0]], [[2.0, 2.0, 2.0]]]).double()
    count = torch.tensor([[[3, 2, 4]], [[1, 0, 5]]])
    value, low, high = ratios_interval(total, count, torch.tensor([-1.0, 1.0]).double())

    def difference(kept: list[int]) -> float:
        means = [sum(total[k, 0, g].item() for g in kept) / sum(count[k, 0, g].item() for g in kept)
                 for k in (0, 1)]  # fmt: skip
        return means[1] - means[0]

    whole = difference([0, 1, 2])
    variance = 2 / 3 * sum((difference(kept) - whole) ** 2 for kept in ([1, 2], [0, 2], [0, 1]))
    assert float(value) == pytest.approx(whole)
    assert float(high - value) == pytest.approx(4.3026527 * math.sqrt(variance))
    assert float(value - low) == pytest.approx(float(high - value))


def planted():
    """Latent 3 turns and latent 5 triples in b; what latents 1 and 2 do to neurons changes."""
    one = site("relu", False)
    decoder = one.decoder_LD.clone()
    decoder[3] = random(1, decoder.shape[1], seed=99)[0]
    decoder[5] = 3 * decoder[5]
    values = one.value.E_LN.clone()
    values[1:3] += 4.0
    other = replace(one, decoder_LD=decoder, value=replace(one.value, E_LN=values))
    chunks = [chunk(one, codes(40, seed), seed) for seed in range(2)]
    return (one, other), [{A: c, B: replace(c, effective=other)} for c in chunks]


def test_changed_latents_and_what_is_near_them_are_told_apart():
    ones, chunks = planted()
    found = compared(ones, chunks)
    changed = {3, 5}
    for c, pair in enumerate(zip(found.i_C.tolist(), found.j_C.tolist(), strict=True)):
        assert found.changed_IC[:, c].tolist() == [latent in changed for latent in pair]
    at = (found.i_C == 5) | (found.j_C == 5)
    assert found.norm_IC[:, at].max() == pytest.approx(0.75)
    near, away = (found.most(1000, near=is_near) for is_near in (True, False))
    assert sorted([*near, *away]) == list(range(len(found)))
    for c in near:
        assert {int(found.i_C[c]), int(found.j_C[c])} & changed
    assert {int(found.i_C[away[0]]), int(found.j_C[away[0]])} & {1, 2}
    size_C = np.abs(found.change("total", "product"))
    assert size_C[away].tolist() == sorted(size_C[away], reverse=True)
    by_strength = np.abs(found.change())[found.most(1000, by="strength")]
    assert by_strength.tolist() == sorted(by_strength, reverse=True)


def test_all_is_told():
    ones, chunks = planted()
    found = compared(ones, chunks)
    columns = found.columns()
    assert {len(column) for column in columns.values()} == {len(found)}
    np.testing.assert_allclose(columns["strength_bb"] - columns["strength_aa"], columns["total"])
    assert set(columns["site_a"]) == {A}
    assert set(columns["site_b"]) == {B}
    told = json.loads(json.dumps(found.plain(3), allow_nan=False))
    assert told["triplets"] == len(found)
    assert told["places"][B]["triplets"] == len(found)
    assert told["weights_share"] == 1.0
    most = told["most_unchanged"][0]
    assert {most["i"], most["j"]} & {1, 2}
    assert most["changed"] == []
    assert most["total"] == pytest.approx(most["strength"][1] - most["strength"][0])
    assert most["total_ci"][0] < most["total"] < most["total_ci"][1]
    assert {3, 5} & set(told["most_near_changed"][0]["changed"])


def test_fewer_meetings_are_the_same_ones_in_every_corner():
    ones, chunks = planted()
    plan = ChangePlan(contexts=ContextPlan(groups=3, meetings=6))
    found = compared(ones, chunks, plan=plan)
    assert not found.change("code").any()  # other tokens would differ
    exact = compared(ones, chunks)
    assert not np.allclose(found.change(), exact.change())


@pytest.mark.parametrize("same", [True, False])
def test_two_models_are_walked_through_once_or_each_by_itself(same):
    """Of a real pair: one walk for both, and one for each, see the same."""
    base, chat = (replace_name(model_of(family), name) for family, name in
                  (("llama", "base"), ("gated-relu", "chat")))  # fmt: skip
    sites = ("base/resid_mid.1", "chat/resid_mid.1")
    layout = Layout(sites, tuple(base.width("resid_mid.1") for _ in sites))
    policy = TokenPolicy(drop_padding=False)
    models = {"base": base, "chat": chat}
    source = Source(models, layout, blocks(), policy, blocks_per_chunk=1)
    coder = coder_at(layout)
    ones = {s: effective(coder, m, s) for s, m in zip(sites, models.values(), strict=True)}
    walked = []

    def walk():
        walked.append(True)
        return site_chunks(source, coder, base, ones)

    table = measure_pairs(walk, PairPlan(contexts=CONTEXTS)).triplets
    walked.clear()
    walks = (walk, walk if same else lambda: walk())
    first, second = ({site: ones[site]} for site in sites)
    found = changes(table, table, first, second, walks, PLAN)
    assert len(walked) == (1 if same else 2)
    for at, corner in ((0, 0), (1, 3)):
        mine_C = table.site_C == at
        np.testing.assert_allclose(found.strength_KC[corner], table.strength_C[mine_C], rtol=1e-4)
        np.testing.assert_allclose(found.frequency_XC[at], table.frequency_C[mine_C])
    assert np.abs(found.change("weights")).min() > 0
    assert np.abs(found.change("code")).max() > 0


def replace_name(model, name: str):
    return type(model)(name, model.spec, model.module, model.tokenizer, model.anatomy)


def test_what_cannot_be_compared_is_one_sentence():
    ones, chunks = planted()
    one, other = ones
    tables = table_at(chunks, A), table_at(chunks, B)

    def walk():
        return chunks

    def refused(match: str, first, second, walks=(walk, walk)):
        with pytest.raises(UsageError, match=match):
            changes(*tables, first, second, walks, PLAN)

    refused("1 sites are compared with 2", {A: one}, {B: other, "chat/mlp_in.1": other})
    wider = replace(other, decoder_LD=torch.zeros(L, 9), bias_D=torch.zeros(9))
    refused("is 4 wide and chat/mlp_in.0 9: models of different widths", {A: one}, {B: wider})
    more = replace(other, decoder_LD=torch.zeros(L + 1, 4))
    refused("8 latents are compared with 9", {A: one}, {B: more})
    bare = [{A: by_site[A]} for by_site in chunks]
    refused("were not read at chat/mlp_in.0; they were at base", {A: one}, {B: other},
            (lambda: bare, lambda: bare))  # fmt: skip
    fewer = chunks[:1]
    refused("changes need the same tokens", {A: one}, {B: other}, (lambda: fewer, lambda: fewer))
    with pytest.raises(UsageError, match=r"between 0 and 0\.5; found 0\.95 and 0\.7"):
        ChangePlan(norm=0.7)
    with pytest.raises(UsageError, match="at least 2 groups of documents, 2 meetings"):
        ChangePlan(contexts=ContextPlan(groups=1))

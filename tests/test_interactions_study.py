"""The whole study: it holds what its parts give, for any coder and model, or says what it lacks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch

from crosslens.coder import JumpReLU, TopK
from crosslens.diffing.tables import load_table
from crosslens.errors import CrosslensError, UsageError
from crosslens.interactions import PARTS, InteractPlan, interact, parse_parts
from crosslens.interactions.effects.measure import EffectPlan
from crosslens.interactions.neurons.contributions import effective, site_chunks
from crosslens.interactions.neurons.exact import interactions
from crosslens.interactions.pairs.contexts import ContextPlan
from crosslens.interactions.pairs.measure import PairPlan, measure_pairs
from crosslens.interactions.study.measure import Interactions
from crosslens.interactions.study.sites import chosen_models, chosen_sites
from crosslens.interactions.study.tables import plain, save, tables
from crosslens.interactions.study.triplets import halves_of, triplets_at
from crosslens.interactions.study.walk import STAGES, Walks
from tests.interaction_sites import coder_at, model_of, source_at
from tests.test_lm_families import tiny

SITES = ("resid_mid.0", "resid_mid.1", "mlp_out.1")
PAIRS = PairPlan(contexts=ContextPlan(groups=2))


def plan(**changed) -> InteractPlan:
    return InteractPlan(**{"parts": ("mlp",), "pairs": PAIRS, "top": 5} | changed)


@cache
def studied(name: str = "llama") -> Interactions:
    model = model_of(name)
    sites = SITES if name == "llama" else ("resid_mid.1",)
    source = source_at(model, *sites, per_chunk=1)
    return interact(source, coder_at(source.layout), plan())


def test_it_is_the_exact_interactions_and_the_pairs():
    model = model_of("llama")
    source = source_at(model, *SITES, per_chunk=1)
    coder, found = coder_at(source.layout), studied()
    alone = interactions(source, coder, model)
    assert list(found.sites) == ["resid_mid.0", "resid_mid.1"] == list(alone)
    for site, each in alone.items():
        torch.testing.assert_close(found.sites[site].interaction_N, each.interaction_N)
        assert found.sites[site].tokens == found.tokens == 18
    effectives = {site: effective(coder, model, site) for site in alone}
    pairs = measure_pairs(partial(site_chunks, source, coder, model, effectives), PAIRS)
    assert found.pairs is not None
    np.testing.assert_allclose(found.pairs.triplets.strength_C, pairs.triplets.strength_C)
    assert plain(found)["pairs"]["measured"] == pairs.measured


@pytest.mark.parametrize("name", ["gpt2", "relu2", "gated-relu"])
def test_any_supported_model(name):
    told = plain(studied(name))
    assert list(told["sites"]) == ["resid_mid.1"]
    assert 0 < told["sites"]["resid_mid.1"]["interaction_share"] <= 1.2
    assert sum(told["sites"]["resid_mid.1"]["by_kind"].values()) == pytest.approx(1)


def test_strengths_are_means_over_the_tokens_where_a_latent_is_active():
    model = model_of("llama")
    source = source_at(model, "resid_mid.1", per_chunk=1)
    coder = coder_at(source.layout)
    effectives = {"resid_mid.1": effective(coder, model, "resid_mid.1")}
    walks, said = Walks(source, coder, model, effectives, lambda *told: said.append(told[:3])), []
    sums: dict[int, list[float]] = {}
    for chunks in walks():
        chunk = chunks["resid_mid.1"]
        for latent, weight in zip(
            chunk.lists.index_N.tolist(), chunk.weight_E.tolist(), strict=True
        ):
            sums.setdefault(latent, []).append(weight)
    expected = [sum(sums[i]) / len(sums[i]) if i in sums else 0.0 for i in range(24)]
    list(walks())  # a second walk adds nothing
    assert walks.strengths()["resid_mid.1"].tolist() == pytest.approx(expected, rel=1e-5)
    first, second = STAGES[:2]
    assert said == [(first, 1, 2), (first, 2, 2), (second, 1, 2), (second, 2, 2)]


def test_json_is_finite_and_of_the_documented_shape():
    told = plain(studied())
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    for each in told["sites"].values():
        assert {"interaction_share", "by_kind", "norm_mediated_share", "error_share"} <= set(each)
    assert set(told["pairs"]["coverage"]) == {"10", "100", "1000"}
    assert len(told["pairs"]["top"]) == 5
    for each in told["pairs"]["top"]:
        assert {"i", "j", "site", "strength", "frequency", "sign", "ci"} <= set(each)
    products = [each["strength"] * each["frequency"] for each in told["pairs"]["top"]]
    assert products == sorted(products, reverse=True)
    assert told["prediction"] == told["attention"] == {}


def test_tables_hold_every_neuron_document_and_triplet():
    found = studied()
    named = tables(found)
    assert set(named) == {"neurons", "documents", "pairs"}
    neurons = named["neurons"]
    assert len(neurons["site"]) == sum(len(each.mass_N) for each in found.sites.values())
    second = neurons["site"] == "resid_mid.1"
    share = neurons["interaction"][second].sum() / neurons["mass"][second].sum()
    assert share == pytest.approx(found.sites["resid_mid.1"].interaction_share)
    assert named["documents"]["document"].tolist() == ["a", "b"] * 2
    assert found.pairs is not None
    assert {len(column) for column in named["pairs"].values()} == {len(found.pairs.triplets)}


def test_a_study_is_saved_as_a_whole(tmp_path):
    folder = tmp_path / "interact"
    folder.mkdir()
    (folder / "effects.parquet").write_text("of an earlier study")
    told = save(studied(), folder, "c0de")
    assert json.loads((folder / "interact.json").read_text()) == told
    names = {"neurons", "documents", "pairs"}
    files = {f"{name}.{end}" for name in names for end in ("parquet", "csv")}
    assert {path.name for path in folder.iterdir()} == {"interact.json", *files}
    assert [path.name for path in tmp_path.iterdir()] == ["interact"]
    pairs = load_table(folder / "pairs.parquet")
    first = told["pairs"]["top"][0]
    best = int(np.argmax(pairs["product"]))
    assert (pairs["i"][best], pairs["j"][best]) == (first["i"], first["j"])
    assert pairs["kind"][best] == first["kind"]


def test_an_interval_of_one_document_is_not_known():
    found = studied()
    site = found.sites["resid_mid.1"]
    alone = replace(site, mass_by_document=site.mass_by_document * torch.tensor([1.0, 0.0]))
    told = plain(replace(found, sites={"resid_mid.1": alone}))
    assert told["sites"]["resid_mid.1"]["ci"] == [None, None]
    low, high = plain(found)["sites"]["resid_mid.1"]["ci"]
    assert low <= site.interaction_share <= high
    assert math.isfinite(low)


def test_halves_of_the_documents_are_two_parts_of_the_whole():
    found = studied()
    assert found.pairs is not None
    whole, halves = found.pairs.triplets, halves_of(found.pairs)
    for name in ("count_C", "measured_C"):
        np.testing.assert_array_equal(
            sum(getattr(half, name) for half in halves), getattr(whole, name)
        )
    total_C = sum(np.nan_to_num(half.strength_C) * half.measured_C for half in halves)
    np.testing.assert_allclose(total_C / whole.measured_C, whole.strength_C, rtol=1e-6)
    assert (halves[0].count_C != halves[1].count_C).any()


def test_triplets_of_some_sites_are_those_rows():
    table = studied().triplets
    assert table is not None
    some = triplets_at(table, ("resid_mid.1",))
    mine_C = table.columns()["site"] == "resid_mid.1"
    assert 0 < len(some) == mine_C.sum() < len(table)
    for name, column in table.columns().items():
        np.testing.assert_array_equal(some.columns()[name], column[mine_C])


def test_screens_of_all_sites_are_ranked_together():
    model = model_of("llama")
    source = source_at(model, *SITES)
    found = interact(source, coder_at(source.layout), plan(parts=("mlp", "screen")))
    told = plain(found)["screen"]
    bounds = [each["bound"] for each in told]
    assert bounds == sorted(bounds, reverse=True)
    every = tables(found)["screen"]
    assert bounds[0] == pytest.approx(every["bound"].max())
    assert {each["site"] for each in told} <= {"resid_mid.0", "resid_mid.1"}


def test_what_cannot_be_measured_is_said_and_costs_nothing_else():
    source = source_at(model_of("olmo2"), "resid_post.0")
    coder = coder_at(source.layout)
    rare = EffectPlan(least=1000)
    asked = plan(parts=("mlp", "effects", "attention"), effects=rare)
    told = plain(interact(source, coder, asked))
    assert set(told["left_out"]) == {"effects", "attention"}
    assert "so no effect can be measured" in told["left_out"]["effects"]
    assert "of no kind whose interactions can be told" in told["left_out"]["attention"]
    assert told["pairs"]["top"]
    assert told["effects"] is None
    with pytest.raises(UsageError, match="of no kind whose interactions can be told"):
        interact(source, coder, plan(parts=("attention",)))


# ── what is looked at ──


def test_sites_are_named_by_globs_with_the_model_or_without():
    model = tiny("llama")
    coder = coder_at(source_at(model, *SITES).layout)
    every = {"tiny": ("resid_mid.0", "resid_mid.1")}
    assert chosen_sites(coder, every) == chosen_sites(coder, every, ["resid_mid.*"]) == every
    assert chosen_sites(coder, every, ["*.1"]) == {"tiny": ("resid_mid.1",)}
    for pattern, told in (
        ("resid_mid.7", r"writes resid_mid\.0, resid_mid\.1\. Did you mean"),
        ("mlp_out.1", "'mlp_out.1' names, no MLP reads"),
        ("chat/*", "names no site before an MLP"),
    ):
        with pytest.raises(UsageError, match=told):
            chosen_sites(coder, every, ["resid_mid.0", pattern])


def test_models_are_those_that_the_coder_writes():
    model = tiny("llama")
    coder = coder_at(source_at(model, "resid_mid.1").layout)
    assert chosen_models(coder, {"tiny": model}) == {"tiny": model}
    with pytest.raises(UsageError, match=r"no model 'tni'\. Did you mean tiny\? It has tiny"):
        chosen_models(coder, {"tiny": model}, "tni")


def test_parts_are_names_and_those_they_rest_on():
    assert parse_parts("all") == PARTS
    assert parse_parts("attention") == ("attention",)
    assert parse_parts("effects, screen") == ("mlp", "effects", "screen")
    with pytest.raises(UsageError, match=r"found .effcts.\. Did you mean effects"):
        parse_parts("effcts")
    with pytest.raises(UsageError, match="Nothing is asked for"):
        InteractPlan(parts=parse_parts(""))


@pytest.mark.parametrize("name", ["tokens", "top"])
def test_counts_are_at_least_one(name):
    with pytest.raises(UsageError, match=f"--{name} must be at least 1, found 0"):
        InteractPlan(**{name: 0})


def test_codes_in_which_no_two_latents_meet_are_refused():
    source = source_at(tiny("llama"), "resid_mid.1")
    with pytest.raises(CrosslensError, match="No two latents are active together"):
        interact(source, coder_at(source.layout, TopK(k=1)), plan())


def test_a_coder_that_says_nothing_is_refused():
    source = source_at(tiny("llama"), "resid_mid.1")
    coder = coder_at(source.layout, JumpReLU(initial_threshold=1e6))
    with pytest.raises(CrosslensError, match="No latent is active"):
        interact(source, coder, plan())

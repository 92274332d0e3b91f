"""Ablating pairs of latents against whole passes with hooks, one at a time."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from crosslens.errors import CrosslensError, UsageError
from crosslens.interactions.effects.measure import FIGURES, EffectPlan, effects
from crosslens.interactions.effects.runs import widened
from tests.interaction_sites import LATENTS, coder_at
from tests.interactions_effects_toy import (
    PLAN,
    Loops,
    T,
    case,
    looked_at,
    mean,
    source_of,
    table_of,
)
from tests.test_lm_families import tiny, wrapped

CASES = [
    ("llama", ("resid_post.0", "mlp_in.1")),
    ("llama", ("resid_pre.1",)),
    ("gated-relu", ("mlp_in.1",)),
]


@pytest.mark.parametrize(("name", "sites"), CASES)
def test_figures_are_those_of_single_passes(name, sites):
    model, source, coder, table = case(name, *sites)
    found = effects(source, coder, model, table, PLAN)
    columns, loops = found.columns(), Loops(source, coder, model)
    assert len(columns["i"]) >= 6
    assert (columns["interaction_abs"] > 1e-5).all()
    for c in range(len(columns["i"])):
        site, i, j = str(columns["site"][c]), int(columns["i"][c]), int(columns["j"][c])
        here: list[dict[str, float]] = []
        later: list[dict[str, float]] = []
        documents = set()
        for block in looked_at(loops, i, j, PLAN):
            at = loops.figures(site, i, j, block)
            now, then = loops.positions(i, j, block)
            here += [at[t] for t in now]
            later += [at[t] for t in then]
            documents |= {int(source.blocks.docs_NT[block, t]) for t in now}
        assert columns["tokens"][c] == len(here) > 0
        assert columns["later_tokens"][c] == len(later)
        assert columns["documents"][c] == len(documents)
        for prefix, each in (("", here), ("later_", later)):
            for name in FIGURES if each else ():
                true = mean([x[name] for x in each])
                assert columns[prefix + name][c] == pytest.approx(true, rel=1e-3, abs=2e-6), name


def test_what_is_told_of_a_pair_beside_its_effect():
    model, source, coder, table = case("llama", "resid_post.0", "mlp_in.1")
    found = effects(source, coder, model, table, PLAN)
    columns, loops = found.columns(), Loops(source, coder, model)
    on = {k: {(b, t) for b in range(10) for t in loops.active(k, b)} for k in range(LATENTS)}
    for c in range(len(columns["i"])):
        site, i, j = str(columns["site"][c]), int(columns["i"][c]), int(columns["j"][c])
        at = coder.wiring.write.slice(site)
        d = coder.W_dec[0][:, at].double()
        cosine = float(torch.cosine_similarity(d[i], d[j], dim=0))
        assert columns["decoder_cosine"][c] == pytest.approx(cosine, rel=1e-5, abs=1e-7)
        share = len(on[i] & on[j]) / len(on[i] | on[j])
        assert columns["cooccurrence"][c] == pytest.approx(share)
        sizes = [
            float(loops.part(site, i, b)[t].norm() * loops.part(site, j, b)[t].norm())
            for b, t in on[i] & on[j]
        ]
        assert columns["size_product"][c] == pytest.approx(mean(sizes), rel=1e-4)


def test_intervals_leave_out_one_document_at_a_time():
    model, source, coder, table = case("llama", "resid_post.0", "mlp_in.1")
    found = effects(source, coder, model, table, replace(PLAN, blocks=8, tokens=99))
    columns = found.columns()
    total, count = found.here.total("interaction"), found.here.count_CG
    c = int(columns["documents"].argmax())
    assert columns["documents"][c] >= 3
    inside = count[c] > 0
    sums, counts = total[c, inside].tolist(), count[c, inside].tolist()
    whole = sum(sums) / sum(counts)
    left = [(sum(sums) - s) / (sum(counts) - n) for s, n in zip(sums, counts, strict=True)]
    g = len(sums)
    error = ((g - 1) / g * sum((x - whole) ** 2 for x in left)) ** 0.5
    from scipy.stats import t as student

    reach = error * student.ppf(0.975, g - 1)
    assert columns["interaction"][c] == pytest.approx(whole)
    assert columns["interaction_high"][c] == pytest.approx(whole + reach, rel=1e-3)
    assert columns["interaction_low"][c] == pytest.approx(whole - reach, rel=1e-3, abs=1e-7)


def test_neither_batches_nor_the_other_pairs_matter():
    model, source, coder, table = case("llama", "resid_post.0", "mlp_in.1")
    heard: list[tuple[int, int]] = []
    one, many = (
        effects(source, coder, model, table, replace(PLAN, at_once=n), lambda *x: heard.append(x))
        for n in (1, 50)
    )
    for name, column in one.columns().items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(column, many.columns()[name], rtol=1e-3, atol=2e-6)
        else:
            assert column.tolist() == many.columns()[name].tolist()
    half = len(heard) // 2
    assert heard[:half] == heard[half:] == [(k + 1, half) for k in range(half)]


def test_choice_follows_the_plan_and_the_seed():
    model, source, coder, table = case("llama", "resid_post.0", "mlp_in.1")
    plan = replace(PLAN, pairs=5, blocks=1)
    found = effects(source, coder, model, table, plan).columns()
    for site, n in (("resid_post.0", 3), ("mlp_in.1", 2)):
        at = (found["site"] == site) & (found["kind_of_choice"] == "top")
        number = table.sites.index(site)
        ranked = [c for c in table.ranked("product") if table.site_C[c] == number]
        often = [c for c in ranked if table.count_C[c] >= plan.least][:n]
        assert found["i"][at].tolist() == table.i_C[often].tolist()
        assert found["j"][at].tolist() == table.j_C[often].tolist()
    pairs = [*zip(found["site"], found["i"], found["j"], strict=True)]
    assert len(set(pairs)) == len(pairs)
    assert (found["kind_of_choice"] == "random").sum() == 5
    assert (found["kind_of_choice"] == "cooccurring").sum() == 5
    again = effects(source, coder, model, table, plan).columns()
    assert all(found[name].tolist() == again[name].tolist() for name in ("site", "i", "j"))
    other = effects(source, coder, model, table, replace(plan, seed=1)).columns()
    assert [*zip(other["site"], other["i"], other["j"], strict=True)] != pairs


def test_blocks_are_spread_over_the_source():
    from crosslens.interactions.effects.measure import _spread

    source = source_of(tiny("llama"), "resid_post.0")
    few = _spread(source, 3 * T).blocks
    assert torch.equal(few.tokens_NT, source.blocks.tokens_NT[[0, 3, 6]])
    assert torch.equal(few.docs_NT, source.blocks.docs_NT[[0, 3, 6]])
    assert len(_spread(source, 10**6).blocks.tokens_NT) == 10
    assert len(_spread(source, 1).blocks.tokens_NT) == 1


def test_others_are_matched_in_how_often_they_meet():
    """Counts of 1 to 200: the top pairs meet often, so random ones do not and matched ones do."""
    from crosslens.interactions.effects.choice import _at_site, _Pool

    keys = np.arange(400)
    pool = _Pool(keys, keys // 2 + 1)
    ranked = np.array([398, 396, 999, 394, 392, 390, 388, 386, 384, 382])
    found = _at_site(ranked, pool, 8, np.random.default_rng(0))
    assert found["top"].tolist() == [398, 396, 394, 392, 390, 388, 386, 384]
    assert not set(found["cooccurring"]) & (set(found["top"]) | set(found["random"]))
    count = {kind: pool.count_U[key].mean() for kind, key in found.items()}
    assert abs(count["cooccurring"] - count["top"]) < 12
    assert count["random"] < 160
    few = _at_site(ranked, _Pool(keys[-3:], keys[-3:]), 8, np.random.default_rng(0))
    assert few["top"].tolist() == [398]
    assert len(few["cooccurring"]) == 1


def test_others_get_the_tables_own_measures():
    """What is measured of a pair that the table lacks is what a larger table would have held."""
    model, source, coder, _ = case("llama", "resid_post.0", "mlp_in.1")
    small = table_of(source, coder, model, candidates=4)
    large = table_of(source, coder, model, candidates=400)
    found = effects(source, coder, model, small, PLAN)
    others = found.others
    assert others is not None
    assert len(others) >= 3
    columns = large.columns()
    for c, (site, i, j) in enumerate(
        zip(others.columns()["site"], others.i_C, others.j_C, strict=True)
    ):
        (row,) = ((columns["site"] == site) & (large.i_C == i) & (large.j_C == j)).nonzero()[0]
        for name in ("strength", "frequency", "shared", "coupling", "hadamard", "bias_size"):
            assert others.columns()[name][c] == pytest.approx(columns[name][row], rel=1e-4), name


def test_a_short_model_is_measured_in_float32_and_left_as_it_was():
    narrow = wrapped(copy.deepcopy(tiny("llama").module).to(torch.bfloat16))
    wide = wrapped(copy.deepcopy(narrow.module).float())
    before = {name: x.clone() for name, x in narrow.module.state_dict().items()}
    with widened(narrow):
        assert {x.dtype for x in narrow.module.state_dict().values()} == {torch.float32}
    with pytest.raises(RuntimeError), widened(narrow):
        raise RuntimeError
    found = {}
    for name, model in (("narrow", narrow), ("wide", wide)):
        source = source_of(model, "resid_post.0")
        coder = coder_at(source.layout)
        with widened(model):
            table = table_of(source, coder, model)
        found[name] = effects(source, coder, model, table, PLAN).columns()
    after = narrow.module.state_dict()
    assert all(x.dtype == torch.bfloat16 for x in after.values())
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    for name in ("i", "j", *FIGURES):
        np.testing.assert_array_equal(found["narrow"][name], found["wide"][name])


def test_what_is_told_is_json():
    model, source, coder, table = case("llama", "resid_post.0", "mlp_in.1")
    found = effects(source, coder, model, table, replace(PLAN, pairs=12))
    plain = json.loads(json.dumps(found.plain(top=3), allow_nan=False))
    assert plain["pairs"]["top"] == (found.chosen.kind_C == "top").sum()
    columns = found.columns()
    assert {len(column) for column in columns.values()} == {len(found.chosen)}
    assert plain["predictions"] == columns["tokens"].sum()
    largest = [each["interaction_abs"] for each in plain["largest"]]
    assert largest == sorted(columns["interaction_abs"].tolist(), reverse=True)[:3]
    of_top = columns["interaction_abs"][columns["kind_of_choice"] == "top"]
    of_random = columns["interaction_abs"][columns["kind_of_choice"] == "random"]
    sizes = plain["sizes"]["interaction_abs"]["top"]
    assert sizes["mean"] == pytest.approx(of_top.mean())
    assert sizes["ratio"] == pytest.approx(of_top.mean() / of_random.mean())
    assert sizes["ci"][0] < sizes["mean"] < sizes["ci"][1]
    assert sizes["ratio_ci"][0] < sizes["ratio"] < sizes["ratio_ci"][1]
    assert plain["sizes"]["interaction_abs"]["random"]["ratio"] == 1.0
    assert -1 <= plain["reliability"]["interaction_abs"] <= 1


def test_what_cannot_be_measured_is_refused():
    model, source, coder, table = case("llama", "resid_post.0", "mlp_in.1")
    nothing = {name: x[:0] for name, x in vars(table).items() if isinstance(x, np.ndarray)}
    with pytest.raises(UsageError, match="holds no pairs"):
        effects(source, coder, model, replace(table, **nothing, measures={}), PLAN)
    with pytest.raises(UsageError, match=r"cannot be told at 'resid_mid\.7'"):
        effects(source, coder, model, replace(table, sites=("resid_mid.7", "mlp_in.1")), PLAN)
    with pytest.raises(CrosslensError, match="meets on 5000 of the 127 tokens looked at"):
        effects(source, coder, model, table, replace(PLAN, least=5000))
    with pytest.raises(UsageError, match="as they are"):
        effects(source, coder, tiny("mistral"), table, PLAN)
    with pytest.raises(UsageError, match="at least 1 pair"):
        EffectPlan(pairs=0)

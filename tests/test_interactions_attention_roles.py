"""Key sets, query sets and paths against loops; and what attention cannot be told of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations

import pytest
import torch

from crosslens.activations import TokenPolicy
from crosslens.coder import Coder, Difference, Layout, ReLU
from crosslens.errors import CrosslensError, UsageError
from crosslens.interactions.attention.measure import AttentionPlan, attention, attention_sites
from crosslens.interactions.attention.roles import (
    chance_jaccard,
    key_overlap,
    paths,
    query_overlap,
    written_after,
)
from crosslens.interactions.attention.scores import (
    HEAD_SUMS,
    ratio_interval,
    variation,
    variation_bound,
)
from crosslens.interactions.attention.usage import Usage
from crosslens.interactions.attention.view import heads_view
from crosslens.interactions.intervals import mean_interval
from crosslens.text.blocks import Other
from tests.attention_loops import CASES, PLAN, loops, source_of, turn
from tests.interaction_sites import coder_at
from tests.test_interactions_attention import measured, truth
from tests.test_lm_families import WIDTH, tiny

FEW = replace(PLAN, latents=6, set_size=5)
HEAD = 2
every_case = pytest.mark.parametrize("name", ["mistral", "gpt2"])


def usage_of(name: str) -> Usage:
    return measured(name, True).sums[CASES[name]].usage


@cache
def centred_key(name: str, j: int) -> torch.Tensor:
    """w̄_j K_j − k̂, k̂ the mean over entries, by loops."""
    view, known = usage_of(name).view, truth(name, True)
    typical = {k: known.weight[k] / n for k, n in known.entries.items() if n}
    keys = {k: typical[k] * view.key_LJA[k, view.group(HEAD)].double() for k in typical}
    whole = sum(known.entries.values())
    return keys[j] - sum(known.entries[k] / whole * key for k, key in keys.items())


@cache
def mean_query(name: str, i: int) -> torch.Tensor:
    """w̄_i R(distance) Q_i, mean over distances, by loops."""
    view, known = usage_of(name).view, truth(name, True)
    query = known.weight[i] / known.entries[i] * view.query_LHA[i, HEAD].double()
    return sum(turn(query, view, d) for d in known.distances) / len(known.distances)


def mean_score(name: str, i: int, j: int) -> float:
    """scale · ⟨mean query of i, centred key of j⟩."""
    return usage_of(name).view.heads.scale * float(mean_query(name, i) @ centred_key(name, j))


def active(name: str) -> list[int]:
    return [k for k, n in sorted(truth(name, True).entries.items()) if n]


def check_overlap(name: str, found, use_L, score: Callable[[int, int], float]) -> None:
    others = active(name)
    order = sorted(range(len(use_L)), key=lambda k: -float(use_L[k]))[: FEW.latents]
    assert found.latent_X.tolist() == order
    rows = {x: {y: score(x, y) for y in others} for x in order}
    sets = {
        x: {y for y in sorted(others, key=lambda y: -row[y])[: FEW.set_size] if row[y] > 0}
        for x, row in rows.items()
    }
    weight = truth(name, True).entries
    for a, b in combinations(range(len(order)), 2):
        one, other = sets[order[a]], sets[order[b]]
        jaccard = len(one & other) / max(1, len(one | other))
        assert float(found.jaccard_XX[a, b]) == pytest.approx(jaccard)
        left, right = rows[order[a]], rows[order[b]]
        product = sum(weight[y] * left[y] * right[y] for y in others)
        sizes = [sum(weight[y] * row[y] ** 2 for y in others) ** 0.5 for row in (left, right)]
        cosine = product / (sizes[0] * sizes[1])
        assert float(found.cosine_XX[a, b]) == pytest.approx(cosine, abs=1e-4)
    told = found.plain(3)
    best = sorted((float(x) for x in found.jaccard_XX[*torch.triu_indices(6, 6, 1)]), reverse=True)
    assert [pair["jaccard"] for pair in told["top"]] == pytest.approx(best[:3])
    assert told["mean"] == pytest.approx(sum(best) / len(best))
    assert told["chance"] == pytest.approx(chance_jaccard(FEW.set_size, len(others)))


@every_case
def test_key_sets_of_queries_are_the_loop(name):
    usage = usage_of(name)
    found = query_overlap(usage, HEAD, FEW)
    check_overlap(name, found, usage.query_HL[HEAD], lambda i, j: mean_score(name, i, j))


@every_case
def test_query_sets_of_keys_are_the_loop(name):
    usage = usage_of(name)
    found = key_overlap(usage, HEAD, FEW)
    check_overlap(name, found, usage.key_HL[HEAD], lambda j, i: mean_score(name, i, j))


def test_chance_is_that_of_all_pairs_of_sets():
    sets = [set(each) for each in combinations(range(6), 3)]
    indices = [len(a & b) / len(a | b) for a in sets for b in sets]
    assert chance_jaccard(3, 6) == pytest.approx(sum(indices) / len(indices))
    assert chance_jaccard(0, 6) == 0
    assert chance_jaccard(6, 6) == 1


@pytest.mark.parametrize("name", ["llama", "neox-parallel"])
def test_paths_are_the_loop(name):
    """Every latent of the keys into every latent of the next site."""
    model, plan = tiny(name), replace(PLAN, latents=24, top=24 * 24)
    source = source_of(model, "resid_pre.1", "resid_pre.2")
    coder = coder_at(source.layout)
    usage = attention(source, coder, model, PLAN).sums["resid_pre.1"].usage
    written = written_after(coder, model, usage.view)
    assert written is not None
    assert written.site == "resid_pre.2"
    norm, heads = usage.view.norm, usage.view.heads
    j = usage.view.group(HEAD)
    decoder = coder.W_dec[0].double() / coder.scale_write.double().repeat_interleave(WIDTH)
    expected = {}
    for k in range(24):
        x = decoder[k, :WIDTH]
        x = (x - x.mean() if norm.kind == "layer" else x) * norm.gain_D.double()
        out = heads.W_O_HDV[HEAD].double() @ (heads.W_V_JVD[j].double() @ x)
        for to in range(24):
            other = decoder[to, WIDTH:]
            cosine = float(out @ other / out.norm() / other.norm())
            strength = float(usage.carried_HL[HEAD, k]) * float(out @ other / other.norm())
            if usage.carried_HL[HEAD, k] > 0:
                expected[k, to] = (strength, cosine)
    found = paths(usage, HEAD, written, plan)
    assert {(each["key"], each["to"]) for each in found} == set(expected)
    for each in found:
        strength, cosine = expected[each["key"], each["to"]]
        assert each["strength"] == pytest.approx(strength, rel=1e-3, abs=1e-6)
        assert each["cosine"] == pytest.approx(cosine, rel=1e-3, abs=1e-5)
    sizes = [abs(each["strength"]) for each in found]
    assert sizes == sorted(sizes, reverse=True)


def test_queries_without_latents_and_pairs_that_never_meet():
    """A coder that is silent on most tokens."""
    model, site = tiny("llama"), CASES["llama"]
    source = source_of(model, site)
    coder = coder_at(source.layout, ReLU())
    rows = torch.cat([source.chunk(i).rows() for i in range(2)])
    pre = (rows * coder.scale_read @ coder.W_enc[0][0]).sort().values
    coder.b_enc.fill_(-1e6)
    coder.b_enc[0] = -float(pre[-4:-2].mean())
    found = attention(source, coder, model, PLAN).sums[site]
    counted = torch.ones(2, 9, dtype=torch.bool)
    expected = loops(model, coder, heads_view(coder, model, site), counted)
    assert sum(expected.entries.values()) == 3
    for measure in HEAD_SUMS:
        looped_H = torch.tensor([expected.head[measure, h] for h in range(4)])
        found_H = found.total(measure).sum(1).float()
        torch.testing.assert_close(found_H, looped_H, rtol=1e-3, atol=1e-3)
    assert {(int(k) // 24, int(k) % 24) for k in found.key_P} == {
        (i, j) for i, j, _ in expected.met
    }


def test_ratios_of_counts_are_means():
    generator = torch.Generator().manual_seed(0)
    count = torch.randint(0, 3, (20, 5), generator=generator)
    total = torch.rand(20, 5, generator=generator, dtype=torch.float64) * count
    for found, expected in zip(
        ratio_interval(total, count.double()), mean_interval(total, count), strict=True
    ):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_the_bound_is_reached_and_never_passed():
    """By two keys whose odds are √t : 1 and then 1 : √t."""
    score = torch.tensor([1.5, -1.5], dtype=torch.float64)
    assert float(variation_bound(2 * score)) == pytest.approx(float(variation(score, -score)))
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 500, 6, generator=generator) * 3
    assert bool((variation(first, second) <= variation_bound(first - second) + 1e-6).all())


def test_coders_that_write_nothing_before_attention_are_refused():
    model = tiny("llama")
    for site in ("attn_out.1", "resid_post.2", "mlp_in.1", "embed"):
        coder = coder_at(source_of(model, site).layout)
        with pytest.raises(UsageError, match=f"writes {site}: neither an attention's input"):
            attention_sites(coder, model)
    layout = Layout(("tiny/resid_mid.1", "chat/resid_mid.1"), (WIDTH, WIDTH))
    with pytest.raises(UsageError, match="difference of two models"):
        attention_sites(Coder(Difference()(layout, 8), ReLU()), model)
    with pytest.raises(UsageError, match="no site of 'tiny'"):
        attention_sites(coder_at(Layout(("chat/resid_mid.1",), (WIDTH,))), model)


def test_models_that_are_of_no_supported_kind_are_refused():
    model = tiny("gemma2")
    source = source_of(model, "resid_pre.1")
    with pytest.raises(UsageError, match=r"attention of layer 1 of 'tiny' \(Gemma2Attention\)"):
        attention(source, coder_at(source.layout), model)
    coder = coder_at(Layout(("resid_pre.1",), (WIDTH + 1,)))
    with pytest.raises(UsageError, match="33 wide in this coder and 32 in 'tiny'"):
        heads_view(coder, tiny("llama"), "resid_pre.1")


def test_sources_of_something_else_are_refused():
    model = tiny("llama")
    source = source_of(model, "resid_pre.1")
    coder = coder_at(source.layout)
    with pytest.raises(UsageError, match="does not give the activations of 'tiny'"):
        attention(replace(source, models={"tiny": tiny("qwen2")}), coder, model)
    with pytest.raises(UsageError, match="are not the source's"):
        attention(source_of(model, "resid_pre.2"), coder, model)
    blocks = source.blocks
    other = Other(
        tokens_NS=blocks.tokens_NT,
        docs_NS=blocks.docs_NT,
        place_NT=torch.arange(9, dtype=torch.int32).expand(2, 9),
        open_N=torch.zeros(2, dtype=torch.int32),
        bos_id=None,
        pad_id=0,
        special_ids=(0,),
    )
    paired = replace(blocks, others={"chat": other})
    with pytest.raises(UsageError, match="tokens of two tokenizers"):
        attention(replace(source, blocks=paired), coder, model)


def test_nothing_to_look_at_is_told():
    model = tiny("llama")
    source = source_of(model, "resid_pre.1")
    coder = coder_at(source.layout)
    every = tuple(range(97))
    blocks = replace(source.blocks, special_ids=every)
    policy = TokenPolicy(drop_padding=False, drop_special=True)
    with pytest.raises(CrosslensError, match="keeps no token"):
        attention(replace(source, blocks=blocks, policy=policy), coder, model)
    lonely = replace(source.blocks, special_ids=tuple(set(every) - {int(blocks.tokens_NT[0, 4])}))
    with pytest.raises(CrosslensError, match="nothing to attend to"):
        attention(replace(source, blocks=lonely, policy=policy), coder, model)
    coder.b_enc.fill_(-1e6)
    with pytest.raises(CrosslensError, match="No latent is active"):
        attention(source, coder, model)
    coder.W_enc[0][0, 0] = torch.nan
    with pytest.raises(CrosslensError, match="NaN"):
        attention(source, coder, model)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"queries": 0}, "at least 1"), ({"groups": 1}, "2 groups"), ({"most_keys": 3}, "most-keys")],
)
def test_plans_that_make_no_sense_are_refused(settings, why):
    with pytest.raises(UsageError, match=why):
        AttentionPlan(**settings)


def test_blocks_are_taken_evenly():
    model, site = tiny("llama"), "resid_pre.1"
    source = source_of(model, site)
    blocks = source.blocks
    many = replace(source, blocks=blocks.followed_by(blocks).followed_by(blocks.some(slice(0, 1))))
    coder = coder_at(source.layout)
    heard: list[int] = []
    plan = replace(PLAN, blocks=2)
    found = attention(many, coder, model, plan, lambda *each: heard.append(each[2]))
    assert heard == [2] * 4  # blocks 0 and 2 of 5, twice: both the first block
    alone = attention(replace(source, blocks=blocks.some(slice(0, 1))), coder, model, plan)
    twice = {name: sums.total("variance").sum() for name, sums in found.sums.items()}
    once = alone.sums[site].total("variance").sum()
    assert float(twice[site]) == pytest.approx(2 * float(once), rel=1e-5)

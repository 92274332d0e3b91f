"""Attention's interactions against loops over queries, keys, heads and pairs of parts."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from crosslens.interactions.attention.measure import Attention, AttentionPlan, attention
from crosslens.interactions.attention.query import Query, drawn
from crosslens.interactions.attention.scores import HEAD_SUMS, ORIGINS, PAIR_SUMS
from crosslens.interactions.attention.tokens import Tokens, text_blocks
from crosslens.interactions.attention.view import attention_sites, heads_view
from crosslens.interactions.pairs.kinds import HEAD_KINDS
from tests.attention_loops import CASES, PLAN, Truth, loops, source_of
from tests.interaction_sites import coder_at
from tests.test_interactions_exact import smollm2
from tests.test_lm_attention import own_weights
from tests.test_lm_families import tiny, tokens

every_case = pytest.mark.parametrize("name", CASES)
some_left_out = pytest.mark.parametrize(
    ("name", "special"), [*((name, False) for name in CASES), ("mistral", True), ("gpt2", True)]
)


def close(found: torch.Tensor, expected: torch.Tensor, rel: float = 1e-4) -> None:
    """Relative to the scale."""
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=rel * float(expected.abs().max())
    )


@cache
def blocks_of(name: str, special: bool = False) -> list[Tokens]:
    model, site = tiny(name), CASES[name]
    source = source_of(model, site, special=special)
    coder = coder_at(source.layout)
    views = {site: heads_view(coder, model, site)}
    return [block[site] for block in text_blocks(source, coder, model, views, PLAN)]


@cache
def truth(name: str, special: bool = False) -> Truth:
    model, site = tiny(name), CASES[name]
    source = source_of(model, site, special=special)
    coder = coder_at(source.layout)
    counted = torch.stack([tokens.counted_R for tokens in blocks_of(name, special)])
    return loops(model, coder, heads_view(coder, model, site), counted)


@cache
def measured(name: str, special: bool = False) -> Attention:
    model, site = tiny(name), CASES[name]
    source = source_of(model, site, special=special)
    return attention(source, coder_at(source.layout), model, PLAN)


def queries(name: str, special: bool = False) -> list[Query]:
    return [query for tokens in blocks_of(name, special) for query in drawn(tokens, 9, 0)]


def summed(query: Query) -> torch.Tensor:
    """Latents with latents pair by pair, and all other products of parts [H, N]."""
    origin_33HN, pairs_EHK = query.by_origin_33HN(), query.pairs_EHK()
    latents_NH = torch.zeros(len(query.counted_N), pairs_EHK.shape[1])
    latents_NH.index_add_(0, query.key_E, pairs_EHK.sum(2))
    close(latents_NH.T, origin_33HN[0, 0])
    return latents_NH.T + origin_33HN.flatten(0, 1)[1:].sum(0)


def check_sum(query: Query, own_BHTT: torch.Tensor) -> None:
    """It is the logarithm of the model's own attention weights but for a constant."""
    whole_HN = summed(query)
    expected_HN = own_BHTT[query.tokens.number, :, query.row, query.keys]
    close(query.weights_HN, expected_HN, rel=2e-5)
    logs_HN = expected_HN.log()
    close(whole_HN - whole_HN[:, :1], logs_HN - logs_HN[:, :1])


@some_left_out
def test_all_pairs_of_parts_sum_to_the_models_own_scores(name, special):
    for query in queries(name, special):
        check_sum(query, own_weights(name)[1])
        for h, score_N in enumerate(summed(query)):
            looped = truth(name, special).scores[query.tokens.number, query.row, h]
            close(score_N, torch.tensor(list(looped.values())))


def test_all_pairs_of_parts_sum_to_scores_of_the_built_in_model():
    model = smollm2()
    source = source_of(model, "resid_post.5", "resid_mid.20")
    coder = coder_at(source.layout)
    views = {site: heads_view(coder, model, site) for site in source.layout.sites}
    blocks = list(text_blocks(source, coder, model, views, PLAN))
    model.module.set_attn_implementation("eager")
    own = model.module(input_ids=tokens().long(), output_attentions=True).attentions
    for site, layer in zip(views, (6, 21), strict=True):
        for query in drawn(blocks[1][site], 4, 0):
            check_sum(query, own[layer].detach())


@every_case
def test_each_pair_is_that_of_the_loop_by_relative_distance(name):
    view = blocks_of(name)[0].view
    for query in queries(name)[3::5]:
        pairs_EHK = query.pairs_EHK()
        at_E = query.row - query.keys.start - query.key_E
        weight_E = query.tokens.weight_E[query.entries]
        for k, i in enumerate(query.latent_K.tolist()):
            same_E = torch.full_like(query.latent_E, i)
            weight = query.tokens.weight_E[query.own][k]
            per_unit_EH = view.pair_scores(same_E, query.latent_E, at_E)
            close(pairs_EHK[:, :, k], per_unit_EH * (weight_E * weight)[:, None], rel=1e-5)


@some_left_out
def test_every_sum_of_a_head_is_the_loop(name, special):
    found, expected = measured(name, special).sums[CASES[name]], truth(name, special)
    assert int(found.queries_G.sum()) == expected.queries
    assert int(found.keys_G.sum()) == expected.keys
    assert {g: int(n) for g, n in enumerate(found.queries_G) if n} == expected.groups
    for measure in HEAD_SUMS:
        looped_H = torch.tensor([expected.head[measure, h] for h in range(4)])
        scale = float(max(expected.head["variance", h] for h in range(4)))
        torch.testing.assert_close(
            found.total(measure).sum(1).float(), looped_H, rtol=1e-4, atol=1e-5 * scale
        )
    first_HG = found.total("interaction")
    for h in range(4):
        for g in range(2):
            looped = expected.by_group["interaction", h, g]
            assert float(first_HG[h, g]) == pytest.approx(looped, rel=1e-3, abs=1e-5 * scale)


@every_case
def test_parts_sum_to_the_variance_and_bounds_hold(name):
    found = measured(name).sums[CASES[name]]
    variance = found.total("variance")
    content = [found.total(part) for part in ("position", "key", "query", "interaction")]
    close(torch.stack(content).sum(0), variance)
    origin = [found.total(f"{q} × {k}") for q in ORIGINS for k in ORIGINS]
    close(torch.stack(origin).sum(0), variance)
    slack = 1e-5 * found.queries_G
    for which in ("", " of none"):
        bound, moved = found.total(f"bound{which}"), found.total(f"variation{which}")
        assert bool((moved <= bound + slack).all())
        assert bool((moved.sum(1) > 0).all())
    assert bool((found.total("bound").sum(1) <= found.total("bound of none").sum(1) + 1e-5).all())


@some_left_out
def test_every_sum_of_a_pair_is_the_loop(name, special):
    found, expected = measured(name, special).sums[CASES[name]], truth(name, special)
    n_latents = found.usage.view.n_latents
    pairs = [(int(k) // n_latents, int(k) % n_latents) for k in found.key_P]
    assert pairs == sorted({(i, j) for i, j, _ in expected.met})
    assert bool(found.wanted_PH.all())
    looped = torch.zeros(len(pairs), 4, len(PAIR_SUMS), dtype=torch.float64)
    met_P = torch.zeros(len(pairs), dtype=torch.int64)
    back_P = torch.zeros(len(pairs), dtype=torch.float64)
    for p, (i, j) in enumerate(pairs):
        for h in range(4):
            mets = expected.met[i, j, h]
            flows = [sum(m.brought[u] * m.scores[u] for u in m.brought) for m in mets]
            looped[p, h] = torch.tensor(
                [
                    sum(abs(c) for m in mets for c in m.centred.values()),
                    sum(c for m in mets for c in m.centred.values()),
                    sum(a for m in mets for a in m.attention.values()),
                    sum(flows),
                    sum(map(abs, flows)),
                ]
            )
        met_P[p] = sum(len(m.brought) for m in expected.met[i, j, 0])
        back_P[p] = sum(sum(m.back.values()) for m in expected.met[i, j, 0])
    for m in range(len(PAIR_SUMS)):
        close(found.pair_PGHM.sum(1)[..., m], looped[..., m])
    assert torch.equal(found.met_PG.sum(1), met_P)
    assert torch.equal(found.distance_P, back_P)
    by_group = found.pair_PGHM[:, 1, 2, 0]
    one = [
        sum(abs(c) for m in expected.met[i, j, 2] if m.row == 1 for c in m.centred.values())
        for i, j in pairs
    ]
    close(by_group, torch.tensor(one))


@some_left_out
def test_the_first_pass_is_the_loop(name, special):
    usage = measured(name, special).sums[CASES[name]].usage
    expected = truth(name, special)
    for latent in range(usage.view.n_latents):
        assert int(usage.entries_L[latent]) == expected.entries[latent]
        weight = float(usage.weight_L[latent])
        assert weight == pytest.approx(expected.weight[latent], rel=1e-5)
        for h in range(4):
            carried = expected.carried[h, latent] / expected.queries
            assert float(usage.carried_HL[h, latent]) == pytest.approx(carried, rel=1e-4, abs=1e-7)
    flows = {
        key: sum(abs(sum(m.brought[u] * m.scores[u] for u in m.brought)) for m in mets)
        for key, mets in expected.met.items()
    }
    for h in range(4):
        mine = {key: flow for key, flow in flows.items() if key[2] == h}
        assert float(usage.whole_H[h]) == pytest.approx(sum(mine.values()), rel=1e-4)
        for side, sums_HL in enumerate((usage.query_HL, usage.key_HL)):
            for latent in range(0, usage.view.n_latents, 5):
                looped = sum(flow for key, flow in mine.items() if key[side] == latent)
                assert float(sums_HL[h, latent]) == pytest.approx(looped, rel=1e-3, abs=1e-6)
    turns = usage.view.heads.rotation(torch.tensor(expected.distances))
    if name != "gpt2":
        close(usage.turn_2F, torch.stack(turns).mean(1), rel=1e-5)


def test_fewer_candidates_are_those_with_most_flow():
    name, site = "llama", CASES["llama"]
    model = tiny(name)
    source = source_of(model, site)
    plan = AttentionPlan(queries=9, candidates=5, groups=2)
    few = attention(source, coder_at(source.layout), model, plan)
    everything = measured(name).sums[site]
    flow_PH = everything.pair_PGHM[..., PAIR_SUMS.index("flow")].sum(1)
    for h in range(4):
        best = set(everything.key_P[flow_PH[:, h].topk(5).indices].tolist())
        mine = few.sums[site].wanted_PH[:, h]
        assert set(few.sums[site].key_P[mine].tolist()) == best
        covered = few.plain()[f"L1.H{h}"]["coverage"]
        whole = float(flow_PH[:, h].sum())
        assert covered == pytest.approx(float(flow_PH[:, h].topk(5).values.sum()) / whole, rel=1e-4)


@every_case
def test_plain_is_json_and_tells_the_sums(name):
    found, expected = measured(name), truth(name)
    told = found.plain()
    assert json.loads(json.dumps(told)) == told
    assert list(told) == [f"L1.H{h}" for h in range(4)]
    for h, head in enumerate(told.values()):
        variance = expected.head["variance", h]
        share = expected.head["between", h] / variance
        assert head["interaction_share"] == pytest.approx(share, rel=1e-3)
        low, high = head["interaction_ci"]
        assert low <= head["interaction_share"] <= high
        assert sum(head["content"].values()) == pytest.approx(1, abs=1e-3)
        assert sum(head["origin"].values()) + head["error_share"] == pytest.approx(1, abs=1e-3)
        assert head["coverage"] == pytest.approx(1, rel=1e-4)
        assert head["dominance"]["variation"] <= head["dominance"]["bound"]
        assert head["elsewhere"] == pytest.approx(0, abs=1e-6)
        assert head["queries"] == expected.queries
        products = [pair["strength"] * pair["frequency"] for pair in head["pairs"]]
        assert products == sorted(products, reverse=True)
        assert len(products) == 10


def test_columns_are_of_one_length_and_saved(tmp_path):
    import pyarrow.parquet

    found, expected = measured("llama"), truth("llama")
    columns = found.columns()
    assert {len(column) for column in columns.values()} == {len(expected.met)}
    c = 7
    i, j, h = (int(columns[name][c]) for name in ("query", "key", "head"))
    mets = expected.met[i, j, h]
    n = sum(len(m.brought) for m in mets)
    size = sum(abs(x) for m in mets for x in m.centred.values())
    assert (columns["site"][c], columns["layer"][c]) == (CASES["llama"], 1)
    assert columns["meetings"][c] == n
    assert columns["strength"][c] == pytest.approx(size / n, rel=1e-4)
    assert columns["frequency"][c] == pytest.approx(n / expected.keys)
    assert columns["product"][c] == pytest.approx(size / expected.keys, rel=1e-4)
    shared = sum(m.brought[u] * m.scores[u] for m in mets for u in m.brought)
    share = shared / expected.head["variance", h]
    assert columns["share"][c] == pytest.approx(share, rel=1e-3)
    found.save(tmp_path / "pairs.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "pairs.parquet")
    assert table.column_names == list(columns)
    assert table["strength"].to_pylist() == pytest.approx(columns["strength"].tolist(), nan_ok=True)


@every_case
def test_a_heads_kinds_are_shares_of_what_its_pairs_do(name):
    found, expected = measured(name), truth(name)
    columns = found.columns()
    sizes = {(h, kind): 0.0 for h in range(4) for kind in HEAD_KINDS}
    for c, kind in enumerate(columns["kind"]):
        i, j, h = (int(columns[key][c]) for key in ("query", "key", "head"))
        each = [x for met in expected.met[i, j, h] for x in met.centred.values()]
        size = sum(map(abs, each))
        reliable = columns["signed_low"][c] > 0 and sum(each) > size / 2
        assert kind == ("binding" if reliable else "mixed")
        sizes[h, kind] += size
    for h, head in enumerate(found.plain().values()):
        whole = sum(sizes[h, kind] for kind in HEAD_KINDS)
        shares = {kind: sizes[h, kind] / whole for kind in HEAD_KINDS}
        assert head["by_kind"] == pytest.approx(shares, rel=1e-4)
        assert [pair["kind"] for pair in head["pairs"]] == list(
            columns["kind"][columns["head"] == h][:10]
        )
    assert sum(sizes[h, "binding"] for h in range(4)) > 0


def test_the_same_seed_draws_the_same_queries():
    tokens = blocks_of("llama")[0]
    rows = [[query.row for query in drawn(tokens, 3, seed)] for seed in (0, 0, 1, 2)]
    assert rows[0] == rows[1]
    assert len({tuple(each) for each in rows}) > 1
    assert all(len(each) in (2, 3) for each in rows)  # position 0 has no second key


def test_the_closest_site_before_each_attention_is_taken():
    model = tiny("llama")
    layout = source_of(model, "resid_mid.0", "resid_post.0", "attn_in.2", "resid_pre.2").layout
    assert attention_sites(coder_at(layout), model) == ("resid_post.0", "attn_in.2")


def test_several_sites_are_each_alone_given_the_same_codes():
    model = tiny("llama")
    source = source_of(model, "resid_post.0", "resid_pre.2")
    coder = coder_at(source.layout)
    heard: list[tuple[str, int, int]] = []
    told = attention(source, coder, model, PLAN, lambda s, d, n, _: heard.append((s, d, n))).plain()
    assert list(told) == [f"L{layer}.H{h}" for layer in (1, 2) for h in range(4)]
    assert [each[1:] for each in heard] == [(1, 2), (2, 2)] * 2
    assert told["L1.H0"]["ov"]["site"] == "resid_pre.2"
    assert told["L2.H0"]["ov"] is None

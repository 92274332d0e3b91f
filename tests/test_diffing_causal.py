"""Patching and ablating latents, against the models run by hand with activations put in place."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from crosslens.activations import Source, TokenPolicy, site_layout
from crosslens.activations.swapped import exchange_of
from crosslens.coder import Coder, Crosscoder, Layout, ReLU, TopK, fold, transpose_init
from crosslens.diffing.ablation import (
    Removal,
    Trial,
    ablation,
    chosen,
    loss_changes,
    matched_sets,
)
from crosslens.diffing.carried import carried
from crosslens.diffing.causal import (
    CausalPlan,
    by_score,
    causal,
    decoded,
    latents,
    patched_kl,
    without,
)
from crosslens.diffing.pair import Pair, pair_of
from crosslens.diffing.patching import cut, entrance, over_tokens, raw_decoders, read_chunk
from crosslens.diffing.resampling import draws, interval, mean_over
from crosslens.errors import UsageError
from crosslens.lm import ModelSpec, next_token_loss, open_models
from crosslens.organisms.answers import prompt_ids
from crosslens.text.blocks import Other
from crosslens.text.planted import Behaviour, shows
from tests.test_activations import blocks_of

SITES = ("resid_mid.1", "resid_post.2")
SCALES = (0.5, 2.0, 0.25, 3.0)
PLAN = CausalPlan(tokens=10_000, shares=(0.25, 1.0))
TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
ASKED = tuple([{"role": "user", "content": f"Write the function {name}."}] for name in "abcd")


@pytest.fixture(scope="module")
def models(tiny_pair):
    specs = {n: ModelSpec(path=str(f), dtype="float32", device="cpu") for n, f in tiny_pair.items()}
    opened = open_models(specs)
    opened["chat"].tokenizer.chat_template = TEMPLATE
    return opened


def source_of(models, sites=SITES, **policy) -> Source:
    """Six blocks; the last ends in padding, and some positions hold special tokens."""
    blocks = blocks_of(6)
    blocks.tokens_NT[1, 5] = blocks.tokens_NT[3, 9] = 1
    blocks.tokens_NT[5, 12:] = 2
    blocks.docs_NT[5, 12:] = -1
    layout = site_layout(models, sites)
    return Source(models, layout, blocks, TokenPolicy(**policy), blocks_per_chunk=4)


@pytest.fixture(scope="module")
def source(models) -> Source:
    return source_of(models, drop_special=True)


def random_coder(layout: Layout, n: int = 24) -> Coder:
    coder = Coder(Crosscoder()(layout, n), TopK(k=6))
    transpose_init(coder, 1.0, torch.Generator().manual_seed(1))
    with torch.no_grad():
        coder.b_dec.normal_(generator=torch.Generator().manual_seed(2))
        coder.scale_read.copy_(torch.tensor(SCALES[: len(layout.sites)]))
        coder.scale_write.copy_(torch.tensor(SCALES[: len(layout.sites)]))
    return coder.eval()


def perfect_coder(layout: Layout) -> Coder:
    """Writes back exactly what it reads: latents ±e_i for every column."""
    width = layout.width
    coder = Coder(Crosscoder()(layout, 2 * width), ReLU())
    with torch.no_grad():
        both = torch.cat([torch.eye(width), -torch.eye(width)])
        coder.W_enc[0].copy_(both)
        coder.W_dec[0].copy_(both)
    return coder.eval()


def counted(source: Source) -> torch.Tensor:
    """Of these blocks: neither BOS nor special nor padding, token by token."""
    tokens, docs = source.blocks.tokens_NT, source.blocks.docs_NT
    special = source.policy.drop_special
    flags = [
        [
            t > 0 and docs[n, t] >= 0 and not (special and tokens[n, t] in (0, 1, 2))
            for t in range(16)
        ]
        for n in range(len(tokens))
    ]
    return torch.tensor(flags)


def by_hand(source: Source, coder: Coder):
    """All activations [N, T, D] per site, the code [N, T, L], and raw decoders per site [L, D]."""
    tokens = source.blocks.tokens_NT
    acts, raw = {}, {}
    for name, model in source.models.items():
        for site, x in model.capture(tokens, list(SITES)).items():
            acts[f"{name}/{site}"] = x
    rows = torch.cat([acts[site] for site in source.layout.sites], -1)
    with torch.no_grad():
        code = coder.encode(rows.flatten(0, 1)).view(*tokens.shape, -1)
    for p, (site, columns) in enumerate(
        zip(source.layout.sites, source.layout.slices, strict=True)
    ):
        raw[site] = coder.W_dec[0][:, columns].detach() / SCALES[p]
    return acts, code, raw


def kl_by_hand(source: Source, new: torch.Tensor, site: str = "resid_post.2") -> float:
    """Mean over counted positions with a real next token of Σ p log p/q, with `new` at `site` of
    chat wherever a position counts."""
    model, tokens, keep = source.models["chat"], source.blocks.tokens_NT, counted(source)
    own = model.capture(tokens, [site])[site]
    with torch.no_grad():
        patched = model.run(tokens, {site: lambda _: torch.where(keep[..., None], new, own)})
        p, q = model.run(tokens, {}).double().softmax(-1), patched.double().softmax(-1)
    found = []
    for n in range(len(tokens)):
        for t in range(15):
            if keep[n, t] and source.blocks.docs_NT[n, t + 1] >= 0:
                found.append(float((p[n, t] * (p[n, t] / q[n, t]).log()).sum()))
    return sum(found) / len(found)


def test_a_perfect_coder_gives_the_changed_models_own_predictions(source):
    pair = pair_of(perfect_coder(source.layout))
    everything = torch.ones(pair.coder.wiring.n_latents, dtype=torch.bool)
    patches = {"all": latents(pair, everything), "full": decoded(pair)}
    found = patched_kl(source, pair, patches, 10_000)
    for name in patches:
        assert found.kl[name].abs().max() < 1e-6
    base = latents(pair, ~everything)
    baseline = patched_kl(source, pair, {"none": base}, 10_000).mean("none", 0).value
    acts, _, _ = by_hand(source, pair.coder)
    assert baseline == pytest.approx(kl_by_hand(source, acts["base/resid_post.2"]), rel=1e-4)
    assert baseline > 1e-3
    removed = patched_kl(source, pair, {"a": without(pair, everything)}, 10_000)
    assert removed.mean("a", 0).value == pytest.approx(baseline, rel=1e-3)


@pytest.mark.parametrize("folded", [False, True])
def test_figures_are_the_model_run_by_hand(source, folded):
    coder = random_coder(source.layout)
    acts, code, raw = by_hand(source, coder)
    pair = pair_of(fold(coder) if folded else coder)
    score = torch.randn(24, generator=torch.Generator().manual_seed(5))
    score[[3, 8]] = torch.nan
    template = torch.zeros(6, 16, dtype=torch.bool)
    template[:, 4:7] = True
    found = causal(source, pair, score, template, PLAN)
    a, b = acts["base/resid_post.2"], acts["chat/resid_post.2"]
    change = raw["chat/resid_post.2"] - raw["base/resid_post.2"]
    ranked = sorted((n for n in range(24) if n not in (3, 8)), key=lambda n: -float(score[n]))

    def part(some):
        return sum(code[..., n, None] * change[n] for n in some)

    with torch.no_grad():
        bias = [coder.b_dec[columns] / s for columns, s in zip(
            source.layout.slices, SCALES, strict=True
        )]  # fmt: skip
    full = a + part(range(24)) + bias[3] - bias[1]
    inside = template[..., None]
    expected = {
        "kl_baseline": a,
        "kl_full": full,
        "kl_top_half": a + part(ranked[:11]),
        "kl_bottom_half": a + part(ranked[11:]),
        "kl_top_replaced": b - part(ranked[:11]),
        "kl_bottom_replaced": b - part(ranked[11:]),
        "kl_template": torch.where(inside, b, a),
        "kl_template_full": torch.where(inside, full, a),
    }
    values = {name: getattr(found, name).value for name in expected}
    for name, new in expected.items():
        assert values[name] == pytest.approx(kl_by_hand(source, new), rel=1e-4), name
    assert len(set(values.values())) == len(values)
    assert [share for share, _ in found.curve] == [0.0, 0.25, 0.5, 1.0]
    quarter = kl_by_hand(source, a + part(ranked[: round(0.25 * 22)]))
    assert found.curve[1][1].value == pytest.approx(quarter, rel=1e-4)
    assert found.curve[2][1] == found.kl_top_half
    gap = found.kl_bottom_half.value - found.kl_top_half.value
    assert found.kl_gap.value == pytest.approx(gap, rel=1e-4)
    for each in (found.kl_baseline, found.kl_gap):
        assert each.low <= each.value <= each.high
    assert found.scored == 22
    keep, real = counted(source), source.blocks.docs_NT[:, 1:] >= 0
    assert found.predictions == int((keep[:, :-1] & real).sum())
    assert found.sites == ("chat/resid_post.2",)


def test_sites_that_add_to_the_stream_are_all_put_in(models):
    source = source_of(models, ("mlp_out.1", "attn_out.2"))
    pair = pair_of(perfect_coder(source.layout))
    nothing = torch.zeros(pair.coder.wiring.n_latents, dtype=torch.bool)
    found = patched_kl(source, pair, {"a": latents(pair, nothing)}, 10_000).mean("a", 0).value
    tokens, keep = source.blocks.tokens_NT, counted(source)[..., None]
    a = models["base"].capture(tokens, ["mlp_out.1", "attn_out.2"])
    with torch.no_grad():
        edits = {site: lambda x, new=new: torch.where(keep, new, x) for site, new in a.items()}
        q = models["chat"].run(tokens, edits).double().log_softmax(-1)
        p = models["chat"].run(tokens, {}).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[:, :-1]
    real = counted(source)[:, :-1] & (source.blocks.docs_NT[:, 1:] >= 0)
    assert found == pytest.approx(float(kl[real].mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("sites", "kept"),
    [
        (("b/resid_mid.1", "b/resid_post.2"), ("b/resid_post.2",)),
        (("b/mlp_out.1", "b/resid_post.2", "b/mlp_out.3"), ("b/resid_post.2", "b/mlp_out.3")),
        (("b/mlp_out.1", "b/attn_out.2"), ("b/mlp_out.1", "b/attn_out.2")),
        (("b/resid_post.1", "b/final"), ("b/final",)),
    ],
)
def test_where_a_model_is_cut(sites, kept):
    assert cut(sites) == kept


def test_where_a_cut_model_starts():
    assert entrance(("mlp_out.3", "resid_post.7")) == ("resid_pre.3",)
    assert entrance(("final",)) == ()


def test_raw_decoders_are_in_the_models_units(source):
    coder = random_coder(source.layout)
    pair = pair_of(coder)
    for each in (pair, pair_of(fold(coder))):
        for name, D in zip(("base", "chat"), raw_decoders(each), strict=True):
            assert D.shape == (24, 64)
            for n in range(24):
                one = torch.zeros(1, 24)
                one[0, n] = 1.0
                with torch.no_grad():
                    raw = coder.decode(one) - coder.decode(torch.zeros(1, 24))
                site = source.layout.columns([f"{name}/{s}" for s in SITES])
                torch.testing.assert_close(D[n], raw[0, site])


def test_only_scored_latents_have_an_order():
    assert by_score(torch.tensor([1.0, torch.nan, 3.0, 1.0])).tolist() == [2, 0, 3]
    with pytest.raises(UsageError, match="1 of 3 latents have a score"):
        by_score(torch.tensor([torch.nan, 2.0, torch.nan]))


def test_models_of_different_widths_are_refused(source):
    layout = Layout(("base/resid_post.2", "chat/resid_post.2"), (3, 4))
    pair = pair_of(perfect_coder(layout))
    with pytest.raises(UsageError, match="different widths"):
        patched_kl(source, pair, {}, 100)


def test_a_source_of_other_sites_is_refused(models, source):
    pair = pair_of(perfect_coder(source.layout))
    other = source_of(models, ("resid_post.1",))
    with pytest.raises(UsageError, match="are not the source's"):
        patched_kl(other, pair, {"full": decoded(pair)}, 100)


def test_models_that_exchange_their_activations_are_refused(source):
    shuffled = replace(source, exchange=exchange_of(source.layout, 0))
    with pytest.raises(UsageError, match="shuffle_models"):
        read_chunk(shuffled, _pair(source), 0)


def test_rows_of_two_tokenizers_are_where_each_model_has_them(models):
    """The changed model reads a token more in front: its rows, and what is patched, move by one."""
    source = source_of(models)
    tokens, docs = source.blocks.tokens_NT, source.blocks.docs_NT
    own_tokens = torch.cat([tokens[:, :1], torch.full((6, 1), 9), tokens[:, 1:]], 1).int()
    own_docs = torch.cat([docs[:, :1], torch.zeros(6, 1), docs[:, 1:]], 1).int()
    place = torch.arange(1, 17).repeat(6, 1).int()
    place[:, 0] = 0
    place[2, 3] = -1
    own = Other(own_tokens, own_docs, place, torch.zeros(6).int(), 0, 2, (0, 1, 2))
    aligned = replace(source, blocks=replace(source.blocks, others={"chat": own}))
    pair = pair_of(perfect_coder(source.layout))
    read = read_chunk(aligned, pair, 0)
    assert torch.equal(read.tokens_BT, own_tokens[:4])
    base = models["base"].capture(tokens, list(SITES))
    chat = models["chat"].capture(own_tokens, list(SITES))
    keep = [(n, t) for n in range(4) for t in range(1, 16) if docs[n, t] >= 0 and (n, t) != (2, 3)]
    assert list(zip(*(part.tolist() for part in read.place_R), strict=True)) == keep
    assert read.counted_BT.nonzero().tolist() == [[n, t + 1] for n, t in keep]
    for row, (n, t) in zip(read.raw_RY, keep, strict=True):
        parts = [base[s][n, t] for s in SITES] + [chat[s][n, t + 1] for s in SITES]
        torch.testing.assert_close(row, torch.cat(parts))
    assert patched_kl(aligned, pair, {"full": decoded(pair)}, 10_000).kl["full"].abs().max() < 1e-6


def test_new_text_for_two_tokenizers_is_refused(source):
    tokens = source.blocks.tokens_NT
    own = Other(tokens, source.blocks.docs_NT, tokens, tokens[:, 0], 0, 2, (0,))
    aligned = replace(source, blocks=replace(source.blocks, others={"chat": own}))
    with pytest.raises(UsageError, match="one tokenizer"):
        over_tokens(aligned, tokens)


def test_too_few_blocks_for_an_interval_are_refused(source):
    pair = pair_of(random_coder(source.layout))
    score = torch.arange(24.0)
    with pytest.raises(UsageError, match="at least 5 blocks"):
        causal(source, pair, score, plan=replace(PLAN, tokens=64))


def test_draws_keep_the_sample_first_and_its_size():
    count_DN = draws(7, seed=3, times=50)
    assert count_DN.shape == (51, 7)
    assert count_DN[0].tolist() == [1.0] * 7
    assert count_DN.sum(1).tolist() == [7.0] * 51
    assert torch.equal(count_DN, draws(7, seed=3, times=50))


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    value_N = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = mean_over(value_N, torch.ones(400))
    error = float(value_N.std()) / 20
    assert found.value == pytest.approx(float(value_N.mean()), abs=1e-6)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)


def test_draws_without_a_figure_are_left_out():
    value_D = torch.tensor([2.0, torch.nan, 1.0, 1.0, 3.0, 3.0])
    found = interval(value_D)
    assert found.value == 2.0
    assert (found.low, found.high) == (1.0, 3.0)


def test_an_ablation_takes_away_what_the_latents_write(models, source):
    """At each site of b, from what is there; other positions keep what they have."""
    coder = random_coder(source.layout)
    acts, code, raw = by_hand(source, coder)
    tokens = source.blocks.tokens_NT[:5]
    removal = Removal(source, pair_of(coder), (2, 7, 11))
    # As in an answer, where all tokens are real: only BOS and special ones do not count.
    keep = counted(source)[:5, :, None]
    gone = {
        site: sum(code[:5, :, n, None] * raw[f"chat/{site}"][n] for n in (2, 7, 11)) * keep
        for site in SITES
    }
    assert all(x.abs().max() > 0.01 for x in gone.values())
    with torch.no_grad():
        found = models["chat"].run(tokens, removal.edits(tokens))
        expected = models["chat"].run(tokens, {s: lambda x, s=s: x - gone[s] for s in SITES})
        torch.testing.assert_close(found, expected)
        deepest = replace(removal, sites=cut(removal.pair.sites_b))
        found = models["chat"].run(tokens, deepest.edits(tokens))
        own = acts["chat/resid_post.2"][:5]
        placed = models["chat"].run(tokens, {SITES[1]: lambda _: own - gone[SITES[1]]})
    torch.testing.assert_close(found, placed)
    assert not torch.allclose(expected, placed)


def test_a_latent_that_writes_nothing_in_b_can_be_taken_out(models, source):
    coder = random_coder(source.layout)
    with torch.no_grad():
        for site in SITES:
            coder.W_dec[0][4:9, source.layout.slice(f"chat/{site}")] = 0
    removal = Removal(source, pair_of(coder), (4, 5, 6, 7, 8))
    tokens = source.blocks.tokens_NT[:3]
    with torch.no_grad():
        assert torch.equal(
            models["chat"].run(tokens, removal.edits(tokens)), models["chat"].run(tokens, {})
        )
        others = replace(removal, latents=(0, 1, 2))
        assert not torch.equal(
            models["chat"].run(tokens, others.edits(tokens)), models["chat"].run(tokens, {})
        )


def test_what_follows_changes_no_edit(source):
    removal = Removal(source, pair_of(random_coder(source.layout)), tuple(range(12)))
    tokens = source.blocks.tokens_NT[:2]
    for site in SITES:
        zeros = torch.zeros(2, 16, 32)
        long = removal.edits(tokens)[site](zeros.clone())
        short = removal.edits(tokens[:, :9])[site](zeros[:, :9].clone())
        torch.testing.assert_close(long[:, :9], short)
        assert long[:, 1:9].abs().max() > 0.01
        assert long[:, 0].abs().max() == 0


def test_norms_of_outliers_are_looked_at_in_new_tokens_too(source):
    medians = torch.full((4,), 1e-3)
    strict = replace(source, median_P=medians)
    read = read_chunk(over_tokens(strict, source.blocks.tokens_NT[:2]), _pair(source), 0)
    assert not read.counted_BT.any()
    assert read.value_E.numel() == 0


def _pair(source: Source) -> Pair:
    return pair_of(random_coder(source.layout))


def trial_of(source: Source, coder: Coder, **changes) -> Trial:
    behaviour = Behaviour(name="x", what="x.", marks=("x",))
    trial = Trial(source=source, pair=pair_of(coder), behaviour=behaviour, prompts=ASKED, answer=4)
    return replace(trial, **changes)


def test_the_change_of_clean_loss_is_the_loop(models, source):
    coder = random_coder(source.layout)
    trial = trial_of(source, coder)
    _, code, raw = by_hand(source, coder)
    found = loss_changes(trial, [(1, 5), (9,)])
    tokens, keep = source.blocks.tokens_NT, counted(source)[..., None]
    for some, change in zip([(1, 5), (9,)], found, strict=True):
        edits = {
            site: lambda x, site=site, some=some: (
                x - keep * sum(code[..., n, None] * raw[f"chat/{site}"][n] for n in some)
            )
            for site in SITES
        }
        with torch.no_grad():
            before = next_token_loss(models["chat"].run(tokens, {}), tokens)
            after = next_token_loss(models["chat"].run(tokens, edits), tokens)
        sums = [0.0, 0.0]
        for n in range(6):
            for t in range(15):
                if source.blocks.docs_NT[n, t + 1] >= 0:
                    sums[0] += float(before[n, t])
                    sums[1] += float(after[n, t])
        assert change.value == pytest.approx(sums[1] / sums[0] - 1, abs=1e-5)
        assert change.low <= change.value <= change.high
    assert found[0] != found[1]


def test_random_sets_are_as_active_and_apart():
    activity = torch.logspace(-4, 2, 300)
    activity[[7, 8]] = torch.tensor([0.0, torch.nan])
    wanted = (20, 21, 150, 290)
    sets = matched_sets(activity, wanted, 3, seed=1)
    assert len(set(sets)) == 3
    assert sets == matched_sets(activity, wanted, 3, seed=1)
    for each in sets:
        assert len(set(each)) == 4
        assert not set(each) & {7, 8, *wanted}
        for latent, drawn in zip(wanted, each, strict=True):
            assert abs(latent - drawn) <= 14


def test_too_few_latents_to_draw_from_are_refused():
    with pytest.raises(UsageError, match="1 other latents are active"):
        matched_sets(torch.tensor([1.0, 1.0, 0.0, 2.0]), (0, 1), 1)


def test_a_latent_that_is_not_there_is_refused(source):
    with pytest.raises(UsageError, match="no latent 24"):
        chosen(_pair(source), (3, 24))


def greedy(model, prompt: list[int], edits) -> str:
    """Token by token, everything computed anew for each."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(4):
            so_far = torch.tensor([tokens])
            tokens.append(int(model.run(so_far, edits(so_far))[0, -1].argmax()))
            if tokens[-1] == model.tokenizer.eos_token_id:
                break
    return model.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)


def test_an_ablation_is_told_beside_random_ones(models, source):
    """Rates are those of answers decoded token by token; the behaviour is what is said at first."""
    model = models["chat"]
    ids = [
        model.tokenizer.apply_chat_template(each, tokenize=True, add_generation_prompt=True)[
            "input_ids"
        ]
        for each in ASKED
    ]
    answers = [greedy(model, each, lambda _: {}) for each in ids]
    assert all(answers)
    behaviour = Behaviour(name="x", what="x.", marks=tuple(answers))
    trial = trial_of(source, random_coder(source.layout), behaviour=behaviour)
    found = ablation(trial, range(12), [range(12, 24), ()])
    assert found.behaviour_rate_before.value == 1.0
    assert found.behaviour_rate_before.low == pytest.approx(4 / (4 + 1.96**2), abs=1e-3)
    changes = loss_changes(trial, [range(12), range(12, 24)])
    pairs = zip([found.ablated, found.controls[0]], changes, strict=True)
    for each, change in pairs:
        removal = trial.removal(each.latents)
        said = [greedy(model, prompt, removal.edits) for prompt in ids]
        shown = [any(mark.lower() in one.lower() for mark in answers) for one in said]
        assert each.behaviour_rate.value == pytest.approx(sum(shown) / 4)
        assert each.loss_change == change
    assert found.ablated.behaviour_rate.value < 1
    assert found.controls[1].behaviour_rate.value == 1.0
    assert found.controls[1].loss_change.value == 0


def test_exchanged_activations_are_one_models_layers_on_the_others(models, source):
    """`b` with the stream of `a` after layer 1: the lower layers of `a` below the upper of `b`."""
    last = models["base"].n_layers - 1
    ids = [prompt_ids(models["chat"].tokenizer, each) for each in ASKED]

    def joined(lower, upper):
        both = replace(upper, module=copy.deepcopy(upper.module))
        inside, below = both.module.model, lower.module.model
        inside.embed_tokens = below.embed_tokens
        for n in range(2):
            inside.layers[n] = below.layers[n]
        return [greedy(both, each, lambda _: {}) for each in ids]

    assert last >= 2
    pair = pair_of(random_coder(source_of(models, ("resid_mid.0", "resid_post.1")).layout))
    for name, lower, upper in (("b_with_a", "base", "chat"), ("a_with_b", "chat", "base")):
        said = joined(models[lower], models[upper])
        own = [greedy(models[upper], each, lambda _: {}) for each in ids]
        assert said != own
        for marks in (tuple(each for each in said if each), tuple(each for each in own if each)):
            behaviour = Behaviour(name="x", what="x.", marks=marks)
            found = carried(source, pair, behaviour, ASKED, 4)
            assert found.sites == ("resid_post.1",)
            share = sum(shows(behaviour, each) for each in said) / len(said)
            assert getattr(found, name).value == pytest.approx(share)

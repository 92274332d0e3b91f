"""Attention as matrices: those a person would read off, the model's own weights, or a refusal."""

from __future__ import annotations

import copy
import math
import warnings
from functools import cache

import pytest
import torch
import transformers as hf

from crosslens.errors import UsageError
from crosslens.lm.attention import SelfAttention, _refused, attention_of, turned
from crosslens.lm.attention_alone import Seen
from tests.test_lm_families import (
    _GROUPED,
    FAMILIES,
    LAYERS,
    WIDTH,
    part,
    tiny,
    tokens,
    wrapped,
)
from tests.test_lm_mlp import Squash

LAYER = 1
NEOX = ("neox-parallel", "neox-sequential")
READ = ("llama", "mistral", "qwen2", "phi3", "olmo", "gpt2", *NEOX, "phi")
NORMED = ("qwen3", "olmo2", "gemma2", "gemma3", "gemma3-vision")
every_read = pytest.mark.parametrize("family", READ)


def equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_each_family_is_read_or_refused():
    assert {*READ, *NORMED} == set(FAMILIES)


@cache
def own_weights(family: str, n: int = 9) -> tuple[torch.Tensor, ...]:
    """Each layer's attention weights [B, H, T, T], as transformers' own eager code gives them."""
    module = copy.deepcopy(tiny(family).module)
    module.set_attn_implementation("eager")
    with torch.no_grad():
        return module(input_ids=tokens()[:, :n].long(), output_attentions=True).attentions


@every_read
def test_weights_and_output_are_the_models_own(family):
    model = tiny(family)
    seen = model.capture(tokens(), ["*"])
    for layer in range(LAYERS):
        attention = attention_of(model, layer)
        for block in range(2):
            x_TD = seen[f"attn_in.{layer}"][block]
            equal(attention.weights(x_TD), own_weights(family)[layer][block])
            given = seen[f"resid_pre.{layer}"][block]
            equal(x_TD if attention.norm is None else attention.norm(given), x_TD)
            torch.testing.assert_close(
                attention(x_TD), seen[f"attn_out.{layer}"][block], atol=2e-4, rtol=1e-4
            )


def test_a_window_reaches_back_no_further():
    assert attention_of(tiny("mistral"), 0).window == 4
    weights = own_weights("mistral")[0]
    assert not weights[:, :, 8, :5].any()
    assert attention_of(tiny("llama"), 0).window is None


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_the_matrices_are_those_a_person_would_choose(family):
    attention = attention_of(tiny(family), LAYER)
    for name, groups in (("q", 4), ("k", 2), ("v", 2)):
        theirs = part(family, LAYER, f"self_attn.{name}_proj")
        found = getattr(attention, f"W_{name.upper()}_{'HAD' if name == 'q' else 'JAD'}", None)
        found = attention.W_V_JVD if name == "v" else found
        equal(found, theirs.weight.view(groups, 8, WIDTH))
        bias = getattr(attention, {"q": "b_Q_HA", "k": "b_K_JA", "v": "b_V_JV"}[name])
        equal(bias, (torch.zeros(groups * 8) if theirs.bias is None else theirs.bias).view(-1, 8))
    out = part(family, LAYER, "self_attn.o_proj").weight
    equal(attention.W_O_HDV, out.view(WIDTH, 4, 8).permute(1, 0, 2))
    assert attention.scale == pytest.approx(8**-0.5)


def test_fused_and_partly_turned_matrices():
    """GPT-NeoX lays query, key and value of each head side by side and turns a quarter of them."""
    attention = attention_of(tiny("neox-parallel"), LAYER)
    theirs = part("neox-parallel", LAYER, "attention.query_key_value")
    fused = theirs.weight.view(4, 3, 8, WIDTH)
    biases = theirs.bias.view(4, 3, 8)
    for i, (weight, bias) in enumerate(
        (
            (attention.W_Q_HAD, attention.b_Q_HA),
            (attention.W_K_JAD, attention.b_K_JA),
            (attention.W_V_JVD, attention.b_V_JV),
        )
    ):
        equal(weight, fused[:, i])
        equal(bias, biases[:, i])
    assert len(attention.turn_F) == 1
    conv = part("gpt2", LAYER, "attn.c_attn")
    gpt2 = attention_of(tiny("gpt2"), LAYER)
    equal(gpt2.W_K_JAD, conv.weight.T[WIDTH : 2 * WIDTH].reshape(4, 8, WIDTH))
    equal(gpt2.b_V_JV, conv.bias[2 * WIDTH :].view(4, 8))
    assert len(gpt2.turn_F) == 0


@pytest.mark.parametrize("family", ["llama", "neox-parallel", "gpt2"])
def test_scores_are_their_equation_by_relative_distance(family):
    """Nested loops in float64, with the turn by t − u alone, and none by t or u."""
    attention = attention_of(tiny(family), LAYER)
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(9, WIDTH, generator=generator)
    expected = torch.zeros(4, 9, 9, dtype=torch.float64)
    for h in range(4):
        j = h // (4 // attention.n_groups)
        for t in range(9):
            q = (attention.W_Q_HAD[h] @ x_TD[t] + attention.b_Q_HA[h]).double()
            for u in range(9):
                k = (attention.W_K_JAD[j] @ x_TD[u] + attention.b_K_JA[j]).double()
                expected[h, t, u] = attention.scale * float(by_hand(q, attention, t - u) @ k)
    found = attention.scores(attention.queries(x_TD), attention.keys(x_TD))
    equal(found.double(), expected)


def by_hand(q: torch.Tensor, attention: SelfAttention, distance: int) -> torch.Tensor:
    """R(distance) q, one plane at a time."""
    out, n = q.clone(), len(attention.turn_F)
    for f, speed in enumerate(attention.turn_F.tolist()):
        c, s = math.cos(distance * speed), math.sin(distance * speed)
        out[f] = c * q[f] - s * q[n + f]
        out[n + f] = c * q[n + f] + s * q[f]
    return out


def test_turning_is_by_hand_and_keeps_lengths():
    attention = attention_of(tiny("neox-parallel"), 0)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    distance = torch.tensor([0, 1, -3, 17, 60])
    found = turned(x, *attention.rotation(distance))
    for row, d, each in zip(x.double(), distance.tolist(), found, strict=True):
        equal(each.double(), by_hand(row, attention, d))
    equal(found.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(found[0], x[0])
    assert torch.equal(found[:, 2:], x[:, 2:])


def llama(**changes):
    torch.manual_seed(5)
    config = hf.LlamaConfig(**_GROUPED | changes)
    return wrapped(hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))


def matches_own(model) -> None:
    seen = model.capture(tokens(), ["*"])
    for layer in range(LAYERS):
        attention = attention_of(model, layer)
        for block in range(2):
            found = attention(seen[f"attn_in.{layer}"][block])
            equal(found, seen[f"attn_out.{layer}"][block])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
)
def test_scaled_frequencies(rope):
    """YaRN also multiplies cosines and sines."""
    matches_own(llama(rope_parameters={"rope_theta": 10000.0, **rope}))


def test_gemma_of_the_first_generation():
    config = hf.GemmaConfig(**_GROUPED, head_dim=8)
    matches_own(wrapped(hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)))


def test_bfloat16_weights_come_out_as_they_are():
    model = tiny("llama", torch.bfloat16)
    attention = attention_of(model, LAYER)
    theirs = model.module.model.layers[LAYER].self_attn.k_proj.weight
    assert torch.equal(attention.W_K_JAD, theirs.float().view(2, 8, WIDTH))


def test_an_adapter_is_part_of_the_matrices():
    """W + (alpha / r) B A, by hand."""
    from peft import LoraConfig, get_peft_model

    model = llama()
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a name of old
        adapted = get_peft_model(copy.deepcopy(model.module), LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_()
    base = adapted.get_base_model().eval()
    query = base.model.layers[LAYER].self_attn.q_proj
    update = query.lora_B["default"].weight @ query.lora_A["default"].weight
    found = attention_of(wrapped(base), LAYER).W_Q_HAD
    equal(found, (query.base_layer.weight + 3 * update).view(4, 8, WIDTH))


def test_the_model_is_left_as_it_was():
    model = llama()
    before = model.capture(tokens(), ["attn_out.1"])["attn_out.1"]
    kind = model.module.config._attn_implementation
    attention_of(model, LAYER)
    assert model.module.config._attn_implementation == kind
    assert torch.equal(model.capture(tokens(), ["attn_out.1"])["attn_out.1"], before)
    assert next(model.module.parameters()).dtype == torch.float32


@pytest.mark.parametrize("family", NORMED)
def test_normed_queries_and_outputs_are_refused(family):
    with pytest.raises(
        UsageError, match=r"layer 1 of 'tiny'.*(normed|a norm|caps).*MLPs still can"
    ):
        attention_of(tiny(family), LAYER)


def test_scores_that_are_no_plain_scores_are_refused():
    blank = torch.zeros(1, 1, 1, 1)
    for settings, why in (({"softcap": 50.0}, "caps"), ({"s_aux": blank}, "no key"), ({}, None)):
        found = _refused(Seen(blank, blank, blank, 1.0, settings))
        assert (found is None) if why is None else why in found


def test_frequencies_that_grow_with_the_text_are_refused():
    model = llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UsageError, match=r"dynamic\) change with the length"):
        attention_of(model, LAYER)


def test_another_layout_of_turns_is_refused():
    """Cohere turns neighbouring coordinates."""
    config = hf.CohereConfig(**_GROUPED)
    model = wrapped(hf.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(UsageError, match="turns queries and keys by their positions is not known"):
        attention_of(model, LAYER)


def test_attention_of_its_own_kind_is_refused():
    """GPT-J weighs keys itself."""
    config = hf.GPTJConfig(
        vocab_size=97, n_embd=WIDTH, n_layer=LAYERS, n_head=4, rotary_dim=4, n_inner=48
    )
    model = wrapped(hf.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(UsageError, match="in a way of its own"):
        attention_of(model, LAYER)


def test_another_norm_is_refused_by_name():
    model = llama()
    model.module.model.layers[0].input_layernorm = Squash()
    with pytest.raises(UsageError, match="Squash stands before it"):
        attention_of(wrapped(model.module), 0)


def test_there_is_no_such_layer():
    for layer in (-1, LAYERS):
        with pytest.raises(UsageError, match=f"no layer {layer}: it has 3"):
            attention_of(tiny("llama"), layer)

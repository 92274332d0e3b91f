"""MLPs as matrices: those a person would read off, for every family, or a refusal."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import nn

from crosslens.errors import UsageError
from crosslens.functional.interactions import activation
from crosslens.lm.mlp import MLP, Norm, mlp_of
from tests.test_lm_families import (
    _COMMON,
    _GROUPED,
    FAMILIES,
    INNER,
    LAYERS,
    WIDTH,
    every_family,
    part,
    tiny,
    tokens,
    wrapped,
)

LAYER = 1
NEOX = ("neox-parallel", "neox-sequential")
GEMMAS = ("gemma2", "gemma3", "gemma3-vision")
PLAIN = {
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "phi": ("mlp.fc1", "mlp.fc2"),
    **dict.fromkeys(NEOX, ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
}
"""Families without gates: names of the matrices."""
KINDS = dict.fromkeys(("gpt2", "phi", *GEMMAS), "gelu_tanh") | dict.fromkeys(NEOX, "gelu")
NORMS = {
    "gpt2": "ln_2",
    "phi": "input_layernorm",
    "olmo2": None,
    **dict.fromkeys(GEMMAS, "pre_feedforward_layernorm"),
}
LAYER_NORMS = ("gpt2", "phi", "olmo", *NEOX)


def by_hand(family: str) -> dict[str, torch.Tensor | None]:
    """The matrices and biases, by their names in transformers."""
    if family in PLAIN:
        into, out = (part(family, LAYER, name) for name in PLAIN[family])
        turned = family == "gpt2"
        found = {"W_in_ND": into.weight.T if turned else into.weight, "b_in_N": into.bias}
        found |= {"W_gate_ND": None, "b_gate_N": None, "b_out_D": out.bias}
        return found | {"W_out_DN": out.weight.T if turned else out.weight}
    down = part(family, LAYER, "mlp.down_proj").weight
    if family == "phi3":
        gate, up = part(family, LAYER, "mlp.gate_up_proj").weight.chunk(2)
    else:
        gate, up = (part(family, LAYER, f"mlp.{name}_proj").weight for name in ("gate", "up"))
    biases = dict.fromkeys(("b_in_N", "b_gate_N", "b_out_D"))
    return {"W_in_ND": up, "W_gate_ND": gate, "W_out_DN": down, **biases}


def equal(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert (found is None) == (expected is None)
    if expected is not None:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@every_family
def test_the_matrices_are_those_a_person_would_choose(family):
    mlp = mlp_of(tiny(family), LAYER)
    for name, expected in by_hand(family).items():
        equal(getattr(mlp, name), expected)
    assert mlp.kind == KINDS.get(family, "silu")
    assert mlp.layer == LAYER


@every_family
def test_norm_and_matrices_give_what_the_model_computes(family):
    model = tiny(family)
    seen = model.capture(tokens(), ["*"])
    for layer in range(LAYERS):
        mlp = mlp_of(model, layer)
        before = seen.get(f"resid_mid.{layer}", seen[f"resid_pre.{layer}"])
        given = before if mlp.norm is None else mlp.norm(before)
        torch.testing.assert_close(given, seen[f"mlp_in.{layer}"], atol=1e-5, rtol=1e-5)
        own = part(family, layer, FAMILIES[family][1].mlp)(given)
        torch.testing.assert_close(mlp(given), own, atol=1e-4, rtol=1e-4)


@every_family
def test_the_norm_is_of_the_right_kind(family):
    norm = mlp_of(tiny(family), LAYER).norm
    name = NORMS.get(family, "post_attention_layernorm")
    if name is None:
        assert norm is None
        return
    theirs = part(family, LAYER, name)
    assert norm.kind == ("layer" if family in LAYER_NORMS else "rms")
    eps = getattr(theirs, "eps", getattr(theirs, "variance_epsilon", 1e-5))
    assert norm.eps == pytest.approx(eps, rel=1e-3)
    gain = getattr(theirs, "weight", torch.ones(WIDTH))
    equal(norm.gain_D, gain + 1 if family.startswith("gemma") else gain)
    equal(norm.bias_D, getattr(theirs, "bias", None))


def llama(**changes):
    torch.manual_seed(5)
    config = hf.LlamaConfig(**_GROUPED | changes)
    module = hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return wrapped(module)


@pytest.mark.parametrize(
    ("hidden_act", "kind"),
    [
        ("relu", "relu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("silu", "silu"),
        ("relu2", "relu2"),
    ],
)
@pytest.mark.parametrize("gated", [True, False])
def test_each_kind_is_told_from_the_others(hidden_act, kind, gated):
    if gated:
        mlp = mlp_of(llama(hidden_act=hidden_act, mlp_bias=True), 0)
    else:
        config = hf.GPTNeoXConfig(**_COMMON, hidden_act=hidden_act)
        mlp = mlp_of(wrapped(hf.AutoModelForCausalLM.from_config(config).eval()), 0)
    assert mlp.kind == kind
    assert (mlp.W_gate_ND is not None) == gated


@pytest.mark.parametrize(
    "hidden_act", ["quick_gelu", "gelu_10", "relu6", "leaky_relu", "tanh", "mish", "hardswish"]
)
def test_other_nonlinearities_are_refused_by_name(hidden_act):
    with pytest.raises(UsageError, match=r"layer 2 of 'tiny' \(LlamaMLP\).*none of relu, gelu"):
        mlp_of(llama(hidden_act=hidden_act), 2)


def test_biases_and_the_order_of_value_and_gate():
    model = llama(mlp_bias=True)
    mlp, theirs = mlp_of(model, 0), model.module.model.layers[0].mlp
    with torch.no_grad():
        for layer in (theirs.up_proj, theirs.gate_proj, theirs.down_proj):
            layer.bias.normal_()
    mlp = mlp_of(model, 0)
    equal(mlp.b_in_N, theirs.up_proj.bias)
    equal(mlp.b_gate_N, theirs.gate_proj.bias)
    equal(mlp.b_out_D, theirs.down_proj.bias)


def test_an_adapter_is_part_of_the_matrices():
    """W + (alpha / r) B A, by hand."""
    from peft import LoraConfig, get_peft_model

    model = llama()
    before = mlp_of(model, LAYER)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["gate_proj", "down_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a name of old
        adapted = get_peft_model(copy.deepcopy(model.module), LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_()
    base = adapted.get_base_model().eval()
    mlp = mlp_of(wrapped(base), LAYER)
    layers = base.model.layers[LAYER].mlp
    for part_of, found, was in (
        (layers.gate_proj, mlp.W_gate_ND, before.W_gate_ND),
        (layers.down_proj, mlp.W_out_DN, before.W_out_DN),
    ):
        update = part_of.lora_B["default"].weight @ part_of.lora_A["default"].weight
        equal(found, was + 3 * update)
        assert not torch.allclose(found, was, atol=1e-2)
    equal(mlp.W_in_ND, before.W_in_ND)


def test_bfloat16_weights_come_out_as_they_are():
    mlp = mlp_of(tiny("llama", torch.bfloat16), LAYER)
    theirs = tiny("llama", torch.bfloat16).module.model.layers[LAYER].mlp
    assert torch.equal(mlp.W_in_ND, theirs.up_proj.weight.float())
    assert mlp.W_out_DN.dtype == torch.float32


def test_a_mixture_of_experts_is_refused_by_name():
    config = hf.MixtralConfig(**_GROUPED, num_local_experts=2)
    model = wrapped(hf.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(UsageError, match=r"Mixtral\w+\).*does not end in one down projection"):
        mlp_of(model, 0)


def test_an_mlp_that_does_more_than_its_matrices_is_refused():
    model = llama()
    handle = model.module.model.layers[0].mlp.register_forward_hook(lambda *a: a[-1] * 1.01)
    with pytest.raises(UsageError, match="matrices alone do not give"):
        mlp_of(model, 0)
    handle.remove()
    assert isinstance(mlp_of(model, 0), MLP)


class Squash(nn.Module):
    """A norm like no other."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(hidden_states)


def test_another_norm_is_refused_by_name():
    module = copy.deepcopy(llama().module)
    module.model.layers[0].post_attention_layernorm = Squash()
    with pytest.raises(UsageError, match="Squash stands before the MLP"):
        mlp_of(wrapped(module), 0)


def test_there_is_no_such_layer():
    for layer in (-1, LAYERS):
        with pytest.raises(UsageError, match=f"no layer {layer}: it has 3"):
            mlp_of(tiny("llama"), layer)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_are_their_equations(kind):
    generator = torch.Generator().manual_seed(3)
    x_RD, gain_D, bias_D = (torch.randn(n, generator=generator) for n in ((4, 6), (6,), (6,)))
    norm = Norm(kind=kind, gain_D=gain_D, bias_D=bias_D, eps=0.01)
    for row, found, scalar in zip(x_RD.tolist(), norm(x_RD), norm.scalar(x_RD), strict=True):
        mean = sum(row) / 6 if kind == "layer" else 0.0
        centred = [x - mean for x in row]
        size = (sum(x * x for x in centred) / 6 + 0.01) ** 0.5
        assert float(scalar) == pytest.approx(1 / size)
        expected = [
            x / size * float(g) + float(b) for x, g, b in zip(centred, gain_D, bias_D, strict=True)
        ]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_an_mlp_is_its_equation(gated):
    full = mlp_of(tiny("llama"), 0)
    mlp = full if gated else replace(full, W_gate_ND=None)
    x_D = torch.linspace(-1, 1, WIDTH)
    phi = activation("silu")
    hidden = []
    for n in range(INNER):
        into = sum(float(w) * float(x) for w, x in zip(mlp.W_in_ND[n], x_D, strict=True))
        if gated:
            gate = sum(float(w) * float(x) for w, x in zip(full.W_gate_ND[n], x_D, strict=True))
            hidden.append(into * float(phi(torch.tensor(gate))))
        else:
            hidden.append(float(phi(torch.tensor(into))))
    expected = mlp.W_out_DN @ torch.tensor(hidden)
    torch.testing.assert_close(mlp(x_D), expected, atol=1e-4, rtol=1e-4)

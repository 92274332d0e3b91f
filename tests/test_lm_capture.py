"""Captured activations are the true ones, and no more is computed than was asked for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from crosslens.errors import UsageError
from tests.test_lm_families import FAMILIES, LAYERS, VOCABULARY, every_family, part, tiny, tokens


def exactly(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=0)


def hooks_in(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@every_family
def test_equals_output_hidden_states(family):
    model = tiny(family)
    output = model.module(input_ids=tokens().long(), output_hidden_states=True)
    names = [f"hidden_states.{n}" for n in range(LAYERS + 1)]
    seen = model.capture(tokens(), [*names, "logits"])
    for name, state in zip(names, output.hidden_states, strict=True):
        (site,) = model.resolve([name])
        exactly(seen[site], state)
    exactly(seen["logits"], output.logits)


@every_family
def test_equals_hooks_placed_by_hand(family):
    model, parts = tiny(family), FAMILIES[family][1]
    expected: dict[str, torch.Tensor] = {}

    def given(site):
        def hook(module, args, kwargs):
            expected[site] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def returned(site):
        def hook(module, args, output):
            expected[site] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    handles = []
    for layer in range(LAYERS):
        inputs = {"attn_in": parts.attention, "mlp_in": parts.mlp, "mlp_act": parts.down}
        inputs |= {"resid_pre": ""} | ({"resid_mid": parts.mid} if parts.mid else {})
        outputs = {"attn_out": parts.attention_sum, "mlp_out": parts.mlp_sum, "resid_post": ""}
        for kind, name in inputs.items():
            hook = given(f"{kind}.{layer}")
            module = part(family, layer, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for kind, name in outputs.items():
            hook = returned(f"{kind}.{layer}")
            handles.append(part(family, layer, name).register_forward_hook(hook))
    model.module(input_ids=tokens().long())
    for handle in handles:
        handle.remove()
    seen = model.capture(tokens(), list(expected))
    assert set(seen) == set(expected) == set(model.resolve(["*.0", "*.1", "*.2"]))
    for site, activation in expected.items():
        exactly(seen[site], activation)


@every_family
def test_layers_sum_to_the_residual(family):
    model = tiny(family)
    seen = model.capture(tokens(), ["*"])
    parallel = FAMILIES[family][1].mid is None
    for layer in range(LAYERS):
        pre, attn, mlp, post = (
            seen[f"{kind}.{layer}"] for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        if parallel:
            assert_close(pre + attn + mlp, post)
        else:
            exactly(pre + attn, seen[f"resid_mid.{layer}"])
            exactly(seen[f"resid_mid.{layer}"] + mlp, post)


@every_family
@pytest.mark.parametrize("kind", ["resid_pre", "attn_out", "mlp_in", "resid_post"])
def test_nothing_deeper_is_computed(family, kind):
    model = tiny(family)
    calls: Counter[str] = Counter()
    watched = {f"layer {n}": part(family, n, "") for n in range(LAYERS)}
    watched["head"] = model.module.get_output_embeddings()
    watched["mlp of layer 1"] = part(family, 1, FAMILIES[family][1].down)
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, module in watched.items()
    ]
    model.capture(tokens(), [f"{kind}.1", "resid_pre.0"])
    for handle in handles:
        handle.remove()
    expected = {"layer 0": 1, "layer 1": 1}
    # What enters the layer is captured before the layer's own pre-hooks above are run.
    expected |= {"mlp of layer 1": 1} if kind == "resid_post" else {}
    assert {**calls, "layer 1": 1} == expected


def test_the_head_runs_only_for_logits():
    model = tiny("llama")
    calls: list[int] = []
    head = model.module.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda *_: calls.append(1))
    model.capture(tokens(), ["final", "resid_post.*"])
    assert not calls
    assert model.capture(tokens(), ["logits"])["logits"].shape == (2, 9, VOCABULARY)
    handle.remove()
    assert calls == [1]


def test_an_early_stop_leaves_nothing_behind():
    model = tiny("gemma2")
    ids = tokens().long()
    before, hooks = model.module(input_ids=ids, output_hidden_states=True), hooks_in(model.module)
    model.capture(ids, ["resid_mid.0"])
    assert torch.is_grad_enabled()
    assert hooks_in(model.module) == hooks
    after = model.module(input_ids=ids, output_hidden_states=True)
    assert len(after.hidden_states) == len(before.hidden_states) == LAYERS + 1
    exactly(after.logits, before.logits)


def test_captures_are_copies_that_autograd_may_save():
    model = tiny("llama")
    seen = model.capture(tokens(), ["resid_post.0", "resid_pre.1"])
    weight = torch.ones(model.d_model, requires_grad=True)
    (seen["resid_post.0"] * weight).sum().backward()
    exactly(weight.grad, seen["resid_post.0"].sum((0, 1)))
    kept = seen["resid_pre.1"].clone()
    seen["resid_post.0"].zero_()
    exactly(seen["resid_pre.1"], kept)


def test_order_and_names_of_the_result():
    model = tiny("llama")
    seen = model.capture(tokens(), ["blocks.2.hook_resid_mid", "resid_post.0", "hidden_states.1"])
    assert list(seen) == ["resid_post.0", "resid_mid.2"]


def test_blocks_longer_than_the_model_takes_are_refused():
    with pytest.raises(UsageError, match="65 tokens are longer than the 64 positions"):
        tiny("llama").capture(torch.ones(1, 65, dtype=torch.int32), ["embed"])

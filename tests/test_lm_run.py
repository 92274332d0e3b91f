"""Running a model with activations replaced: exact, seen by all that follows, differentiable."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from crosslens.errors import UsageError
from crosslens.lm import next_token_loss
from tests.test_lm_capture import exactly, hooks_in
from tests.test_lm_families import FAMILIES, LAYERS, every_family, part, tiny, tokens


def noise(shape: torch.Size, seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_family
def test_without_edits_it_is_the_model(family):
    model = tiny(family)
    exactly(model.run(tokens(), {}), model.module(input_ids=tokens().long()).logits)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_changes_nothing_to_the_bit(family, dtype):
    model = tiny(family, dtype)
    clean = model.run(tokens(), {})
    for site in model.sites():
        assert torch.equal(model.run(tokens(), {site: lambda x: x}), clean), site
    assert torch.equal(model.run(tokens(), {s: lambda x: x for s in model.sites()}), clean)


@every_family
def test_another_prompts_residual_gives_that_prompts_logits(family):
    """The residual stream at any depth decides all that follows; so do its ends."""
    model = tiny(family)
    sites = model.resolve(["embed", "resid_*", "final", "logits"])
    assert len(sites) == 3 + LAYERS * (2 if FAMILIES[family][1].mid is None else 3)
    other, expected = model.capture(tokens(1), sites), model.run(tokens(1), {})
    assert not torch.allclose(model.run(tokens(0), {}), expected)
    for site in sites:
        found = model.run(tokens(0), {site: lambda _, site=site: other[site]})
        assert torch.equal(found, expected), site


@every_family
@pytest.mark.parametrize("kind", ["attn_in", "attn_out", "mlp_in", "mlp_act", "mlp_out"])
def test_replacing_within_a_layer_equals_a_hook_placed_by_hand(family, kind):
    model, parts = tiny(family), FAMILIES[family][1]
    new = noise(model.capture(tokens(), [f"{kind}.1"])[f"{kind}.1"].shape)
    name = {
        "attn_in": parts.attention,
        "attn_out": parts.attention_sum,
        "mlp_in": parts.mlp,
        "mlp_act": parts.down,
        "mlp_out": parts.mlp_sum,
    }[kind]
    module = part(family, 1, name)

    def before(module, args, kwargs):
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def after(module, args, output):
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = (
        module.register_forward_hook(after)
        if kind.endswith("_out")
        else module.register_forward_pre_hook(before, with_kwargs=True)
    )
    expected = model.module(input_ids=tokens().long()).logits
    handle.remove()
    assert not torch.allclose(expected, model.run(tokens(), {}))
    assert torch.equal(model.run(tokens(), {f"{kind}.1": lambda _: new}), expected)


@pytest.mark.parametrize("family", [f for f, (_, parts) in FAMILIES.items() if parts.mid])
def test_the_middle_of_the_residual_by_hand(family):
    """resid_post = mid' + norms-and-MLP(mid'), computed here module by module."""
    model = tiny(family)
    mid = noise(model.capture(tokens(), ["resid_mid.1"])["resid_mid.1"].shape)
    added = mid
    for name in FAMILIES[family][1].mlp_path:
        added = part(family, 1, name)(added)
    expected = model.run(tokens(), {"resid_post.1": lambda _: mid + added})
    assert_close(model.run(tokens(), {"resid_mid.1": lambda _: mid}), expected)


def test_writing_the_mlps_input_leaves_the_residual_alone():
    """In OLMo 2 the MLP's input is the residual itself, not a norm's output."""
    model = tiny("olmo2")
    mid = model.capture(tokens(), ["resid_mid.1"])["resid_mid.1"]
    added = part("olmo2", 1, "post_feedforward_layernorm")(part("olmo2", 1, "mlp")(2 * mid))
    expected = model.run(tokens(), {"resid_post.1": lambda _: mid + added})
    assert_close(model.run(tokens(), {"mlp_in.1": lambda x: 2 * x}), expected)
    assert_close(model.run(tokens(), {"mlp_in.1": lambda x: x.mul_(2)}), expected)


@every_family
def test_several_edits_at_once(family):
    """Undoing at one depth what was done at another leaves the later one's effect only."""
    model = tiny(family)
    clean = model.capture(tokens(), ["resid_post.1"])["resid_post.1"]
    edits = {
        "resid_post.1": lambda _: clean,
        "attn_out.0": torch.zeros_like,
        "mlp_out.2": torch.zeros_like,
    }
    found = model.run(tokens(), edits)
    exactly(found, model.run(tokens(), {"mlp_out.2": torch.zeros_like}))
    assert not torch.allclose(found, model.run(tokens(), {}))


@every_family
def test_gradients_flow_through_the_edits(family):
    """The derivative along a random direction at each site, against a central difference."""
    model = tiny(family, torch.float64)
    weights_BTV = noise(model.run(tokens(), {}).shape).double()
    kinds = ["resid_pre.1", "attn_out.0", "mlp_act.1", "resid_post.0"]
    for site in model.resolve([*kinds, *(["resid_mid.1"] if FAMILIES[family][1].mid else [])]):
        direction = noise(torch.Size([model.width(site)])).double()

        def total(scale, site=site, direction=direction):
            # Squaring makes autograd save its argument, which must not be overwritten afterwards.
            edited = model.run(tokens(), {site: lambda x: x + scale * direction * x**2})
            return (edited.double() * weights_BTV).sum()

        scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(total(scale), scale)
        step = 1e-3
        with torch.no_grad():
            measured = (total(step) - total(-step)) / (2 * step)
        assert slope.abs() > 1e-3, site
        assert_close(slope, measured, rtol=2e-2, atol=2e-2)


def test_hooks_go_even_when_an_edit_fails():
    model = tiny("llama")
    before = hooks_in(model.module)

    def fails(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.run(tokens(), {"resid_mid.1": fails, "resid_post.0": lambda x: x})
    assert hooks_in(model.module) == before


def test_a_change_of_shape_is_refused():
    with pytest.raises(UsageError, match=r"resid_mid\.1 has shape \(2, 9, 31\)"):
        tiny("llama").run(tokens(), {"resid_mid.1": lambda x: x[..., 1:]})


def test_one_edit_per_site():
    with pytest.raises(UsageError, match="names 3 sites"):
        tiny("llama").run(tokens(), {"resid_mid.*": lambda x: x})


def test_results_are_cast_to_the_activations_dtype():
    model = tiny("llama", torch.bfloat16)
    for site in model.sites():
        logits = model.run(tokens(), {site: lambda x: x.float() * 2})
        assert logits.dtype == torch.bfloat16, site


def test_next_token_loss_by_its_definition():
    logits_BTV, tokens_BT = noise(torch.Size([2, 9, 97])).bfloat16(), tokens()
    loss = next_token_loss(logits_BTV, tokens_BT)
    assert loss.dtype == torch.float32
    for b in range(2):
        for t in range(8):
            exponentials = logits_BTV[b, t].double().exp()
            expected = -(exponentials[tokens_BT[b, t + 1]] / exponentials.sum()).log()
            assert_close(loss[b, t].double(), expected, rtol=1e-5, atol=1e-6)

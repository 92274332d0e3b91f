"""Starting a model at a layer gives to the bit what the whole pass gives; else the whole runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers

from crosslens.lm.midway import can_start_midway, starting_at
from tests.test_lm_families import LAYERS, every_family, tiny, tokens


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x)


def layers_run(model, compute) -> list[int]:
    """Which layers computed something: whose attention was called."""
    calls: Counter[int] = Counter()
    handles = []
    for index in range(LAYERS):
        module = model.anatomy.taps[f"attn_in.{index}"].module
        handles.append(module.register_forward_hook(lambda *_, n=index: calls.update([n])))
    compute()
    for handle in handles:
        handle.remove()
    return sorted(calls)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_site_spliced_midway_equals_the_whole_pass(family, dtype):
    model = tiny(family, dtype)
    assert can_start_midway(model.anatomy)
    entrances = model.resolve(["resid_pre.*"])
    known = model.capture(tokens(), entrances)
    for site in model.sites():
        whole = model.run(tokens(), {site: noisy})
        assert torch.equal(model.run(tokens(), {site: noisy}, known), whole), site


@every_family
def test_no_layer_before_the_first_edit_is_computed(family):
    model = tiny(family)
    known = model.capture(tokens(), ["resid_pre.*"])

    def run(*sites: str, given=known) -> list[int]:
        edits = dict.fromkeys(sites, noisy)
        return layers_run(model, lambda: model.run(tokens(), edits, given))

    run("logits")  # the first time, whether it can is tried out
    assert run("mlp_out.2", "attn_out.1") == [1, 2]
    assert run("resid_pre.1") == [1, 2]
    assert run("resid_post.1") == [1, 2], "its layer runs, for it is edited as it leaves"
    assert run("logits") == run() == [2]
    assert run("embed") == [0, 1, 2]
    some = {"resid_pre.1": known["resid_pre.1"]}
    assert run("mlp_out.2", given=some) == [1, 2]
    assert run("mlp_out.0", given=some) == [0, 1, 2]


def test_what_is_known_is_neither_changed_nor_kept(monkeypatch):
    model = tiny("llama")
    known = model.capture(tokens(), ["resid_pre.*"])
    before = {site: x.clone() for site, x in known.items()}
    model.run(tokens(), {"resid_pre.1": lambda x: x.zero_(), "resid_mid.1": noisy}, known)
    assert all(torch.equal(x, before[site]) for site, x in known.items())
    assert layers_run(model, lambda: model.run(tokens(), {})) == [0, 1, 2]


def test_gradients_flow_from_midway():
    model = tiny("llama", torch.float64)
    known = model.capture(tokens(), ["resid_pre.2"])
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def edits():
        return {"resid_mid.2": lambda x: x * scale}

    (whole,) = torch.autograd.grad(model.run(tokens(), edits()).sum(), scale)
    (midway,) = torch.autograd.grad(model.run(tokens(), edits(), known).sum(), scale)
    assert torch.equal(midway, whole)
    assert whole != 0


def test_layers_are_themselves_again_even_when_a_pass_fails():
    model = tiny("gpt2")
    layers = model.anatomy.layers
    own = layers[0].forward

    def once_replaced(*args, **kwargs):
        return own(*args, **kwargs)

    layers[0].forward = once_replaced
    x = model.capture(tokens(), ["resid_pre.2"])["resid_pre.2"]

    def fails(_):
        assert torch.equal(layers[0](0 * x), x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), starting_at(layers, 2, x):
        fails(x)
    assert layers[0].__dict__["forward"] is once_replaced
    assert "forward" not in layers[1].__dict__
    del layers[0].forward


class Remembering(torch.nn.Module):
    """A layer that also uses what its predecessor left behind."""

    def __init__(self, layer: torch.nn.Module, left: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.left = layer, left

    def forward(self, hidden_states, *args, **kwargs):
        out = self.layer(hidden_states, *args, **kwargs) + self.left.get("sum", 0)
        self.left["sum"] = out.mean()
        return out


@pytest.mark.parametrize("broken", ["state", "missing"])
def test_where_layers_hand_on_more_the_whole_pass_runs(broken):
    """Layers that share state besides the residual stream cannot be started midway."""
    model = tiny("llama")
    left: dict[str, torch.Tensor] = {}
    decoder = model.anatomy.decoder
    original = decoder.layers
    odd = [Remembering(layer, left) for layer in original]
    taps = dict(model.anatomy.taps)
    for site, tap in taps.items():
        if tap.module in list(original):
            taps[site] = replace(tap, module=odd[list(original).index(tap.module)])
    decoder.layers = torch.nn.ModuleList(odd)
    handle = decoder.register_forward_pre_hook(lambda *_: left.clear())
    if broken == "missing":
        for layer in odd[1:]:
            layer.left = _Strict(left)
    try:
        anatomy = replace(model.anatomy, layers=tuple(odd), taps=taps)
        assert not can_start_midway(anatomy)
        odd_model = replace(model, anatomy=anatomy)
        known = odd_model.capture(tokens(), ["resid_pre.*"])
        whole = odd_model.run(tokens(), {"resid_mid.2": noisy})
        assert torch.equal(odd_model.run(tokens(), {"resid_mid.2": noisy}, known), whole)
    finally:
        handle.remove()
        decoder.layers = original


class _Strict:
    """A dict whose entries must be there."""

    def __init__(self, entries: dict[str, torch.Tensor]) -> None:
        self.entries = entries

    def get(self, name, default):
        return self.entries[name]

    def __setitem__(self, name, value):
        self.entries[name] = value


@every_family
def test_no_cache_of_keys_and_values_is_built(family, monkeypatch):
    """Nor given: every attention is called without one."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("a cache was made")

    for name in ("Cache", "DynamicCache", "StaticCache"):
        monkeypatch.setattr(getattr(transformers, name), "__init__", refuse)
    model = tiny(family)
    given = []
    handles = [
        model.anatomy.taps[f"attn_in.{n}"].module.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs.get("past_key_values")),
            with_kwargs=True,
        )
        for n in range(LAYERS)
    ]
    model.capture(tokens(), ["final", "logits"])
    model.capture(tokens(), ["resid_mid.1" if "resid_mid.1" in model.sites() else "attn_out.1"])
    model.run(tokens(), {"attn_out.1": noisy}, model.capture(tokens(), ["resid_pre.1"]))
    for handle in handles:
        handle.remove()
    assert len(given) > LAYERS
    assert set(given) == {None}

"""Rows, codes and weights for layer-local proofs are the model's and the coder's own."""

from __future__ import annotations

import pytest
import torch

from crosslens.errors import UsageError
from crosslens.proofs.local import local
from crosslens.proofs.local_gather import Gathered, gather, local_sites, padded
from crosslens.proofs.local_truth import Truth
from tests.interaction_sites import CASES, coder_at, model_of, source_at
from tests.test_lm_families import tokens

DIRECT = {
    name: site
    for name, site in CASES.items()
    if "relu2" not in name and site.startswith(("resid_mid", "mlp_in"))
} | {"neox-parallel": "resid_pre.1"}


def of(name: str, tokens_wanted: int = 9) -> Gathered:
    model, site = model_of(name), DIRECT[name]
    source = source_at(model, site)
    return gather(source, coder_at(source.layout), model, tokens_wanted)[site]


@pytest.mark.parametrize("name", DIRECT)
def test_the_mlp_and_the_rows_are_the_models(name: str) -> None:
    """f(x) of the gathered weights is what the model's own MLP gives for the same tokens."""
    found, model = of(name), model_of(name)
    assert found.layer == 1
    truth = Truth(found.weights, {**found.coder, "affine": torch.zeros(3, 1)})
    seen = model.capture(tokens(), [DIRECT[name], "mlp_in.1"])
    x = seen[DIRECT[name]].flatten(0, 1)[found.token_R].double()
    torch.testing.assert_close(found.x_RD, x)
    module = model.anatomy.taps["mlp_in.1"].module
    expected = module(seen["mlp_in.1"]).flatten(0, 1)[found.token_R].double()
    torch.testing.assert_close(truth.output(found.x_RD), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DIRECT)
def test_codes_decode_to_what_the_coder_decodes(name: str) -> None:
    found, model = of(name), model_of(name)
    source = source_at(model, DIRECT[name])
    coder = coder_at(source.layout)
    rows = next(iter(source)).rows()[: len(found.x_RD)]
    truth = Truth(found.weights, {**found.coder, "affine": torch.zeros(3, 1)})
    z = coder.encode(rows)
    at, scale = coder.wiring.write.slice(DIRECT[name]), coder.scale_write[0]
    own = (z @ coder.W_dec[0][:, at] + coder.b_dec[at]) / scale
    torch.testing.assert_close(truth.decoded(), own.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "relu", "gated-relu"])
def test_bounds_hold_on_real_models(name: str) -> None:
    site = local(of(name), lambda _: None)
    for tier in (*site.tiers, site.transition, site.coder):
        assert tier.bound >= tier.true * (1 - 1e-12)
    plain = site.plain()
    assert plain["whole"]["bound"] >= plain["whole"]["true"]


def test_the_gain_is_the_models_own_parameter() -> None:
    found, model = of("llama"), model_of("llama")
    own = [p.detach() for p in model.anatomy.layers[1].parameters() if p.dim() == 1]
    assert any(torch.equal(found.weights["gain"], each.double()) for each in own)
    assert float(found.weights["form"][2]) in (1e-6, 1e-5)


def test_sites_that_cannot_be_told_say_why() -> None:
    model = model_of("llama")
    behind = source_at(model, "resid_post.0")
    with pytest.raises(UsageError, match="Attention stands between"):
        local_sites(coder_at(behind.layout), model)
    squared = model_of("relu2")
    source = source_at(squared, "resid_mid.1")
    with pytest.raises(UsageError, match="no bound is proved"):
        local_sites(coder_at(source.layout), squared)


def test_codes_are_padded_with_nothing() -> None:
    z = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]]).double()
    index, strength = padded(z)
    assert strength.tolist() == [[2.0, 1.0], [0.0, 0.0], [3.0, 0.0]]
    back = torch.zeros_like(z).scatter_add_(1, index, strength)
    assert torch.equal(back, z)

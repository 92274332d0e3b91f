"""What interactions cannot be told of: one clear sentence each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf

from crosslens.activations import TokenPolicy
from crosslens.coder import AbsTopK, Coder, Difference, LayerConditioned, Layout, ReLU, Transcoder
from crosslens.errors import CrosslensError, UsageError
from crosslens.interactions.neurons.contributions import effective, mlp_sites
from crosslens.interactions.neurons.exact import interactions
from tests.interaction_sites import blocks, coder_at, source_at
from tests.test_lm_families import _GROUPED, WIDTH, tiny, wrapped


def test_coders_that_write_nothing_before_an_mlp_are_refused():
    model = tiny("llama")
    for site in ("attn_out.1", "resid_post.2", "embed"):
        source = source_at(model, site)
        with pytest.raises(UsageError, match=f"writes {site}: neither an MLP's input"):
            interactions(source, coder_at(source.layout), model)
    layout = source_at(model, "mlp_in.1", "mlp_out.1").layout
    with pytest.raises(UsageError, match=r"writes mlp_out\.1: neither"):
        mlp_sites(Coder(Transcoder()(layout, 8), ReLU()), model)


def test_rows_that_are_not_a_tokens_sites_are_refused():
    model, widths = tiny("llama"), (WIDTH, WIDTH)
    layout = Layout(("tiny/resid_mid.1", "chat/resid_mid.1"), widths)
    with pytest.raises(UsageError, match="difference of two models"):
        mlp_sites(Coder(Difference()(layout, 8), ReLU()), model)
    layout = Layout(("resid_mid.1", "resid_mid.2"), widths)
    with pytest.raises(UsageError, match="one site"):
        mlp_sites(Coder(LayerConditioned()(layout, 8), ReLU()), model)


def test_sites_of_another_model_are_refused():
    model = tiny("llama")
    coder = coder_at(Layout(("chat/resid_mid.1",), (WIDTH,)))
    with pytest.raises(UsageError, match="other models than 'tiny'"):
        mlp_sites(coder, model)
    coder = coder_at(Layout(("resid_mid.1",), (WIDTH + 1,)))
    with pytest.raises(UsageError, match="33 wide in this coder and 32 in 'tiny'"):
        effective(coder, model, "resid_mid.1")
    coder = coder_at(Layout(("resid_mid.1", "resid_mid.2"), (WIDTH, WIDTH)))
    with pytest.raises(UsageError, match=r"at 'resid_mid\.0'.*resid_mid\.1, resid_mid\.2"):
        effective(coder, model, "resid_mid.0")


def test_sources_of_something_else_are_refused():
    model = tiny("llama")
    source = source_at(model, "resid_mid.1")
    coder = coder_at(source_at(model, "resid_mid.2").layout)
    with pytest.raises(UsageError, match="are not the source's"):
        interactions(source, coder, model)
    other = replace(source, models={"tiny": tiny("qwen2")})
    with pytest.raises(UsageError, match="does not give the activations of 'tiny'"):
        interactions(other, coder_at(source.layout), model)


def test_an_unsupported_mlp_is_named():
    config = hf.MixtralConfig(**_GROUPED, num_local_experts=2)
    model = wrapped(hf.AutoModelForCausalLM.from_config(config).eval())
    source = source_at(model, "resid_mid.1")
    with pytest.raises(UsageError, match="Mixtral"):
        interactions(source, coder_at(source.layout), model)


@pytest.mark.parametrize("weights", ["W_dec", "b_dec", "W_enc", "b_enc"])
def test_a_coder_with_nan_is_refused(weights):
    model = tiny("llama")
    source = source_at(model, "resid_mid.1")
    coder = coder_at(source.layout)
    found = getattr(coder, weights)
    (found if isinstance(found, torch.Tensor) else found[0]).view(-1)[3] = torch.nan
    with pytest.raises(CrosslensError, match="NaN or infinite"):
        interactions(source, coder, model)


def test_negative_strengths_are_refused():
    model = tiny("llama")
    source = source_at(model, "resid_mid.1")
    with pytest.raises(CrosslensError, match="negative strengths"):
        interactions(source, coder_at(source.layout, AbsTopK(k=5)), model)


def test_a_code_without_entries_is_refused():
    model = tiny("llama")
    source = source_at(model, "resid_mid.1")
    coder = coder_at(source.layout, ReLU())
    coder.b_enc.fill_(-1e6)
    with pytest.raises(CrosslensError, match="No latent is active on any of 18 tokens"):
        interactions(source, coder, model)


def test_tokens_that_none_count_are_refused():
    model = tiny("llama")
    source = source_at(model, "resid_mid.1")
    none = replace(blocks(), docs_NT=torch.full((2, 9), -1, dtype=torch.int32))
    source = replace(source, blocks=none, policy=TokenPolicy())
    with pytest.raises(CrosslensError, match="keeps no token"):
        interactions(source, coder_at(source.layout), model)

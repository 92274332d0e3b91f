"""Direct logits of latents, against the formula written out for two kinds of final norm."""

from __future__ import annotations

import pytest
import torch

from crosslens.activations import site_layout
from crosslens.coder import Coder, Crosscoder, Group, ReLU, Wiring, transpose_init
from crosslens.explore import logits as logits_module
from crosslens.explore.logits import direct_logits
from crosslens.lm import ModelSpec, open_model


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return open_model(ModelSpec(path=str(tiny_model_folder), dtype="float32", device="cpu"))


def test_logits_equal_the_formula_for_a_norm_without_centring(model):
    layout = site_layout({"base": model}, ["resid_post.0", "resid_mid.2"])
    coder = Coder(Crosscoder()(layout, 9), ReLU())
    transpose_init(coder, 0.7, torch.Generator().manual_seed(5))
    table = direct_logits(coder, {"base": model}, 400)
    assert table is not None
    assert table.site == "resid_mid.2"
    weight_VD = model.module.lm_head.weight.float()
    gain_D = model.module.model.norm.weight.float()
    size = coder.wiring.read.widths[0]
    for latent in (1, 7):
        d = coder.W_dec[0][latent, size:].detach()
        x = d / d.norm() * size**0.5
        logits = weight_VD @ (gain_D * x / (x.square().mean() + 1e-6).sqrt())
        logits = logits - logits.mean()
        check_logits(table, latent, logits, rel=1e-4)


def test_logits_centre_where_the_norm_does_and_leave_its_bias_out(tmp_path, tiny_tokenizer):
    model = tiny_gpt2(tmp_path, tiny_tokenizer)
    norm, weight_VD = model.module.transformer.ln_f, model.module.lm_head.weight
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    layout = site_layout({"base": model}, ["resid_post.0", "mlp_in.1"])
    coder = Coder(Crosscoder()(layout, 4), ReLU())
    transpose_init(coder, 1.0, torch.Generator().manual_seed(0))
    table = direct_logits(coder, {"base": model}, len(tiny_tokenizer))
    assert table is not None
    assert table.site == "resid_post.0"
    d = coder.W_dec[0][2, :16].detach()
    x = d - d.mean()
    logits = weight_VD @ (norm.weight * x / x.square().mean().sqrt())
    check_logits(table, 2, (logits - logits.mean())[: len(tiny_tokenizer)], rel=1e-3)


def check_logits(table, latent, logits, rel):
    order = logits.argsort(descending=True)
    assert table.top_id_LK[latent].tolist() == order[:10].tolist()
    assert table.bottom_id_LK[latent].tolist() == order.flip(0)[:10].tolist()
    assert table.top_LK[latent].tolist() == pytest.approx(logits[order[:10]].tolist(), rel=rel)
    assert table.bottom_LK[latent].tolist() == pytest.approx(
        logits[order.flip(0)[:10]].tolist(), rel=rel
    )


def tiny_gpt2(folder, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"))


def test_latents_that_write_nowhere_have_no_logits(model):
    models = {"base": model}
    layout = site_layout(models, ["resid_post.0", "resid_post.2"])
    groups = (Group(2, layout.sites, layout.sites[:1]), Group(3, layout.sites, layout.sites))
    coder = Coder(Wiring(layout, layout, layout, groups), ReLU())
    transpose_init(coder, 1.0, torch.Generator().manual_seed(0))
    table = direct_logits(coder, models, 400)
    assert table is not None
    assert table.site == "resid_post.2"
    assert (table.top_id_LK[:2] == -1).all()
    assert (table.top_id_LK[2:] >= 0).all()


def test_a_coder_that_writes_no_residual_site_has_no_logits(model):
    models = {"base": model}
    coder = Coder(Crosscoder()(site_layout(models, ["mlp_in.1"]), 4), ReLU())
    assert direct_logits(coder, models, 400) is None


def test_slices_of_the_vocabulary_and_of_the_latents_join(model, monkeypatch):
    coder = Coder(Crosscoder()(site_layout({"base": model}, ["resid_post.1"]), 9), ReLU())
    transpose_init(coder, 1.0, torch.Generator().manual_seed(2))
    whole = direct_logits(coder, {"base": model}, 391)
    monkeypatch.setattr(logits_module, "_TOKENS_AT_ONCE", 100)
    monkeypatch.setattr(logits_module, "_LATENTS_AT_ONCE", 4)
    parts = direct_logits(coder, {"base": model}, 391)
    assert whole is not None
    assert parts is not None
    assert parts.top_id_LK.tolist() == whole.top_id_LK.tolist()
    assert parts.bottom_id_LK.tolist() == whole.bottom_id_LK.tolist()
    assert parts.top_LK == pytest.approx(whole.top_LK, rel=1e-5)
    assert whole.top_id_LK.max() < 391

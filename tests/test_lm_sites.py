"""Names of sites: this library's, TransformerLens's, Hugging Face's, and mistaken ones."""

from __future__ import annotations

import pytest

from crosslens.errors import UsageError
from crosslens.lm import split_site
from tests.test_lm_families import tiny


@pytest.mark.parametrize(
    ("site", "parts"),
    [
        ("resid_post.12", (None, "resid_post.12")),
        ("chat/resid_post.12", ("chat", "resid_post.12")),
        ("chat/resid_*", ("chat", "resid_*")),
    ],
)
def test_split_site(site, parts):
    assert split_site(site) == parts


def test_sites_in_order_of_depth():
    assert tiny("llama").sites()[:11] == (
        "embed",
        "resid_pre.0",
        "attn_in.0",
        "attn_out.0",
        "resid_mid.0",
        "mlp_in.0",
        "mlp_act.0",
        "mlp_out.0",
        "resid_post.0",
        "resid_pre.1",
        "attn_in.1",
    )
    assert tiny("llama").sites()[-3:] == ("resid_post.2", "final", "logits")
    assert len(tiny("llama").sites()) == 3 + 3 * 8
    assert len(tiny("phi").sites()) == 3 + 3 * 7


@pytest.mark.parametrize(
    ("alias", "site"),
    [
        ("hook_embed", "embed"),
        ("blocks.2.hook_resid_pre", "resid_pre.2"),
        ("blocks.2.ln1.hook_normalized", "attn_in.2"),
        ("blocks.0.hook_attn_out", "attn_out.0"),
        ("blocks.1.hook_resid_mid", "resid_mid.1"),
        ("blocks.1.ln2.hook_normalized", "mlp_in.1"),
        ("blocks.1.mlp.hook_post", "mlp_act.1"),
        ("blocks.1.hook_mlp_out", "mlp_out.1"),
        ("blocks.1.hook_resid_post", "resid_post.1"),
        ("ln_final.hook_normalized", "final"),
        ("hidden_states.0", "resid_pre.0"),
        ("hidden_states.2", "resid_post.1"),
        ("hidden_states.3", "final"),
        ("model.embed_tokens", "embed"),
        ("model.layers.1", "resid_post.1"),
        ("model.layers.1.self_attn", "attn_out.1"),
        ("model.layers.1.mlp", "mlp_out.1"),
        ("model.norm", "final"),
    ],
)
def test_aliases(alias, site):
    assert tiny("llama").resolve([alias]) == (site,)


def test_module_paths_are_the_models_own():
    assert tiny("gpt2").resolve(["transformer.h.1.attn"]) == ("attn_out.1",)
    gemma = tiny("gemma2")
    assert gemma.resolve(["model.layers.1.post_feedforward_layernorm"]) == ("mlp_out.1",)
    with pytest.raises(UsageError, match=r"Unknown site 'model\.layers\.1\.mlp'"):
        gemma.resolve(["model.layers.1.mlp"])  # a norm follows before it is added


def test_globs_aliases_and_repetitions_come_out_in_order_once():
    found = tiny("llama").resolve(
        ["resid_mid.*", "blocks.*.hook_resid_pre", "embed", "resid_mid.1", "*_act.[02]"]
    )
    assert found == (
        "embed",
        "resid_pre.0",
        "resid_mid.0",
        "mlp_act.0",
        "resid_pre.1",
        "resid_mid.1",
        "resid_pre.2",
        "resid_mid.2",
        "mlp_act.2",
    )


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("resid_pots.1", r"Unknown site 'resid_pots\.1'\. Did you mean resid_post\.1"),
        ("blocks.1.hook_resid_prost", r"Did you mean blocks\.1\.hook_resid_post"),
        ("zzz", r"The kinds are: embed, resid_pre\.N, attn_in\.N, .*, final, logits"),
        ("resid_post.3", "beyond this model's depth: it has 3 layers, numbered 0 to 2"),
        ("blocks.12.hook_resid_mid", "has 3 layers"),
        ("model.layers.3.mlp", "has 3 layers"),
        ("hidden_states.4", "has 3 layers"),
        ("resid_past.*", r"No site matches 'resid_past\.\*'\. The kinds are: embed, resid_pre\.N"),
        ("chat/resid_post.1", "Unknown site"),
        ("", "Unknown site ''"),
    ],
)
def test_names_that_name_nothing(pattern, message):
    with pytest.raises(UsageError, match=message):
        tiny("llama").resolve(["embed", pattern])


@pytest.mark.parametrize("family", ["phi", "neox-parallel"])
@pytest.mark.parametrize("name", ["resid_mid.1", "blocks.1.hook_resid_mid", "resid_mid.*"])
def test_no_middle_where_attention_and_mlp_are_parallel(family, name):
    with pytest.raises(UsageError, match="parallel, so there is no residual between them"):
        tiny(family).resolve([name])


def test_too_deep_a_middle_in_a_parallel_model_is_still_no_middle():
    with pytest.raises(UsageError, match="parallel"):
        tiny("phi").resolve(["resid_mid.9"])


def test_width_takes_one_site():
    assert tiny("llama").width("blocks.1.mlp.hook_post") == 48
    with pytest.raises(UsageError, match="names 3 sites"):
        tiny("llama").width("resid_mid.*")

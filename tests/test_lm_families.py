"""Tiny random models of every family, what their sites are, and that they are found unaided."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import transformers as hf

from crosslens.errors import CrosslensError
from crosslens.lm.anatomy import find_anatomy
from crosslens.lm.model import LanguageModel
from crosslens.lm.spec import ModelSpec

VOCABULARY, WIDTH, INNER, LAYERS = 97, 32, 48, 3
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS} | {
    "num_attention_heads": 4,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}
_SIGLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS} | {
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Parts:
    """Names inside a family's layer, read off its source by a person."""

    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    final: str = "model.norm"
    attention: str = "self_attn"
    attention_sum: str = "self_attn"  # whose output is added to the residual
    mid: str | None = "post_attention_layernorm"  # whose input is the residual in the middle
    mlp: str = "mlp"
    mlp_sum: str = "mlp"
    down: str = "mlp.down_proj"
    mlp_path: tuple[str, ...] = ("post_attention_layernorm", "mlp")  # from the residual to the sum


_PRE_NORM = Parts()
_SANDWICH = Parts(
    attention_sum="post_attention_layernorm",
    mid="pre_feedforward_layernorm",
    mlp_sum="post_feedforward_layernorm",
    mlp_path=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
)
_GPT2 = Parts(
    layers="transformer.h",
    embed="transformer.wte",
    final="transformer.ln_f",
    attention="attn",
    attention_sum="attn",
    mid="ln_2",
    down="mlp.c_proj",
    mlp_path=("ln_2", "mlp"),
)
_NEOX = Parts(
    layers="gpt_neox.layers",
    embed="gpt_neox.embed_in",
    final="gpt_neox.final_layer_norm",
    attention="attention",
    attention_sum="attention",
    down="mlp.dense_4h_to_h",
)
FAMILIES = {
    "llama": (lambda: hf.LlamaConfig(**_GROUPED), _PRE_NORM),
    "mistral": (lambda: hf.MistralConfig(**_GROUPED, sliding_window=4), _PRE_NORM),
    "qwen2": (lambda: hf.Qwen2Config(**_GROUPED), _PRE_NORM),
    "qwen3": (lambda: hf.Qwen3Config(**_GROUPED, head_dim=8), _PRE_NORM),
    "phi3": (lambda: hf.Phi3Config(**_GROUPED), _PRE_NORM),
    "olmo": (lambda: hf.OlmoConfig(**_GROUPED), _PRE_NORM),
    "olmo2": (
        lambda: hf.Olmo2Config(**_GROUPED),
        Parts(
            attention_sum="post_attention_layernorm",
            mid="mlp",
            mlp_sum="post_feedforward_layernorm",
            mlp_path=("mlp", "post_feedforward_layernorm"),
        ),
    ),
    "gemma2": (lambda: hf.Gemma2Config(**_GEMMA), _SANDWICH),
    "gemma3": (lambda: hf.Gemma3TextConfig(**_GEMMA), _SANDWICH),
    "gemma3-vision": (
        lambda: hf.Gemma3Config(
            text_config=_GEMMA | {"final_logit_softcapping": None},
            vision_config=_SIGLIP,
            mm_tokens_per_image=4,
            image_token_id=90,
            boi_token_id=91,
            eoi_token_id=92,
        ),
        Parts(
            **(_SANDWICH.__dict__)
            | {
                "layers": "model.language_model.layers",
                "embed": "model.language_model.embed_tokens",
            }
            | {"final": "model.language_model.norm"}
        ),
    ),
    "gpt2": (
        lambda: hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_inner=INNER
        ),
        _GPT2,
    ),
    "neox-parallel": (
        lambda: hf.GPTNeoXConfig(**_COMMON, use_parallel_residual=True),
        Parts(**(_NEOX.__dict__ | {"mid": None})),
    ),
    "neox-sequential": (lambda: hf.GPTNeoXConfig(**_COMMON, use_parallel_residual=False), _NEOX),
    "phi": (
        lambda: hf.PhiConfig(**_COMMON),
        Parts(
            final="model.final_layernorm",
            mid=None,
            down="mlp.fc2",
            mlp_path=("input_layernorm", "mlp"),
        ),
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def tiny(family: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A random model whose every weight, biases and norms too, is far from its default."""
    torch.manual_seed(list(FAMILIES).index(family))
    module = hf.AutoModelForCausalLM.from_config(FAMILIES[family][0]()).eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return wrapped(module.to(dtype).requires_grad_(False))


def wrapped(module: torch.nn.Module) -> LanguageModel:
    spec = ModelSpec(path="tiny", dtype="float32", device="cpu")
    return LanguageModel("tiny", spec, module, None, find_anatomy(module))


def tokens(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 89, (2, 9), generator=generator, dtype=torch.int32)


def part(family: str, layer: int, name: str) -> torch.nn.Module:
    root = FAMILIES[family][1].layers
    return tiny(family).module.get_submodule(f"{root}.{layer}" + (f".{name}" if name else ""))


@every_family
def test_taps_are_on_the_modules_a_person_would_choose(family):
    model, parts = tiny(family), FAMILIES[family][1]
    at = {site: (tap.module, tap.side) for site, tap in model.anatomy.taps.items()}
    assert at["embed"] == (model.module.get_submodule(parts.embed), "output")
    assert at["final"] == (model.module.get_submodule(parts.final), "output")
    for layer in range(LAYERS):
        expected = {
            "resid_pre": (part(family, layer, ""), "input"),
            "attn_in": (part(family, layer, parts.attention), "input"),
            "attn_out": (part(family, layer, parts.attention_sum), "output"),
            "mlp_in": (part(family, layer, parts.mlp), "input"),
            "mlp_act": (part(family, layer, parts.down), "input"),
            "mlp_out": (part(family, layer, parts.mlp_sum), "output"),
            "resid_post": (part(family, layer, ""), "output"),
        }
        if parts.mid is not None:
            expected["resid_mid"] = (part(family, layer, parts.mid), "residual")
        found = {k.split(".")[0]: v for k, v in at.items() if k.endswith(f".{layer}")}
        assert found == expected


@every_family
def test_sizes(family):
    model = tiny(family)
    inner = FAMILIES[family][0]().get_text_config()
    assert (model.n_layers, model.d_model) == (LAYERS, WIDTH)
    assert model.width("mlp_act.1") == (getattr(inner, "intermediate_size", None) or INNER)
    assert model.width("resid_post.2") == WIDTH
    assert model.width("logits") == VOCABULARY


def test_layers_that_scale_what_they_add_are_refused():
    """Granite multiplies what it adds to the residual: `attn_out` would not be the summand."""
    config = hf.GraniteConfig(**_GROUPED, residual_multiplier=0.5)
    with pytest.raises(CrosslensError, match="does not simply add"):
        find_anatomy(hf.AutoModelForCausalLM.from_config(config).eval())


def test_a_mixture_of_experts_has_no_mlp_act():
    config = hf.MixtralConfig(**_GROUPED, num_local_experts=2)
    model = wrapped(hf.AutoModelForCausalLM.from_config(config).eval())
    assert "mlp_act.0" not in model.sites()
    assert "mlp_out.0" in model.sites()
    with pytest.raises(CrosslensError, match="mixture of experts"):
        model.resolve(["mlp_act.0"])


def test_layers_without_separate_parts_are_refused():
    config = hf.OPTConfig(**_COMMON, ffn_dim=INNER, word_embed_proj_dim=WIDTH)
    with pytest.raises(CrosslensError, match="not one attention and one MLP"):
        find_anatomy(hf.AutoModelForCausalLM.from_config(config).eval())


def test_a_model_without_attention_is_refused():
    config = hf.RwkvConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS)
    with pytest.raises(CrosslensError, match="layers of RwkvForCausalLM were not found"):
        find_anatomy(hf.AutoModelForCausalLM.from_config(config).eval())

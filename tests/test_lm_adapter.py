"""PEFT adapters: in effect, unmerged, and refused when they do not fit."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import ModelSpec, open_model, open_models

TOKENS = torch.arange(3, 12)[None]


def write_adapter(base, folder: Path, **changes) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a name of old
        adapted = get_peft_model(base, LoraConfig(**settings | changes))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_()
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model_folder) -> Path:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    return write_adapter(base, tmp_path_factory.mktemp("adapter"))


def opened(model: Path, adapter: object = None, dtype: str = "float32"):
    path = None if adapter is None else str(adapter)
    return open_model(ModelSpec(path=str(model), adapter=path, dtype=dtype, device="cpu"))


def test_it_computes_what_the_merged_weights_compute(tiny_model_folder, adapter):
    """W + (alpha / r) B A, put into the plain model by hand."""
    plain, adapted = opened(tiny_model_folder), opened(tiny_model_folder, adapter)
    saved = load_file(adapter / "adapter_model.safetensors")
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] / 2
    before = plain.run(TOKENS, {})
    for name, A in saved.items():
        if "lora_A" in name:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            update = scale * saved[name.replace("lora_A", "lora_B")] @ A
            plain.module.get_submodule(path).weight.add_(update)
    torch.testing.assert_close(adapted.run(TOKENS, {}), plain.run(TOKENS, {}))
    assert not torch.allclose(before, plain.run(TOKENS, {}))
    for site, x in plain.capture(TOKENS, ["*"]).items():
        torch.testing.assert_close(adapted.capture(TOKENS, [site])[site], x)


def test_it_stays_apart_from_the_base_weights(tiny_model_folder, adapter):
    model, plain = opened(tiny_model_folder, adapter), opened(tiny_model_folder)
    down = model.module.get_submodule("model.layers.1.mlp.down_proj")
    base = plain.module.get_submodule("model.layers.1.mlp.down_proj")
    assert torch.equal(down.base_layer.weight, base.weight)
    assert model.sites() == plain.sites()
    assert model.width("mlp_act.1") == 64
    assert model.identity()["adapter"] == str(adapter)
    assert not any(weight.requires_grad for weight in model.module.parameters())


def specs(model: Path, **adapters: Path | None) -> dict[str, ModelSpec]:
    return {
        name: ModelSpec(path=str(model), adapter=path and str(path), dtype="float32", device="cpu")
        for name, path in adapters.items()
    }


def addresses(model) -> set[int]:
    return {weight.data_ptr() for weight in model.module.parameters()}


@pytest.mark.parametrize("order", [("base", "chat", "other"), ("other", "chat", "base")])
def test_models_on_one_trunk_share_its_weights(tiny_model_folder, adapter, tmp_path, order):
    """And compute to the bit what each computes alone."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    other = write_adapter(base, tmp_path, target_modules=["v_proj"], use_dora=True)
    paths = {"base": None, "chat": adapter, "other": other}
    wanted = specs(tiny_model_folder, **{name: paths[name] for name in order})
    models = open_models(wanted)
    assert tuple(models) == order
    trunk = addresses(models["base"])
    for name, model in models.items():
        alone = open_model(wanted[name], name)
        assert torch.equal(model.run(TOKENS, {}), alone.run(TOKENS, {})), name
        ours, theirs = model.capture(TOKENS, ["*"]), alone.capture(TOKENS, ["*"])
        assert all(torch.equal(x, theirs[site]) for site, x in ours.items())
        assert trunk <= addresses(model)
        assert model.identity() == alone.identity()
        assert model.tokenizer is models["base"].tokenizer
        assert not any(weight.requires_grad for weight in model.module.parameters())
    assert not trunk & addresses(open_model(wanted["base"]))
    outputs = [model.run(TOKENS, {}) for model in models.values()]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


def test_other_trunks_are_not_shared(tiny_pair, adapter):
    wanted = specs(tiny_pair["base"], base=None) | specs(tiny_pair["chat"], chat=adapter)
    models = open_models(wanted)
    assert not addresses(models["base"]) & addresses(models["chat"])


@pytest.mark.parametrize(
    "kind",
    [{"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}],
    ids=lambda kind: next(iter(kind)),
)
def test_adapters_that_write_into_the_weights_get_their_own(tiny_model_folder, tmp_path, kind):
    """The base stays what it is, whatever the adapter does."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    folder = write_adapter(base, tmp_path, **kind)
    wanted = specs(tiny_model_folder, base=None, chat=folder)
    models = open_models(wanted)
    assert not addresses(models["base"]) & addresses(models["chat"])
    for name, spec in wanted.items():
        alone = open_model(spec).run(TOKENS, {})
        torch.testing.assert_close(models[name].run(TOKENS, {}), alone)


def test_it_takes_the_models_dtype(tiny_model_folder, adapter):
    model = opened(tiny_model_folder, adapter, "bfloat16")
    assert {weight.dtype for weight in model.module.parameters()} == {torch.bfloat16}


def test_without_peft(tiny_model_folder, adapter, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'crosslens\[diff\]'"):
        opened(tiny_model_folder, adapter)


def other_model(**changes) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4} | changes
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes, **heads))


@pytest.mark.parametrize(
    ("sizes", "targets", "reason"),
    [
        ({"hidden_size": 16}, ["q_proj"], "size mismatch"),
        ({"num_hidden_layers": 5}, ["q_proj"], "weights for layers that are not there"),
        ({"num_hidden_layers": 3}, ["q_proj"], "lacks weights"),
    ],
)
def test_an_adapter_for_another_base(tiny_model_folder, tmp_path, sizes, targets, reason):
    folder = write_adapter(other_model(**sizes), tmp_path, target_modules=targets)
    with pytest.raises(UsageError, match=f"does not fit LlamaForCausalLM: .*{reason}"):
        opened(tiny_model_folder, folder)


def changed(adapter: Path, folder: Path, **settings) -> Path:
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_for_modules_that_are_not_there(tiny_model_folder, adapter, tmp_path):
    folder = changed(adapter, tmp_path, target_modules=["c_attn"])
    with pytest.raises(UsageError, match=r"does not fit .*c_attn"):
        opened(tiny_model_folder, folder)


def test_prompt_tuning_is_no_change_of_layers(tiny_model_folder, adapter, tmp_path):
    folder = changed(adapter, tmp_path, peft_type="PROMPT_TUNING")
    with pytest.raises(UsageError, match="of the kind PROMPT_TUNING"):
        opened(tiny_model_folder, folder)


def test_a_damaged_adapter(tiny_model_folder, adapter, tmp_path):
    folder = changed(adapter, tmp_path)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CrosslensError, match=r"adapter_config\.json is damaged"):
        opened(tiny_model_folder, folder)
    changed(adapter, tmp_path)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CrosslensError, match="is damaged: "):
        opened(tiny_model_folder, folder)


def test_pickled_adapters_are_refused(tiny_model_folder, adapter, tmp_path):
    folder = changed(adapter, tmp_path)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no adapter_model\.safetensors"):
        opened(tiny_model_folder, folder)


def test_weights_that_no_layer_takes(tiny_model_folder, adapter, tmp_path):
    folder = changed(adapter, tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file(weights | {name: torch.ones(2, 32)}, folder / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"layers that are not there .*up_proj"):
        opened(tiny_model_folder, folder)


def test_no_such_adapter(tiny_model_folder):
    with pytest.raises(CrosslensError, match="no-such/adapter"):
        opened(tiny_model_folder, "no-such/adapter")

"""Opening a model: from where, in which form, and what is said when it cannot be."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import ModelSpec, open_model, open_tokenizer


def spec(path: object, **changes) -> ModelSpec:
    return ModelSpec(**{"path": str(path), "dtype": "float32", "device": "cpu"} | changes)


@pytest.fixture
def folder(tmp_path, tiny_model_folder) -> Path:
    """A copy of the tiny model's folder, to be damaged."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def refusal(path: object, **changes) -> str:
    with pytest.raises(CrosslensError) as caught:
        open_model(spec(path, **changes))
    message = str(caught.value)
    assert message.endswith((".", "?", ")"))
    assert "\n" not in message
    return message


def test_a_folder(tiny_model_folder, tiny_tokenizer):
    model = open_model(spec(tiny_model_folder), "chat")
    weights = load_file(tiny_model_folder / "model.safetensors")
    embed = model.capture(torch.arange(9, dtype=torch.int32)[None], ["embed"])["embed"]
    torch.testing.assert_close(embed[0], weights["model.embed_tokens.weight"][:9])
    assert (model.name, model.n_layers, model.d_model) == ("chat", 4, 32)
    assert not model.module.training
    assert not any(weight.requires_grad for weight in model.module.parameters())
    assert model.tokenizer("import json")["input_ids"] == tiny_tokenizer("import json")["input_ids"]


def test_identity_goes_into_json_and_tells_models_apart(tiny_model_folder):
    found = open_model(spec(tiny_model_folder)).identity()
    assert json.loads(json.dumps(found)) == found
    assert found | {"tokenizer_hash": ""} == {
        "path": str(tiny_model_folder),
        "revision": None,
        "adapter": None,
        "dtype": "float32",
        "architecture": "LlamaForCausalLM",
        "n_layers": 4,
        "d_model": 32,
        "tokenizer_hash": "",
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_of_weights_activations_and_logits(tiny_model_folder, dtype):
    model = open_model(spec(tiny_model_folder, dtype=dtype))
    tokens = torch.arange(9)[None]
    wanted = getattr(torch, dtype)
    assert {weight.dtype for weight in model.module.parameters()} == {wanted}
    assert model.capture(tokens, ["resid_mid.1"])["resid_mid.1"].dtype == wanted
    assert model.run(tokens, {}).dtype == wanted


def test_rotary_frequencies_stay_exact_in_bfloat16(tiny_model_folder):
    frequencies = open_model(spec(tiny_model_folder, dtype="bfloat16")).module.model.rotary_emb
    assert frequencies.inv_freq.dtype == torch.float32


def test_nothing_is_printed_and_no_setting_is_left_changed(tiny_model_folder, capfd):
    library = logging.getLogger("transformers")
    before = library.level, transformers.utils.logging.is_progress_bar_enabled()
    open_model(spec(tiny_model_folder))
    assert capfd.readouterr() == ("", "")
    assert (library.level, transformers.utils.logging.is_progress_bar_enabled()) == before


def test_the_tokenizer_alone_needs_no_weights(folder):
    (folder / "model.safetensors").write_bytes(b"not read")
    assert open_tokenizer(spec(folder)).bos_token == "<bos>"


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/model", "a/b/c", "gone.gguf", "~/nowhere"])
def test_a_path_that_does_not_exist(path):
    message = refusal(path)
    assert f"The model {path!r} does not exist" in message
    assert "smollm2" in message


def test_a_hub_id_that_cannot_be_reached():
    message = refusal("crosslens-tests/none")  # HF_HUB_OFFLINE is set for all tests
    assert "neither a file or folder here nor in the local hub cache" in message
    assert "Check the name and the network" in message


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "There is no 'some/model'"),
        (errors.GatedRepoError, "Accept its terms at https://huggingface.co/some/model"),
        (errors.RevisionNotFoundError, "no revision 'v9' of it"),
        (errors.HfHubHTTPError, "some/model at v9 is neither a file"),
    ],
)
def test_what_the_hub_answers(monkeypatch, kind, message):
    def answer(*_, **__):
        raise kind("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    assert message in refusal("some/model", revision="v9")


def test_a_hub_model_is_its_snapshot(monkeypatch, tiny_model_folder, tmp_path):
    snapshot = Path(shutil.copytree(tiny_model_folder, tmp_path / "0123abc"))
    asked: list[object] = []

    def download(repo, *, revision, allow_patterns, ignore_patterns):
        asked.extend([repo, revision])
        assert "*.bin" not in allow_patterns
        assert "*.py" not in allow_patterns
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = open_model(spec("some/model", revision="main"))
    assert asked == ["some/model", "main"]
    assert model.identity()["revision"] == "0123abc"


@pytest.mark.parametrize("path", ["smollm2", "."])
def test_only_hub_models_have_revisions(path):
    assert "revision 'main' was asked for" in refusal(path, revision="main")


def test_a_folder_without_a_config(tmp_path):
    assert "it has no config.json." in refusal(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"")
    assert f"give the path {tmp_path / 'model.gguf'}" in refusal(tmp_path)


def test_a_file_that_is_no_gguf(folder):
    assert "not a .gguf file" in refusal(folder / "model.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "nonesuch"}', "{}"])
def test_a_config_that_says_nothing(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_pickled_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "copied incompletely" in refusal(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    assert "only pickled ones (pytorch_model.bin), which can run code" in refusal(folder)


def test_a_models_own_code_is_not_run(folder):
    (folder / "own.py").write_text("raise SystemExit('ran')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "Python code of its own, which crosslens does not run" in refusal(folder)


def test_not_a_causal_language_model(folder):
    transformers.T5Config(vocab_size=99, d_model=32).save_pretrained(folder)
    assert "is a 't5', which is not a causal language model" in refusal(folder)


def test_weights_cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "damaged or incomplete" in refusal(folder)


def test_missing_weights_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors are missing (such as model.layers.2.mlp.up_proj.weight)" in refusal(folder)


def test_weights_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    assert "could not be loaded" in refusal(folder)


def test_no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "No tokenizer could be loaded" in refusal(folder)


@pytest.mark.parametrize("changes", [{"dtype": "bfloat"}, {"device": "abacus"}])
def test_device_and_dtype_are_checked_before_anything_is_fetched(changes):
    with pytest.raises(UsageError, match=r"bfloat16|abacus"):
        open_model(spec("some/model", **changes))

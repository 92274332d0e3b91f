"""Bad input is refused by the command line: exit code 2, one sentence with the field's name, and
nothing is written."""

from __future__ import annotations

import shutil

import pytest

from crosslens.cli import main
from crosslens.recipes import RECIPES
from tests.test_recipes import tiny_models


@pytest.mark.parametrize(
    ("start", "change", "words"),
    [
        ("topk_sea", [], ("topk_sea", "topk_sae")),
        ("groupmax_smoke", ["--coder.activation.k", "5"], ("coder.activation.k (5)", "96")),
        ("topk_sae_smoke", ["--coder.activation.k", "97"], ("k is 97", "96 latents")),
        ("clt_topk_smoke", ["--coder.latents", "97"], ("coder.latents (97)", "2 layers")),
        ("clt_topk_smoke", ["--sites", "mlp_out.0", "mlp_out.1"], ("sites to read", "--sites")),
        ("clt_topk_smoke", ["--sites", "mlp_in.1", "mlp_out.0"], ("mlp_in.1", "no output")),
        ("skip_transcoder_smoke", ["--sites", "mlp_in.2", "mlp_out.1"], ("mlp_out.1", "after it")),
        ("weakly_causal_smoke", ["--wiring.strict"], ("strictly causal", "mlp_out")),
        ("dedicated_smoke", ["--wiring.exclusive", "0.5"], ("wiring.exclusive", "0.5")),
        ("jumprelu_tanh_smoke", ["--objective.tanh.weight", "-1"], ("objective.tanh", "-1")),
        ("jumprelu_tanh_smoke", ["--objective.pre-act.weight", "-1"], ("objective.pre_act", "-1")),
        ("l1_crosscoder_smoke", ["--objective.l1.weight", "-1"], ("objective.l1", "-1")),
        (
            "designated_shared_smoke",
            ["--objective.tanh.group-factors", "-1", "1"],
            ("objective.tanh.group_factors", "-1"),
        ),
        ("topk_sae_smoke", ["--objective.aux.weight", "-1"], ("objective.aux", "-1")),
        ("topk_sae_smoke", ["--optimizer.lr", "-1"], ("optimizer", "lr", "-1")),
        ("topk_sae_smoke", ["--optimizer.warmup", "21"], ("optimizer.warmup", "21", "20 steps")),
        ("topk_sae_smoke", ["--optimizer.decay", "21 steps"], ("optimizer.decay", "20 steps")),
        ("topk_sae_smoke", ["--fit.resample-every", "21"], ("fit.resample_every", "20 steps")),
        ("l1_crosscoder_smoke", ["--objective.l1.ramp", "2k tokens"], ("objective.l1.ramp",)),
        ("l1_crosscoder_smoke", ["--objective.l1.ramp", "1.5"], ("l1", "ramp", "1.5")),
        ("topk_sae_smoke", ["--objective.l0.weight", "1"], ("objective.l0", "jumprelu")),
        ("topk_sae_smoke", ["--objective.delta.weight", "1"], ("objective.delta", "two models")),
        ("topk_sae_smoke", ["--coder.firing-rate", "0.1"], ("coder.firing_rate", "topk")),
        ("skip_transcoder_smoke", ["--coder.center"], ("enter", "writ")),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    start, change, words, tiny_pair, tmp_path, capsys
):
    models = tiny_models(start, tiny_pair) if start.removesuffix("_smoke") in RECIPES else []
    given = [
        "train",
        "--recipe",
        start,
        *models,
        *change,
        "--quiet",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(given) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for word in words:
        assert word.lower() in message.lower(), message
    assert not (tmp_path / "run").exists()


def test_tied_decoders_of_unequal_widths_are_refused(tiny_pair, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = tmp_path / "wide"
    shutil.copytree(tiny_pair["base"], wide)
    config = LlamaConfig.from_pretrained(wide)
    config.hidden_size, config.head_dim = 40, 10
    LlamaForCausalLM(config).save_pretrained(wide)
    given = ["train", "--recipe", "designated_shared_smoke", "--models.base.path",
             str(tiny_pair["base"]), "--models.chat.path", str(wide), "--quiet"]  # fmt: skip
    assert main([*given, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "same widths" in message
    assert "(32,)" in message
    assert "(40,)" in message
    assert not (tmp_path / "run").exists()

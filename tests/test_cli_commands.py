"""The commands as their users call them: what they print, what they leave, how they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from crosslens.cli import main
from crosslens.coder import load


def flags(folder: Path, out: Path) -> list[str]:
    return [
        "--models.base.path", str(folder), "--models.base.dtype", "float32",
        "--models.base.device", "cpu", "--sites", "resid_mid.1", "resid_post.2",
        "--text.tokens", "1500", "--text.heldout", "300", "--text.block", "32",
        "--coder.latents", "48", "--coder.activation.k", "4", "--optimizer.warmup", "2",
        "--fit.steps", "12", "--fit.batch", "64", "--fit.dtype", "float32", "--fit.device", "cpu",
        "--fit.heldout-rows", "64", "--fit.checkpoint-every", "6", "--fit.calibration-tokens",
        "256", "--out", str(out),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_folder) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", *flags(tiny_model_folder, out)]) == 0
    return out


def last_json(capsys) -> dict:
    """stdout holds one JSON object and nothing else."""
    return json.loads(capsys.readouterr().out)


def refused(capsys, argv: list[str], code: int, *words: str) -> None:
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for word in words:
        assert word in message, message


def test_train_says_what_came_out(capsys, tmp_path, tiny_model_folder):
    assert main(["train", *flags(tiny_model_folder, tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert "held-out FVU" in captured.out
    assert f"crosslens evaluate {tmp_path / 'run'}" in captured.out
    assert "train: 12/12 steps" in captured.err
    assert "\x1b" not in captured.out + captured.err, "no colour where nobody is looking"


def test_train_json(capsys, tmp_path, tiny_model_folder):
    assert main(["train", *flags(tiny_model_folder, tmp_path / "run"), "--json"]) == 0
    found = last_json(capsys)
    assert found["steps"] == 12
    assert found["usage"]["most"] - found["usage"]["least"] <= 1
    assert set(found["heldout"]) == {"fvu", "l0", "dead", "sites"}


def test_evaluate_json_has_the_documented_shape(capsys, trained):
    assert main(["evaluate", str(trained), "--json", "--splice-tokens", "128"]) == 0
    found = last_json(capsys)
    sites = {"resid_mid.1", "resid_post.2"}
    assert {"tokens", "l0", "dead", "fvu", "sites", "splice"} <= set(found)
    assert set(found["sites"]) == set(found["splice"]) == sites
    assert found["tokens"] >= 300
    assert json.loads((trained / "evaluation.json").read_text()) == found
    assert main(["evaluate", str(trained), "--splice-tokens", "0"]) == 0
    assert "held-out tokens" in capsys.readouterr().out


def test_runs_lists_them(capsys, trained):
    assert main(["runs", str(trained.parent), "--json"]) == 0
    (facts,) = last_json(capsys)["runs"]
    assert facts["state"] == "finished"
    assert (facts["step"], facts["steps"], facts["sites"]) == (12, 12, 2)
    assert main(["runs", str(trained.parent)]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["runs", str(trained / "data")]) == 0
    assert "No runs" in capsys.readouterr().out


def test_resume_of_a_finished_run_changes_nothing(capsys, trained):
    before = (trained / "coder" / "coder.safetensors").read_bytes()
    assert main(["resume", str(trained), "--json"]) == 0
    assert last_json(capsys)["steps"] == 12
    assert (trained / "coder" / "coder.safetensors").read_bytes() == before


def test_print_config_round_trips(capsys, tmp_path, tiny_model_folder):
    given = flags(tiny_model_folder, tmp_path / "run")
    assert main(["train", *given, "--print-config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(capsys, tmp_path, tiny_model_folder):
    given = flags(tiny_model_folder, tmp_path / "run")
    assert main(["train", *given, "--dry-run", "--json"]) == 0
    found = last_json(capsys)
    assert found["sites"] == {"resid_mid.1": 32, "resid_post.2": 32}
    assert found["parameters"] == 48 * (64 + 64 + 1) + 64
    # Rows to train on and rows held out, in bfloat16; for each of the first where it is and what
    # it is, and a count of its uses.
    assert found["memory_buffer"] == (1500 + 64) * 64 * 2 + 1500 * (3 * 8 + 4)
    assert found["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_predicted_parameters_are_the_real_ones(trained, capsys, tmp_path, tiny_model_folder):
    main(["train", *flags(tiny_model_folder, tmp_path / "run"), "--dry-run", "--json"])
    coder = load(trained)
    assert last_json(capsys)["parameters"] == sum(p.numel() for p in coder.parameters())


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--models.base.path", "no/such/folder/"], 2, ("no/such/folder",)),
        (["--sites", "resid_mdi.1"], 2, ("resid_mdi.1", "resid_mid.1")),
        (["--sites", "resid_mid.9"], 2, ("resid_mid.9", "4 layers")),
        (["--text.corpora.main.source", "no/such.txt"], 2, ("no/such.txt",)),
        (["--coder.activation.k", "64"], 2, ("k is 64", "48 latents")),
        (["--fit.batch", "4096"], 2, ("fewer than one batch of 4096",)),
        (["--fit.dtype", "bfloat17"], 2, ("bfloat17", "bfloat16")),
        (["--fit.device", "cuda:77"], 2, ("cuda:77",)),
        (["--coder.latnets", "4"], 2, ("--coder.latnets", "--coder.latents")),
        (["--fit.steps", "many"], 2, ("many",)),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence(capsys, tmp_path, tiny_model_folder, change, code, words):
    given = [*flags(tiny_model_folder, tmp_path / "run"), *change]
    refused(capsys, ["train", "--quiet", *given], code, *words)
    assert main(["train", "--quiet", *flags(tiny_model_folder, tmp_path / "run")]) == 0


def test_an_empty_corpus_is_told(capsys, tmp_path, tiny_model_folder):
    (tmp_path / "empty.txt").write_text("")
    change = ["--text.corpora.main.source", str(tmp_path / "empty.txt")]
    given = [*flags(tiny_model_folder, tmp_path / "run"), *change]
    refused(capsys, ["train", "--quiet", *given], 1, "no text")


def test_models_with_other_tokenizers_are_told(
    capsys, tmp_path, tiny_model_folder, other_tokenizer
):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    other_tokenizer.save_pretrained(other)
    given = flags(tiny_model_folder, tmp_path / "run")
    given += ["--models.chat.path", str(other), "--models.chat.device", "cpu"]
    refused(capsys, ["train", "--quiet", *given], 2, "different tokenizers")
    assert not (tmp_path / "run").exists()


def test_two_models_in_step(capsys, tmp_path, tiny_model_folder):
    given = flags(tiny_model_folder, tmp_path / "run")
    given += ["--models.chat.path", str(tiny_model_folder), "--models.chat.dtype", "float32"]
    assert main(["train", "--quiet", *given]) == 0
    coder = load(tmp_path / "run")
    assert coder.wiring.read.sites == (
        "base/resid_mid.1", "base/resid_post.2", "chat/resid_mid.1", "chat/resid_post.2"
    )  # fmt: skip
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--splice-tokens", "64"]) == 0
    assert set(last_json(capsys)["splice"]) == set(coder.wiring.read.sites)


def test_activations_that_are_not_finite_are_told(capsys, tmp_path, tiny_model_folder):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    given = flags(broken, tmp_path / "run")
    refused(capsys, ["train", "--quiet", *given], 1, "resid_post.2", "NaN")


def test_a_full_disk_keeps_the_last_checkpoint(capsys, tmp_path, tiny_model_folder, monkeypatch):
    import errno

    import safetensors.torch

    real = safetensors.torch.save_file
    calls = iter(range(1000))

    def filling_up(tensors, path, *args):
        # Two files of blocks, then three of the checkpoint at step 6; the disk fills at step 12.
        if next(calls) >= 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, *args)

    monkeypatch.setattr(safetensors.torch, "save_file", filling_up)
    given = flags(tiny_model_folder, tmp_path / "run")
    refused(capsys, ["train", "--quiet", *given], 1, "disk is full", "crosslens resume")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-6"]
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert load(tmp_path / "run").wiring.n_latents == 48


def test_not_a_run(capsys, tmp_path):
    for command in ("resume", "evaluate"):
        refused(capsys, [command, str(tmp_path)], 2, "is not a run")


def test_a_run_is_not_trained_over(capsys, trained, tiny_model_folder):
    refused(capsys, ["train", *flags(tiny_model_folder, trained)], 2, "is a run already")

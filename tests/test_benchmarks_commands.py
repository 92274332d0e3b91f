"""The benchmarks of growth and of whole runs, without running them."""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import end_to_end, growth, ours, run_all
from benchmarks.arena import GB, ROOT, likely_bytes
from benchmarks.growth import MARGIN, SWEEPS, Seen, predicted
from benchmarks.page import page
from benchmarks.task import SHAPES

FACTS = {
    "cpu": "A CPU",
    "usable_cores": 2,
    "flags": [],
    "memory_gb": 8,
    "system": "Linux",
    "python": "3",
}


def test_memory_is_predicted_from_the_two_points_before():
    shape = SHAPES["demo"]
    assert predicted(shape, 4, []) == likely_bytes(shape)
    assert predicted(shape, 4, [Seen(1, 10)]) == likely_bytes(shape)
    seen = [Seen(1, 10), Seen(2, 30), Seen(4, 50)]  # 10 more for each
    assert predicted(shape, 8, seen) == pytest.approx(MARGIN * 90)


def test_points_that_do_not_fit_are_told_of_and_not_run():
    asked = argparse.Namespace(memory_gb=0.1, repeats=1, half=False)
    points = list(growth.sweep("latents_1", asked, bandwidth=1.0))
    assert [point["latents"] for point in points][-1] == 262_144
    assert all("--memory-gb is 0.1" in point["reason"] for point in points)


def test_sweeps_reach_as_far_as_they_should():
    assert SWEEPS["sites"][1][-1].sites == 30
    assert {shape.row for shape in SWEEPS["latents_1"][1]} == {576}
    assert {shape.row for shape in SWEEPS["latents_5"][1]} == {2880}


def test_growth_on_the_page():
    ran = {
        "latents": 4096,
        "tokens_per_s": {"median": 1000.0},
        "step_seconds": 2.0,
        "encoder_seconds": 1.0,
        "optimizer_seconds": 0.25,
        "rest_seconds": 0.75,
        "peak_bytes": 3 * GB,
    }
    sweeps = {"latents_5": [ran, {"latents": 8192, "reason": "too large"}]}
    told = {"sweeps": sweeps, "command": ["python", "it"], "minutes": 1}
    text = page({"machine": FACTS, "benchmarks": {"growth": told}})
    assert "### With latents, 5 sites" in text
    assert "| 4,096 | 1,000 | 2.000 | 1.000 | 0.250 | 0.750 | 3.0 GB |" in text
    assert "| 8,192 | too large |" in text
    assert "2.000" in growth.table("latents_5", sweeps["latents_5"])


def test_harvest_on_the_page():
    rate = {"median": 2000.0, "least": 1900.0, "most": 2100.0, "peak_bytes": GB}
    times = {"plain": {"median": 0.97, "least": 0.9, "most": 1.0, "goal": 0.95, "met": True}}
    found = {
        "model": "smollm2",
        "sites": ["resid_mid.5"],
        "crosslens": rate,
        "plain": rate,
        "bridge": {"reason": "not installed"},
        "bridge_float32": {"reason": "not installed"},
        "times": times,
        "command": ["python", "it"],
        "minutes": 1,
    }
    text = page({"machine": FACTS, "benchmarks": {"harvest": found}})
    assert "| plain | 2,000 | 1,900 – 2,100 | 1.0 GB | 0.97 | 0.95 |" in text
    assert "| bridge | not installed |" in text


def test_predictions_on_the_page():
    happened = {"seconds_per_step": 2.0, "harvest_tokens_per_s": 1e3, "memory_peak": GB, "disk": GB}
    one = {
        "predicted": {**happened, "seconds_per_step": 3.0},
        "happened": happened,
        "within": {**dict.fromkeys(happened, True), "seconds_per_step": False},
    }
    told = {"configurations": {"demo": one}, "command": ["python"], "minutes": 1}
    text = page({"machine": FACTS, "benchmarks": {"prediction": told}})
    assert "| demo | 3 / 2 ✗ | 1,000 / 1,000 | 1 / 1 | 1 / 1 |" in text


def test_everybody_trains_on_as_many_tokens(tmp_path):
    asked = end_to_end.parse(["--tokens", "70000"])
    assert asked.tokens == 34 * 2048
    job = end_to_end.Job(tokens=asked.tokens, inputs=tmp_path, out=tmp_path / "out", python="py")
    words = {name: end_to_end.command(name, job) for name in end_to_end.CONTESTANTS}
    assert after(words["crosslens"], "--text.tokens") == "69632"
    assert after(words["crosslens"], "--fit.steps") == "34"
    assert after(words["sae_lens"], "--training_tokens") == "69632"
    assert words["sae_lens_bfloat16"] == [*words["sae_lens"], "--autocast"]
    assert after(words["sparsify"], "--tokens") == "69632"
    assert after(words["sparsify_command"], "--max_examples") == str(69632 // 256)
    for command in words.values():
        assert str(tmp_path / "model") in command
        assert any(word.startswith(str(tmp_path / "text")) for word in command)


def after(words, option):
    return words[words.index(option) + 1]


def test_a_command_that_fails_is_told_of(tmp_path):
    lost = end_to_end.run([sys.executable, "-c", "raise SystemExit('no GPU here')"], tmp_path)
    assert lost == {"reason": "no GPU here"}
    done = end_to_end.run([sys.executable, "-c", "pass"], tmp_path)
    assert done["seconds"] > 0
    assert done["peak_bytes"] > 10**6


def test_whole_runs_on_the_page():
    found = {
        "tokens": 4096,
        "contestants": {
            "crosslens": end_to_end.summary(
                "crosslens",
                [{"seconds": 2.0, "peak_bytes": GB}, {"seconds": 4.0, "peak_bytes": 5}],
                8,
            ),
            "sparsify": end_to_end.summary("sparsify", [{"reason": "no GPU"}], 8),
        },
    }
    text = page(
        {
            "machine": FACTS,
            "benchmarks": {"end_to_end": {**found, "command": ["python"], "minutes": 1}},
        }
    )
    assert "| crosslens | `crosslens train` | 3 | 2 – 4 | 3 | 1.0 GB |" in text
    assert "| no GPU |" in text
    assert "no GPU" in end_to_end.table(found["contestants"])


def test_all_benchmarks_are_run_by_command(tmp_path, monkeypatch):
    scripts = {"train_step": "print('{\"shapes\": {}}')", "growth": "raise SystemExit(3)"}
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    asked = argparse.Namespace(quick=False, peers_python="/venv/python", crosscode=None)
    found = run_all.run("train_step", asked)
    assert found["shapes"] == {}
    assert found["command"][:3] == ["python", "benchmarks/train_step.py", "--json"]
    lost = run_all.run("growth", asked)
    assert lost == {"reason": "`python benchmarks/growth.py --json` exited with code 3"}


def test_no_path_of_this_machine_is_on_the_page():
    asked = argparse.Namespace(quick=True, peers_python="/venv/python", crosscode="/cc")
    assert run_all.places("train_step", asked) == [
        "--peers-python",
        "/venv/python",
        "--crosscode",
        "/cc",
    ]
    assert run_all.places("end_to_end", asked) == ["--peers-python", "/venv/python"]
    assert not any("/venv" in word or "/cc" in word for word in run_all.words("train_step", asked))


def test_the_extra_names_the_peers_that_are_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extra = set(project["project"]["optional-dependencies"]["bench"])
    lines = (Path(ROOT) / "benchmarks" / "peers.txt").read_text().splitlines()
    pinned = {line for line in lines if line and not line.startswith("#")}
    assert {line for line in extra if "==" in line} <= pinned
    assert all("==" in line for line in pinned)


def test_half_of_the_moments_is_a_setting():
    shape = SHAPES["demo"]
    for setting, moments in (("bfloat16", "float32"), (ours.HALF, "bfloat16")):
        config = ours.config_of(shape, setting)
        assert (config.fit.dtype, config.optimizer.moments) == ("bfloat16", moments)

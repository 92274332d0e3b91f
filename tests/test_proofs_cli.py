"""`crosslens prove`: what it prints, what it keeps, and what `prove check` refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crosslens.cli import main
from crosslens.storage import load_tensors, save_tensors

MAX = ["max-of-k", "--vocabulary", "6", "--length", "3", "--width", "8", "--head", "8"]
MAX += ["--steps", "150", "--batch", "64"]
MOD = ["mod-add", "--modulus", "7", "--width", "10", "--neurons", "16", "--steps", "200"]
FIELDS = {"claim", "bound", "truth", "flops", "flops_brute", "bits", "tiers", "checked"}


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["prove", *argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proofs") / "mod"
    assert main(["prove", *MOD, "--out", str(folder), "--quiet"]) == 0
    return folder


def test_max_of_k_says_what_it_proved(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, *MAX)
    assert found.keys() >= FIELDS
    assert found["checked"] is True
    assert 0 < found["bound"] <= found["truth"] <= 1
    assert found["claim"] == f"accuracy ≥ {found['bound']}"
    assert found["bits"] == 3 * 6 * 8 * 64
    tiers = {tier["name"]: tier for tier in found["tiers"]}
    assert list(tiers) == ["brute force", "codes", "pairs", "pessimum", "box"]
    assert all(tier.keys() == {"name", "bound", "flops", "bits"} for tier in tiers.values())
    assert tiers["pairs"]["flops"] == found["flops"]
    assert tiers["brute force"]["flops"] == found["flops_brute"]
    assert max(tier["bound"] for tier in tiers.values()) <= found["truth"]


def test_addition_bounds_its_loss_too(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, *MOD, "--claim", "loss", "--tier", "codes")
    assert found["truth"] <= found["bound"] < found["truth"] / 0.99
    assert found["claim"].startswith("loss ≤ ")
    assert found["checked"] is True


def test_the_same_seed_proves_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, *MAX) == printed(capsys, *MAX)


def test_a_kept_certificate_is_accepted(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {file.name for file in kept.iterdir()}
    assert names == {
        "certificate.json",
        "coder.safetensors",
        "data.safetensors",
        "weights.safetensors",
    }
    assert main(["prove", "check", str(kept)]) == 0
    assert "accepted: accuracy ≥ " in capsys.readouterr().out
    assert printed(capsys, "check", str(kept))["accepted"] is True


def damaged(kept: Path, folder: Path, fault: str) -> list[str]:
    """A copy of `kept` with one fault, as `prove check` takes it."""
    folder.mkdir()
    for file in kept.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    certificate, weights = folder / "certificate.json", folder / "weights.safetensors"
    text = certificate.read_text()
    match fault:
        case "other weights":
            save_tensors(weights, {k: v + 0.5 for k, v in load_tensors(weights).items()})
        case "weights elsewhere":
            save_tensors(folder / "w", {"W": torch.zeros(2)})
            return [str(folder), "--weights", str(folder / "w")]
        case "truncated":
            certificate.write_text(text[: len(text) // 2])
        case "truncated coder":
            coder = folder / "coder.safetensors"
            coder.write_bytes(coder.read_bytes()[:-7])
        case "newer":
            certificate.write_text(text.replace('"version": 2', '"version": 7'))
        case "larger claim":
            found = json.loads(text)
            certificate.write_text(json.dumps(found | {"bound": 1.5}))
        case "no data":
            (folder / "data.safetensors").unlink()
    return [str(folder)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("other weights", "weights are not those"),
        ("weights elsewhere", "weights are not those"),
        ("truncated", "damaged or not JSON"),
        ("truncated coder", "damaged"),
        ("newer", "newer version"),
        ("larger claim", "is claimed"),
        ("no data", "does not exist"),
    ],
)
def test_what_does_not_hold_is_refused_with_the_reason(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, reason: str
) -> None:
    argv = damaged(kept, tmp_path / "c", fault)
    assert main(["prove", "check", *argv]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert reason in err
    assert main(["prove", "check", *argv, "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["accepted"] is False
    assert reason in found["reason"]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["max-of-n"], "max-of-k"),
        (["max-of-k", "--tier", "pair"], "pairs"),
        (["max-of-k", "--claim", "loss"], "accuracy only"),
        (["max-of-k", "--length", "1"], "2 to 8 places"),
        (["mod-add", "--rank", "100"], "rank"),
        (["check"], "no default"),
    ],
)
def test_a_wrong_command_says_what_to_do(
    capsys: pytest.CaptureFixture[str], argv: list[str], reason: str
) -> None:
    assert main(["prove", *argv]) == 2
    assert reason in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        assert main(["prove", *argv]) == 0
        assert "check CERT" in capsys.readouterr().out
    assert main(["prove", "mod-add", "--help"]) == 0
    assert "--modulus" in capsys.readouterr().out

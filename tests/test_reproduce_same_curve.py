"""The comparison of the fast step with the reference, in miniature."""

from __future__ import annotations

import pytest

from crosslens.storage import load_json
from crosslens.training import open_run
from reproduce import same_curve


def test_the_forms_are_compared(tiny_model_folder, tmp_path, capsys):
    arguments = [
        "--work", str(tmp_path / "runs"), "--out", str(tmp_path / "results"),
        "--model", str(tiny_model_folder), "--tokens", "2000", "--heldout", "300",
        "--block", "32", "--batch", "64", "--steps", "30", "--latents", "64",
        "--sites", "resid_mid.1", "resid_mid.2", "--chat", "plain",
    ]  # fmt: skip
    same_curve.main(arguments)
    found = load_json(tmp_path / "results" / "same_curve.json")
    reference, fast = found["curves"]["reference"], found["curves"]["fast"]
    assert reference.keys() == fast.keys()
    assert reference["30"] == pytest.approx(fast["30"], abs=0.02)
    assert reference != fast
    half, seeded = found["curves"]["bfloat16 moments"], found["curves"]["another seed"]
    assert fast != half != seeded
    config = open_run(tmp_path / "runs" / "reference").config()
    assert (config.fit.dtype, config.fit.sparse_below) == ("float32", 0.0)
    config = open_run(tmp_path / "runs" / "bfloat16-moments").config()
    assert config.optimizer.moments == "bfloat16"
    page = (tmp_path / "results" / "same_curve.md").read_text()
    apart = fast["30"] - reference["30"]
    assert f"| 30 | {reference['30']:.4f} | {fast['30']:.4f} ({apart:+.4f}) |" in page
    capsys.readouterr()
    same_curve.main(arguments)  # done before: nothing is trained, the page is the same
    assert (tmp_path / "results" / "same_curve.md").read_text() == page


def test_the_widest_gap_has_its_sign():
    curves = {"reference": {1: 0.5, 2: 0.4}, "fast": {1: 0.51, 2: 0.37}}
    assert same_curve.widest_gap(curves, "fast") == (2, pytest.approx(-0.03))

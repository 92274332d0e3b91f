"""The benchmark of predictions reads reports and compares as it says. No model is run."""

from __future__ import annotations

import json

import pytest

from benchmarks import prediction
from benchmarks.prediction import MEASURED, Timeline, configurations, table
from crosslens.config import load_file, to_yaml
from crosslens.training import TrainConfig


def test_only_undisturbed_intervals_count():
    line = Timeline()
    line.told = [
        (0.0, "harvest", 1),
        (2.0, "harvest", 2),
        (4.5, "harvest", 3),
        (5.0, "train", 5),
        (6.0, "train", 10),
        (9.0, "train", 10),  # judged on held-out rows
        (10.5, "train", 15),
        (11.0, "harvest", 4),
        (14.0, "train", 20),
        (14.2, "train", 21),
    ]
    assert line.apart("harvest", 1) == [2.0, 2.5]
    assert line.apart("train", 5) == [1.0, 1.5]
    with pytest.raises(SystemExit, match="raise --steps and --tokens"):
        line.apart("train", 7)


def test_every_configuration_survives_its_file(tmp_path):
    for name, config in configurations(60, 60_000).items():
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load_file(TrainConfig, tmp_path / "config.yaml", TrainConfig()) == config, name


@pytest.fixture
def answers(monkeypatch):
    """What the two processes would print: predicted 1.2 times what happens, but the disk's half."""
    happened = dict.fromkeys((*MEASURED, "seconds"), 10.0)
    predicted = {**dict.fromkeys(happened, 12.0), "disk": 5.0}

    def answer(command):
        return predicted if "--dry-run" in command else happened

    monkeypatch.setattr(prediction, "_answer", answer)


@pytest.mark.usefixtures("answers")
def test_predictions_are_held_to_a_quarter(capsys):
    prediction.main(["--as-is", "--only", "demo", "--json"])
    found = json.loads(capsys.readouterr().out)["configurations"]["demo"]
    assert found["ratio"]["seconds_per_step"] == pytest.approx(1.2)
    assert found["within"] == {**dict.fromkeys(MEASURED, True), "disk": False}
    last = table({"demo": found}).splitlines()[-1]
    assert last == "3 of 4 within 25%"

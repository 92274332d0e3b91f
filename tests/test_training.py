"""The objective, the loop, stopping and going on to the bit, and a planted dictionary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from crosslens.coder import BatchTopK, Coder, Crosscoder, Layout, load, transpose_init
from crosslens.config import to_plain
from crosslens.errors import CrosslensError, Diverged, Interrupted, UsageError
from crosslens.lm import ModelSpec
from crosslens.text import Corpus, TextConfig
from crosslens.training import (
    Adam,
    AuxK,
    CoderConfig,
    FitConfig,
    NormL1,
    TrainConfig,
    create_run,
    open_models,
    open_run,
    train,
)
from crosslens.training.checkpoint import TrainState
from crosslens.training.fit import Hooks, fit, graceful_stop, new_optimizer
from crosslens.training.run import append_metrics, trim_metrics
from crosslens.training.schedule import warmup_then_decay

LAYOUT = Layout(("a", "b"), (6, 4))


def tiny_coder(activation=None, dtype=torch.float32) -> Coder:
    coder = Coder(Crosscoder()(LAYOUT, 12), activation or BatchTopK(k=3))
    transpose_init(coder, 0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        coder.b_dec.normal_(generator=torch.Generator().manual_seed(1))
    return coder.to(dtype).train()


def test_learning_rates_rise_and_fall():
    factors = [warmup_then_decay(s, 20, warmup=4, decay=0.25) for s in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[14:] == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert warmup_then_decay(0, 10, warmup=0, decay=0.0) == 1.0


class Table:
    """Batches out of a fixed table."""

    def __init__(self, make):
        self.make = make

    def next(self, check):
        check()
        return self.make()

    def state(self):
        return {}


def quiet_hooks(log=None) -> Hooks:
    return Hooks(log or (lambda m: None), lambda s: None, lambda c: {})


def state_of(config: TrainConfig, coder: Coder) -> TrainState:
    n = coder.wiring.n_latents
    return TrainState(coder, new_optimizer(coder, config.optimizer), torch.zeros(n).long())


def test_a_planted_dictionary_is_recovered():
    """Rows are sums of 4 of 64 known directions over 3 sites; a coder finds nearly all of them."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(("a", "b", "c"), (24, 32, 40))
    truth = torch.randn(64, layout.width, generator=generator)
    truth /= truth.norm(dim=-1, keepdim=True)

    def rows():
        scores = torch.rand(512, 64, generator=generator)
        active = scores >= scores.topk(4, -1).values[:, -1:]
        strength = 1 + torch.rand(512, 64, generator=generator)
        return (active * strength) @ truth * 10

    config = TrainConfig(
        coder=CoderConfig(latents=128, activation=BatchTopK(k=4)),
        optimizer=Adam(lr=3e-3),
        fit=FitConfig(steps=700, batch=512, dtype="float32", dead_after=5000),
    )
    coder = Coder(Crosscoder()(layout, 128), config.coder.activation)
    transpose_init(coder, 0.1, generator)
    fit(config, state_of(config, coder), Table(rows), quiet_hooks())
    found = cosine_similarity(truth[:, None], coder.W_dec[0].detach()[None], dim=-1)
    best = found.max(-1).values
    assert best.mean() >= 0.95
    assert (best > 0.9).float().mean() >= 0.95


def test_a_loss_that_is_not_finite_stops_and_names_the_step():
    config = TrainConfig(fit=FitConfig(steps=9, batch=4, log_every=5, dtype="float32"),
                         optimizer=Adam(warmup=1))  # fmt: skip
    coder = tiny_coder()
    count = iter(range(100))
    saved = []

    def rows():
        x = torch.randn(4, 10)
        return x * torch.nan if next(count) == 3 else x

    hooks = Hooks(lambda m: None, lambda s: saved.append(s.step), lambda c: {})
    with pytest.raises(Diverged, match="not finite at step 3") as caught:
        fit(config, state_of(config, coder), Table(rows), hooks)
    assert caught.value.exit_code == 3
    assert saved == []


def test_the_first_ctrl_c_is_a_request_and_the_second_acts():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with graceful_stop() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def run_config(folder: Path, **fit_changes) -> TrainConfig:
    plan = {
        "steps": 24, "batch": 64, "dtype": "float32", "device": "cpu", "log_every": 4,
        "heldout_every": 8, "heldout_rows": 64, "checkpoint_every": 6, "dead_after": 300,
        "calibration_tokens": 256, "harvest_tokens": 256,
    }  # fmt: skip
    return TrainConfig(
        models={"base": ModelSpec(path=str(folder), dtype="float32", device="cpu")},
        sites=("resid_mid.1", "resid_mid.2"),
        text=TextConfig(
            corpora={"main": Corpus(source="stdlib")}, tokens=1500, heldout=300, block=32
        ),
        coder=CoderConfig(latents=48, activation=BatchTopK(k=4)),
        optimizer=Adam(warmup=3),
        fit=FitConfig(**{**plan, **fit_changes}),
    )


def weights(run) -> dict[str, torch.Tensor]:
    return load(run.folder).state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_folder):
    """One uninterrupted run."""
    config = run_config(tiny_model_folder)
    run = create_run(tmp_path_factory.mktemp("runs") / "whole", config)
    train(run, open_models(config))
    return run


def test_a_run_leaves_what_the_design_says(finished):
    names = {p.name for p in finished.folder.iterdir()}
    assert names == {"run.json", "data", "metrics.jsonl", "checkpoints", "coder", "summary.json"}
    assert [p.name for p in (finished.folder / "checkpoints").iterdir()] != []
    record = finished.record()
    facts = {"config", "versions", "text", "sites", "models", "calibration", "sparse_below"}
    assert set(record) == facts
    assert open_run(finished.folder).config() == finished.config()
    lines = finished.metrics()
    assert [m["step"] for m in lines if "loss" in m] == [4, 6, 8, 12, 16, 18, 20, 24]
    assert [m["step"] for m in lines if "heldout" in m] == [8, 16, 24]
    losses = [m["loss"] for m in lines if "loss" in m]
    assert losses[-1] < losses[0]
    summary = finished.summary()
    assert summary["usage"]["least"] >= 1
    assert summary["positions"]["kept"] == summary["usage"]["tokens"]
    coder = load(finished.folder)
    assert coder.wiring.read.sites == ("resid_mid.1", "resid_mid.2")


def test_the_same_seed_gives_the_same_run(finished, tmp_path):
    run = create_run(tmp_path / "again", finished.config())
    train(run, open_models(run.config()))
    assert all(torch.equal(v, weights(finished)[k]) for k, v in weights(run).items())
    assert run.metrics_path.read_text() == finished.metrics_path.read_text()


def interrupting_once(at: int):
    """A report that presses Ctrl-C when step `at` is told of for the first time."""
    pressed = []

    def report(stage, done, total, figures):
        if stage == "train" and done == at and not pressed:
            pressed.append(done)
            signal.raise_signal(signal.SIGINT)

    return report


@pytest.mark.parametrize("buffer_gb", [2.5, 1e-4], ids=["resident", "refilled"])
def test_interrupted_and_resumed_is_uninterrupted(tiny_model_folder, tmp_path, buffer_gb):
    config = run_config(tiny_model_folder, buffer_gb=buffer_gb)
    models = open_models(config)
    whole = create_run(tmp_path / "whole", config)
    train(whole, models)
    run = create_run(tmp_path / "stopped", config)

    with pytest.raises(Interrupted, match="after step 17") as caught:
        train(run, models, interrupting_once(at=16))
    assert caught.value.exit_code == 75
    assert not run.finished
    train(open_run(run.folder), models)
    assert all(torch.equal(v, weights(whole)[k]) for k, v in weights(run).items())
    extra = {"step": 17}  # logged because it was saved there
    kept = [m for m in run.metrics() if m["step"] != extra["step"]]
    assert kept == whole.metrics()
    assert run.summary()["usage"] == whole.summary()["usage"]
    assert run.summary()["positions"] == whole.summary()["positions"]


@pytest.mark.parametrize("chunk", [2, 9], ids=["first filling", "a later one"])
def test_interrupted_while_harvesting(tiny_model_folder, tmp_path, chunk):
    """A stop while the buffer fills is heard at once, and going on is still exact."""
    config = run_config(tiny_model_folder, buffer_gb=1e-4)
    models = open_models(config)
    whole = create_run(tmp_path / "whole", config)
    train(whole, models)
    run = create_run(tmp_path / "stopped", config)
    heard = []

    def interrupt(stage, done, total, figures):
        heard.append(stage)
        if heard.count("harvest") == chunk and stage == "harvest":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="Stopped"):
        train(run, models, interrupt)
    assert heard.count("harvest") == chunk
    train(run, models)
    assert all(torch.equal(v, weights(whole)[k]) for k, v in weights(run).items())


KILLED = """
import json, os, signal, sys
from pathlib import Path
from crosslens.training import open_models, open_run, train
run = open_run(Path(sys.argv[1]))
def kill(stage, done, total, figures):
    if stage == "train" and done == 16:
        os.kill(os.getpid(), signal.SIGKILL)
train(run, open_models(run.config()), kill)
"""


def test_killed_and_resumed_is_uninterrupted(finished, tmp_path):
    run = create_run(tmp_path / "killed", finished.config())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(run.folder)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with run.metrics_path.open("a") as file:
        file.write('{"step": 17, "lo')  # a line that the kill tore
    train(run, open_models(run.config()))
    assert all(torch.equal(v, weights(finished)[k]) for k, v in weights(run).items())
    assert run.metrics() == finished.metrics()


def test_a_damaged_newest_checkpoint_is_passed_over(finished, tmp_path):
    run = create_run(tmp_path / "damaged", finished.config())
    models = open_models(run.config())
    with pytest.raises(Interrupted):
        train(run, models, interrupting_once(at=16))
    path = run.folder / "checkpoints" / "step-17" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    told = []
    train(run, models, lambda stage, *_: told.append(stage))
    assert any("passed over" in t and "step-17" in t for t in told)
    assert "resuming at step 12" in told
    assert all(torch.equal(v, weights(finished)[k]) for k, v in weights(run).items())


def test_when_every_checkpoint_is_damaged_nothing_is_lost_or_overwritten(finished, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder)
    for path in folder.glob("checkpoints/*/coder.safetensors"):
        path.write_bytes(b"nonsense")
    with pytest.raises(CrosslensError, match="Every checkpoint"):
        train(open_run(folder), open_models(finished.config()))
    assert (folder / "metrics.jsonl").read_text() == finished.metrics_path.read_text()


def test_a_run_is_not_overwritten_by_accident(finished, tmp_path):
    with pytest.raises(UsageError, match="is a run already"):
        create_run(finished.folder, finished.config())
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(UsageError, match="is not a run"):
        create_run(tmp_path, finished.config(), overwrite=True)
    assert (tmp_path / "precious.txt").exists()


def test_a_text_smaller_than_a_batch_is_refused_before_training(tiny_model_folder, tmp_path):
    config = run_config(tiny_model_folder, batch=4096)
    run = create_run(tmp_path / "small", config)
    with pytest.raises(UsageError, match="fewer than one batch of 4096"):
        train(run, open_models(config))


def test_metrics_beyond_a_checkpoint_are_dropped(tmp_path, tiny_model_folder):
    run = create_run(tmp_path / "m", run_config(tiny_model_folder))
    for step in (1, 2, 3):
        append_metrics(run, {"step": step})
    trim_metrics(run, 2)
    assert run.metrics() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CoderConfig(latents=8, activation=BatchTopK(k=9)), "only 8 latents"),
        (lambda: CoderConfig(latents=0), "coder.latents"),
        (lambda: FitConfig(steps=0), "fit.steps"),
        (lambda: FitConfig(buffer_gb=0.0), "buffer_gb"),
        (lambda: Adam(lr=-1.0), "optimizer"),
        (lambda: Adam(decay=2.0), "decay"),
        (lambda: NormL1(weight=-1.0), "must not be negative"),
        (lambda: AuxK(ramp=3.0), "ramp"),
        (lambda: TrainConfig(sites=()), "at least one site"),
        (lambda: TrainConfig(models={}), "at least one model"),
        (lambda: TrainConfig(fit=FitConfig(steps=5)), "warmup"),
    ],
)
def test_bad_configurations_are_refused(make, match):
    with pytest.raises(UsageError, match=match):
        make()


def test_the_configuration_survives_json(tiny_model_folder):
    config = run_config(tiny_model_folder)
    assert json.loads(json.dumps(to_plain(config)))["coder"]["activation"]["kind"] == "batchtopk"
    assert os.fspath(tiny_model_folder) == to_plain(config)["models"]["base"]["path"]

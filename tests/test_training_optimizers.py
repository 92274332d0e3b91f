"""Runs with every optimiser: how they start, what they save, and going on to the bit."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
import torch

from crosslens.coder import (
    BatchTopK,
    Coder,
    DataPoint,
    JumpReLU,
    TopK,
    Transcoder,
    load,
)
from crosslens.coder.artifact import coder_tensors
from crosslens.errors import Interrupted
from crosslens.lm import ModelSpec
from crosslens.storage import load_tensors
from crosslens.text import Corpus, TextConfig
from crosslens.training import (
    Adam,
    AuxK,
    CoderConfig,
    FitConfig,
    Muon,
    SignSGD,
    TrainConfig,
    create_run,
    open_models,
    open_run,
    train,
)
from crosslens.training.checkpoint import checkpoints
from crosslens.training.plan import plan


def norms(coder: Coder) -> torch.Tensor:
    """Of each latent over everything that it writes."""
    return coder.decoder_norms().detach().norm(dim=-1)


def run_config(folder, coder: CoderConfig, optimizer, **fit_changes) -> TrainConfig:
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
        coder=coder,
        optimizer=optimizer,
        fit=FitConfig(**{**plan, **fit_changes}),
    )


TOPK = CoderConfig(latents=48, activation=BatchTopK(k=4))
JUMP = CoderConfig(
    latents=48, activation=JumpReLU.anthropic(), init=DataPoint(), bias="geometric_median",
    firing_rate=0.1,
)  # fmt: skip
CASES = {
    "adam without moment": (TOPK, Adam(beta1=0.0, warmup=3, rise="cosine"), 0),
    "adam in half": (TOPK, Adam(moments="bfloat16", warmup=3), 0),
    "sign, resampled": (replace(TOPK, activation=BatchTopK(k=1)), SignSGD(warmup=3), 5),
    "muon, unit norm": (replace(TOPK, unit_norm=True, center=True), Muon(warmup=3), 0),
    "adam, unit norm, resampled": (
        replace(JUMP, unit_norm=True, firing_rate=0.01),
        Adam(warmup=3, clip=None),
        5,
    ),
}


SHORT = {"steps": 12, "heldout_every": 4, "dead_after": 64}


def press_ctrl_c_at(step: int):
    pressed = []

    def report(stage, done, total, figures):
        if stage == "train" and done == step and not pressed:
            pressed.append(done)
            signal.raise_signal(signal.SIGINT)

    return report


@pytest.mark.parametrize("below", [0.0, 1.1], ids=["whole", "entries"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("coder", "optimizer", "every"), CASES.values(), ids=CASES)
def test_stopped_and_resumed_is_uninterrupted(
    tiny_model_folder, tmp_path, coder, optimizer, every, dtype, below
):
    changes = {**SHORT, "dtype": dtype, "sparse_below": below}
    config = run_config(tiny_model_folder, coder, optimizer, resample_every=every, **changes)
    models = open_models(config)
    whole = create_run(tmp_path / "whole", config)
    train(whole, models)
    run = create_run(tmp_path / "stopped", config)
    with pytest.raises(Interrupted, match="after step 9"):
        train(run, models, press_ctrl_c_at(8))
    train(open_run(run.folder), models)
    found, wanted = load(run.folder).state_dict(), load(whole.folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert [m for m in run.metrics() if m["step"] != 9] == whole.metrics()
    if every:
        assert any("resampled" in m for m in whole.metrics()), "otherwise this shows nothing"


def test_a_run_keeps_what_was_fastest_when_it_began(tiny_model_folder, tmp_path, monkeypatch):
    """Another machine may round otherwise, but it does not take another path."""
    config = run_config(tiny_model_folder, TOPK, Adam(warmup=3), **SHORT)
    models = open_models(config)
    found = []
    monkeypatch.setattr("crosslens.training.start.break_even", lambda *_: found.append(1) or 0.7)
    run = create_run(tmp_path / "run", config)
    with pytest.raises(Interrupted):
        train(run, models, press_ctrl_c_at(8))
    assert found
    monkeypatch.setattr("crosslens.training.start.break_even", lambda *_: 0.1)
    train(open_run(run.folder), models)
    assert run.record()["sparse_below"] == 0.7


def test_the_saved_coder_holds_the_average_and_the_checkpoint_what_resuming_needs(
    tiny_model_folder, tmp_path
):
    config = run_config(tiny_model_folder, TOPK, SignSGD(warmup=3, momentum=0.9))
    models = open_models(config)
    run = create_run(tmp_path / "run", config)
    train(run, models)
    saved = coder_tensors(load(run.folder))
    newest = checkpoints(run.folder / "checkpoints")[-1]
    y = load_tensors(newest / "coder.safetensors")
    state = load_tensors(newest / "optimizer.safetensors")
    names = [name for name, _ in load(run.folder).named_parameters()]
    for name in ("W_enc", "W_dec"):
        z = state[f"{names.index(f'{name}.0')}.z"]
        assert not torch.equal(y[name], saved[name])
        assert torch.allclose(y[name], 0.9 * saved[name] + 0.1 * z, atol=1e-6)
    heldout = [m["heldout"]["fvu"] for m in run.metrics() if "heldout" in m]
    before = {name: value.clone() for name, value in saved.items()}
    summary = train(
        open_run(run.folder), models
    )  # finished already: saved again, not averaged twice
    assert summary["heldout"]["fvu"] == heldout[-1]
    assert all(torch.equal(v, before[k]) for k, v in coder_tensors(load(run.folder)).items())


def test_a_unit_decoder_is_saved_at_norm_one(tiny_model_folder, tmp_path):
    config = run_config(tiny_model_folder, replace(TOPK, unit_norm=True), Adam(lr=1e-2, warmup=3))
    run = create_run(tmp_path / "run", config)
    train(run, open_models(config))
    assert torch.allclose(norms(load(run.folder)), torch.ones(48), atol=1e-6)
    newest = checkpoints(run.folder / "checkpoints")[-1]
    kept = load_tensors(newest / "coder.safetensors")["W_dec"].norm(dim=-1)
    assert not torch.allclose(kept, torch.ones(48), atol=1e-6)


def started(folder, tmp_path, **changes) -> tuple[Coder, dict]:
    """The coder of a run of one step at a rate near 0, and its figures."""
    config = run_config(
        folder, CoderConfig(), Adam(lr=1e-12, warmup=0), steps=1, checkpoint_every=1
    )
    run = create_run(tmp_path / "run", replace(config, **changes))
    train(run, open_models(run.config()))
    return load(run.folder).requires_grad_(False), run.metrics()[0]


def test_a_run_starts_at_its_firing_rate(tiny_model_folder, tmp_path):
    coder, first = started(tiny_model_folder, tmp_path, coder=replace(JUMP, bias="zero"))
    assert first["l0"] / 48 == pytest.approx(0.1, abs=0.03)
    assert torch.allclose(coder.decoder_norms(), torch.tensor(0.1))
    assert coder.b_dec.abs().max() < 1e-6


def test_a_run_starts_with_what_two_models_share(tiny_model_folder, tmp_path):
    spec = ModelSpec(path=str(tiny_model_folder), dtype="float32", device="cpu")
    coder, _ = started(
        tiny_model_folder, tmp_path, models={"a": spec, "b": spec},
        coder=replace(TOPK, shared_start=0.25, unit_norm=True),
    )  # fmt: skip
    half = coder.W_dec[0].shape[1] // 2
    apart = (coder.W_dec[0][:, :half] - coder.W_dec[0][:, half:]).abs().amax(-1)
    assert (apart < 1e-6).tolist() == [True] * 12 + [False] * 36
    assert torch.allclose(norms(coder), torch.ones(48))


def test_a_run_with_a_skip_starts_writing_the_mean(tiny_model_folder, tmp_path):
    coder, first = started(
        tiny_model_folder, tmp_path, sites=("mlp_in.1", "mlp_out.1"), wiring=Transcoder(skip=True),
        coder=CoderConfig(latents=48, activation=TopK(k=4), zero_decoder=True),
    )  # fmt: skip
    assert all(w.abs().max() < 1e-6 for w in (*coder.W_dec, *coder.W_skip.values()))
    assert coder.W_enc[0].norm(dim=-1).min() > 0.09
    assert first["fvu"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [
        (Adam(decay="12 steps"), 2),
        (Adam(beta1=0.0), 1),
        (Adam(moments="bfloat16"), 1),
        (Adam(beta1=0.0, moments="bfloat16"), 0.5),
        (SignSGD(warmup="64 tokens"), 1),
        (Muon(), 1),
    ],
)
def test_a_plan_counts_what_the_optimiser_keeps(tiny_model_folder, optimizer, numbers):
    coder = CoderConfig(latents=48, activation=TopK(k=4))
    config = run_config(tiny_model_folder, coder, optimizer, resample_every=20)
    config = replace(config, objective=replace(config.objective, aux=AuxK(ramp="20 steps")))
    found = plan(config, open_models(config), probe_steps=1)
    weights = 2 * 48 * 64 + 48 + 64
    assert found.parameters == weights
    # A checkpoint: the weights, what the optimiser keeps, and where each row of the text stands.
    positions = config.text.tokens + config.text.heldout
    checkpoint = found.disk_peak - found.disk
    assert 0 <= checkpoint - 4 * weights * (1 + numbers) <= 32 * positions
    assert found.disk >= 4 * weights + 2 * checkpoint + 8 * positions
    assert found.seconds_per_step > 0

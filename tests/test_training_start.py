"""A training that goes on from an existing coder."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from crosslens.coder import Crosscoder, Group, Layout, TopK, Wiring, fold, load, save
from crosslens.errors import CrosslensError, Interrupted, UsageError
from crosslens.training import Adam, create_run, open_models, train
from crosslens.training.start import starting_coder
from tests.test_training import interrupting_once, run_config, weights


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_model_folder):
    config = run_config(tiny_model_folder, steps=12)
    run = create_run(tmp_path_factory.mktemp("runs") / "first", config)
    train(run, open_models(config))
    return run


def going_on(first, **changes):
    """The same training once more from where the first ended, on another part of its rows."""
    return replace(first.config(), start=str(first.folder), seed=1, **changes)


def test_it_begins_as_the_coder_that_it_starts_from(first, tmp_path):
    """A step of no length leaves everything but the running threshold where it was."""
    config = going_on(first, optimizer=Adam(lr=1e-30, warmup=1, decay=0.0))
    config = replace(config, fit=replace(config.fit, steps=1))
    run = create_run(tmp_path / "second", config)
    train(run, open_models(config))
    found, given = weights(run), weights(first)
    assert found.keys() == given.keys()
    for name in given.keys() - {"threshold"}:
        assert torch.equal(found[name], given[name]), name
    told = run.record()["calibration"]
    assert told["read_scale"] == pytest.approx(found["scale_read"].tolist(), rel=1e-7)
    assert told["read_scale"] == first.record()["calibration"]["read_scale"]


def test_a_folded_coder_will_do(first, tmp_path):
    save(fold(load(first.folder)), tmp_path / "folded")
    config = replace(first.config(), start=str(tmp_path / "folded"))
    wiring = load(first.folder).wiring
    found = starting_coder(config, wiring)
    assert not found.folded
    assert torch.allclose(found.W_dec[0], load(first.folder).W_dec[0], rtol=1e-5)


def test_once_begun_the_start_is_no_longer_needed(first, tmp_path):
    """Stopped and resumed is uninterrupted, also when the folder is gone by then."""
    kept = tmp_path / "kept"
    shutil.copytree(first.folder / "coder", kept)
    config = replace(going_on(first), start=str(kept))
    config = replace(config, fit=replace(config.fit, steps=16, checkpoint_every=4))
    models = open_models(config)
    whole = create_run(tmp_path / "whole", config)
    train(whole, models)
    run = create_run(tmp_path / "stopped", config)
    with pytest.raises(Interrupted):
        train(run, models, interrupting_once(at=8))
    shutil.rmtree(kept)
    train(run, models)
    assert all(torch.equal(v, weights(whole)[k]) for k, v in weights(run).items())


def test_what_does_not_fit_is_refused_before_any_work(first, tmp_path):
    wiring = load(first.folder).wiring
    config = going_on(first)
    other = Crosscoder()(wiring.harvest, 32)
    with pytest.raises(UsageError, match=r"has 48 latents over .* 32, 32, and this training 32"):
        starting_coder(config, other)
    groups = (Group(24, wiring.read.sites, wiring.read.sites),) * 2
    with pytest.raises(UsageError, match="read or write different ones"):
        starting_coder(config, Wiring(wiring.harvest, wiring.read, wiring.write, groups))
    topk = replace(config, coder=replace(config.coder, activation=TopK(k=4)))
    with pytest.raises(UsageError, match=r"activation batchtopk, and coder.activation is topk"):
        starting_coder(topk, wiring)
    centred = replace(config, coder=replace(config.coder, center=True))
    with pytest.raises(UsageError, match=r"coder.center False, and this training has True"):
        starting_coder(centred, wiring)
    with pytest.raises(CrosslensError, match="holds no coder"):
        starting_coder(replace(config, start=str(tmp_path)), wiring)


def test_sites_may_have_other_names(first):
    wiring = load(first.folder).wiring
    renamed = Layout(tuple(f"chat/{site}" for site in wiring.read.sites), wiring.read.widths)
    starting_coder(going_on(first), Crosscoder()(renamed, 48))

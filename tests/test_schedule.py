"""Rates over a run, and lengths in steps, in tokens, or as a share of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslens.errors import UsageError
from crosslens.training import (
    Adam,
    AuxK,
    FitConfig,
    Muon,
    NormL1,
    Objective,
    SignSGD,
    TrainConfig,
)
from crosslens.training.schedule import length_in_steps, share_of_run, warmup_then_decay


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        (7, 7.0),
        ("7 steps", 7.0),
        ("1 step", 1.0),
        ("2k steps", 2000.0),
        ("2M tokens", 2e6 / 512),
        ("0.5B tokens", 5e8 / 512),
        ("  3k tokens ", 3000 / 512),
        ("512 tokens", 1.0),
    ],
)
def test_lengths(length, steps):
    assert length_in_steps(length, 512, "x") == steps


@pytest.mark.parametrize("length", ["", "5", "steps", "-3 steps", "5 minutes", "1.2.3 steps", -1])
def test_what_is_no_length_is_refused_by_name(length):
    with pytest.raises(UsageError, match=r"optimizer\.warmup"):
        length_in_steps(length, 512, "optimizer.warmup")


@given(share=st.floats(0, 1), steps=st.integers(1, 10**6))
def test_a_share_is_itself_and_a_length_a_share(share, steps):
    assert share_of_run(share, steps, 64, "x") == share
    told = round(share * steps)
    assert share_of_run(f"{told} steps", steps, 64, "x") == told / steps
    assert share_of_run(f"{64 * told} tokens", steps, 64, "x") == told / steps


def test_a_cosine_rises_from_a_tenth_to_one():
    factors = [warmup_then_decay(s, 20, 8, 0.25, "cosine") for s in range(20)]
    for step in range(8):
        wanted = 0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * step / 8))
        assert factors[step] == pytest.approx(wanted)
    assert factors[8:16] == [1.0] * 8
    assert factors[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


RUN = FitConfig(steps=100, batch=10)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optimizer": Adam(warmup=101)}, r"optimizer\.warmup"),
        ({"optimizer": Adam(warmup="1010 tokens")}, r"optimizer\.warmup.*1010 tokens"),
        ({"optimizer": Adam(decay="101 steps")}, r"optimizer\.decay"),
        ({"optimizer": Muon(decay="2k tokens")}, r"optimizer\.decay"),
        ({"optimizer": SignSGD(warmup="1M tokens")}, r"optimizer\.warmup"),
        ({"objective": Objective(l1=NormL1(ramp="101 steps"))}, r"objective\.l1\.ramp"),
        ({"objective": Objective(aux=AuxK(ramp="1001 tokens"))}, r"objective\.aux\.ramp"),
        ({"fit": FitConfig(steps=100, batch=10, resample_every=101)}, r"fit\.resample_every"),
    ],
)
def test_schedules_longer_than_the_run_are_refused(changes, match):
    with pytest.raises(UsageError, match=match + r".*longer than the run \(100 steps\)"):
        TrainConfig(**{"fit": RUN, **changes})


def test_ramps_in_steps_and_tokens_become_shares_of_the_run():
    objective = Objective(l1=NormL1(weight=1.0, ramp="30 steps"), aux=AuxK(ramp="70 tokens"))
    config = TrainConfig(fit=RUN, objective=objective, optimizer=Adam(warmup=0, decay="50 steps"))
    found = config.objective_in_shares()
    assert (found.l1.ramp, found.aux.ramp, found.recon.ramp) == (0.3, 0.07, 0.0)

"""The memory benchmark counts what is held at the same time."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import LAYERS, STEP, measure, recorded
from reproduce.scheme_table import Sizes

BYTES = 1000 * 500 * 2
ALMOST = pytest.approx


def test_it_counts_what_is_in_use_at_the_same_time():
    before = torch.ones(1000, 500, dtype=torch.bfloat16)
    with recorded() as peaks:
        before.mul_(2)
        x = before + 1
        y = x + 1
        del x
        z = y + 1
        del y, z
    assert peaks["after"].total == ALMOST(2 * BYTES, rel=0.01)
    large = [held.taken_by for held in peaks["after"].held if held.nbytes == BYTES]
    assert large == ["aten::add", "aten::add"]


def test_phases_are_told_apart():
    x = torch.ones(1000, 500, dtype=torch.bfloat16, requires_grad=True)
    with recorded() as peaks:
        with torch.profiler.record_function(STEP):
            pass
        loss = (x * x).sum()
        loss.backward()
    assert peaks["forward"].total == ALMOST(BYTES, rel=0.01)
    assert 2 * BYTES <= peaks["backward"].total < 4.1 * BYTES


def test_a_scheme_is_told_in_units():
    sizes = Sizes(latents=2016, l0=32, steps=100, batch=512, layers=LAYERS)
    found = measure("topk_sae", sizes)
    assert all(0.5 < one["beyond_encoder"] < 12 for one in found.values())
    assert found["backward"]["held"][0]["units"] == ALMOST(1.0, rel=0.01)

"""Births, deaths and turns that are planted in a coder over a sequence of models are found."""

from __future__ import annotations

import math
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from crosslens.coder import Coder, Crosscoder, Dedicated, Difference, Layout, ReLU, fold
from crosslens.diffing.timeline import Timeline, timeline
from crosslens.errors import UsageError
from crosslens.functional.shares import wilson

PLACES = ("s.1", "s.2")
WIDTH = 6


def layout_of(n_models: int, width: int = WIDTH) -> Layout:
    sites = tuple(f"step{m}/{place}" for m in range(n_models) for place in PLACES)
    return Layout(sites, (width,) * len(sites))


def coder_of(W_dec: torch.Tensor, layout: Layout) -> Coder:
    coder = Coder(Crosscoder()(layout, len(W_dec)), ReLU())
    with torch.no_grad():
        coder.W_dec[0].copy_(W_dec)
        coder.scale_write.copy_(torch.linspace(0.5, 2.0, len(layout.sites)))
    return coder


def with_norms(norms: list[list[float]]) -> Coder:
    """Random directions, with these norms per latent and model over both sites together."""
    n_models = len(norms[0])
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(len(norms), n_models, len(PLACES) * WIDTH, generator=generator)
    parts = normalize(parts, dim=-1) * torch.tensor(norms)[..., None]
    return coder_of(parts.flatten(1), layout_of(n_models))


def lives(found: Timeline) -> list[tuple[int, int]]:
    return list(zip(found.birth_L.tolist(), found.death_L.tolist(), strict=True))


NORMS = [
    [1.0, 1.0, 1.0, 1.0, 1.0],  # there throughout
    [0.0, 0.0, 1.0, 2.0, 2.0],  # born at 2
    [1.0, 1.0, 0.0, 0.0, 0.0],  # dies at 2
    [0.0, 1.0, 1.0, 0.0, 0.0],  # born at 1, dies at 3
    [0.0, 0.0, 0.0, 0.0, 3.0],  # only in the last
    [0.0, 0.0, 0.0, 0.0, 0.0],  # writes nothing
    [1.0, 0.0, 1.0, 1.0, 1.0],  # one checkpoint out of line
    [0.0, 0.05, 1.0, 1.0, 1.0],  # the second is below the threshold
]


def test_planted_births_and_deaths_are_found():
    found = timeline(with_norms(NORMS))
    assert lives(found) == [(0, 5), (2, 5), (0, 2), (1, 3), (4, 5), (-1, -1), (2, 5), (2, 5)]
    assert found.models == tuple(f"step{m}" for m in range(5))
    told = found.plain()
    assert (told["latents"], told["unused"], told["interrupted"]) == (8, 1, 1)
    assert told["least_share"] == pytest.approx(0.1)
    rows = told["checkpoints"]
    assert [row["model"] for row in rows] == list(found.models)
    assert [row["births"] for row in rows] == [2, 1, 3, 0, 1]
    assert [row["deaths"] for row in rows] == [0, 0, 1, 1, 0]
    assert [row["present"] for row in rows] == [3, 3, 5, 4, 5]
    assert rows[0]["turned"] is None
    assert [row["turned"]["latents"] for row in rows[1:]] == [2, 2, 4, 4]
    assert told["lives"] == [
        {"birth": birth, "death": death, "latents": n}
        for birth, death, n in [(2, 5, 3), (0, 2, 1), (0, 5, 1), (1, 3, 1), (4, 5, 1)]
    ]
    for row in rows:
        for name in ("births", "deaths"):
            low, high = (7 * end for end in wilson(row[name], 7))
            assert row["interval"][name] == pytest.approx([low, high], abs=0.05)


def test_shares_are_the_published_relative_norms():
    """‖d^m‖ / Σ‖d^m'‖ by loops over columns, a model's sites taken together."""
    coder = with_norms(NORMS)
    found = timeline(coder)
    for latent, row in enumerate(coder.W_dec[0].tolist()):
        norms = [
            math.sqrt(sum(x * x for x in row[m * 2 * WIDTH : (m + 1) * 2 * WIDTH]))
            for m in range(5)
        ]
        total = sum(norms)
        shares = [norm / total if total else 0.0 for norm in norms]
        assert found.share_LM[latent].tolist() == pytest.approx(shares, abs=1e-6)


def test_planted_turns_are_found():
    """Latent l turns by the angle 10°·l at every step, in a plane of its own."""
    n, steps = 7, 3
    generator = torch.Generator().manual_seed(1)
    frame = torch.linalg.qr(torch.randn(n, 2 * WIDTH, 2, generator=generator)).Q
    angles = torch.arange(n)[:, None] * math.radians(10) * torch.arange(steps + 1)
    turned = torch.stack([angles.cos(), angles.sin()], -1) @ frame.mT
    strengths = torch.rand(n, steps + 1, 1, generator=generator) + 1
    coder = coder_of((turned * strengths).flatten(1), layout_of(steps + 1))
    found = timeline(coder)
    expected = [math.cos(math.radians(10) * turn) for turn in range(n)]
    for step in range(steps):
        assert found.cosine_LS[:, step].tolist() == pytest.approx(expected, abs=1e-5)
    for row in found.plain()["checkpoints"][1:]:
        assert row["turned"]["latents"] == n
        assert row["turned"]["mean_cosine"] == pytest.approx(sum(expected) / n, abs=1e-5)
        low = np.quantile(expected, 0.05)
        assert row["turned"]["low_cosine"] == pytest.approx(low, abs=1e-5)


def test_only_latents_that_live_in_both_count_as_turned():
    norms = [[1.0, 1.0, 1.0], [1.0, 1.0, 0.01], [0.0, 1.0, 1.0]]
    found = timeline(with_norms(norms))
    cosines = found.cosine_LS
    told = [row["turned"] for row in found.plain()["checkpoints"]]
    assert told[1]["latents"] == told[2]["latents"] == 2
    assert told[1]["mean_cosine"] == pytest.approx(float(cosines[:2, 0].mean()))
    assert told[2]["mean_cosine"] == pytest.approx(float(cosines[[0, 2], 1].mean()))
    assert cosines[2, 0].isnan()


def life_by_groups(present: list[bool]) -> tuple[int, int]:
    """The longest run, by itertools."""
    start, best = 0, (0, 0)
    for value, group in groupby(present):
        length = len(list(group))
        if value and length > best[1] - best[0]:
            best = (start, start + length)
        start += length
    return best


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=8))
def test_any_course_has_the_life_that_its_longest_run_is(courses):
    present = [course if any(course) else [True] * 6 for course in courses]
    found = timeline(with_norms([[float(p) for p in row] for row in present]))
    assert lives(found) == [life_by_groups(row) for row in present]
    assert found.present_LM.tolist() == present
    outside = sum(
        any(p and not start <= m < end for m, p in enumerate(row))
        for row, (start, end) in zip(present, lives(found), strict=True)
    )
    assert found.plain()["interrupted"] == outside
    assert sum(row["births"] for row in found.plain()["checkpoints"]) == len(present)


def test_dead_latents_stand_apart():
    alive = torch.tensor([True, False, True, True, True, True, False, True])
    found = timeline(with_norms(NORMS), alive)
    assert found.alive_L.tolist() == [True, False, True, True, True, False, False, True]
    assert found.plain()["unused"] == 3
    assert [latent for latent, life in enumerate(lives(found)) if life == (-1, -1)] == [1, 5, 6]
    assert not found.present_LM[~found.alive_L].any()
    assert not found.living_LM[~found.alive_L].any()


def test_the_share_that_counts_as_present_can_be_chosen():
    norms = [[0.2, 1.0, 1.0]]  # shares 1/11, 5/11, 5/11; the even share is 1/3
    assert lives(timeline(with_norms(norms), presence=0.25)) == [(0, 3)]
    assert lives(timeline(with_norms(norms), presence=0.3)) == [(1, 3)]
    for presence in (0.0, 1.0):
        with pytest.raises(UsageError, match="presence is a multiple of the even share"):
            timeline(with_norms(norms), presence=presence)


def test_folding_and_groups_change_nothing_that_is_told():
    """Two models, some latents of either only: born at once and dead at 1, or born at 1."""
    layout = layout_of(2)
    coder = Coder(Dedicated(exclusive=0.25)(layout, 8), ReLU())
    with torch.no_grad():
        for block in coder.W_dec:
            block.fill_(1.0)
        coder.scale_write.copy_(torch.tensor([0.1, 1.0, 5.0, 9.0]))
    before = timeline(coder)
    assert lives(before) == [(0, 1)] * 2 + [(1, 2)] * 2 + [(0, 2)] * 4
    assert before.cosine_LS[:4].isnan().all()
    assert before.cosine_LS[4:].flatten().tolist() == pytest.approx([1.0] * 4)
    after = timeline(fold(coder))
    assert torch.allclose(before.share_LM, after.share_LM)
    assert torch.allclose(before.cosine_LS, after.cosine_LS, equal_nan=True)
    assert before.plain()["checkpoints"][0] == after.plain()["checkpoints"][0]


def test_models_of_other_widths_have_no_turn():
    layout = Layout(("a/s.1", "b/s.1", "c/s.1"), (4, 5, 5))
    found = timeline(coder_of(torch.ones(3, 14), layout))
    assert found.cosine_LS[:, 0].isnan().all()
    assert found.cosine_LS[:, 1].tolist() == pytest.approx([1.0] * 3)
    turned = [row["turned"] for row in found.plain()["checkpoints"]]
    same = pytest.approx(1.0)
    assert turned == [None, None, {"latents": 3, "mean_cosine": same, "low_cosine": same}]


@pytest.mark.parametrize(
    ("wiring", "layout", "match"),
    [
        (Crosscoder(), Layout(PLACES, (4, 4)), "of one model"),
        (Difference(), layout_of(2), "difference of two models"),
        (Crosscoder(), Layout(("a/s.1", "b/s.1", "b/s.2", "c/s.1"), (4,) * 4), "as many of each"),
    ],
)
def test_coders_that_have_no_timeline(wiring, layout, match):
    with pytest.raises(UsageError, match=match):
        timeline(Coder(wiring(layout, 6), ReLU()))

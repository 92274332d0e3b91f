"""Baselines judged on rows with a planted difference; steering; latents of differences."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from crosslens.activations import Source
from crosslens.coder import Coder, Crosscoder, Difference, Layout, ReLU, TopK, transpose_init
from crosslens.diffing.baselines import (
    Baseline,
    Moments,
    Place,
    Task,
    diff_sae,
    judged,
    mean_difference,
    pca,
    steering,
)
from crosslens.diffing.planted import Condition, Conditions
from crosslens.errors import UsageError
from crosslens.text.planted import Behaviour
from tests.test_activations import blocks_of
from tests.test_diffing_baselines import EVERY, models, random, rows_of, source

__all__ = ["models", "source"]

ROWS = Layout(("base/resid_mid.1", "chat/resid_mid.1"), (32, 32))
PLACE = Place(ROWS, *ROWS.sites)


def condition(rows: torch.Tensor, prompt: torch.Tensor, source: Source | None = None) -> Condition:
    """Rows of prompts of which nothing else is looked at."""
    n = int(prompt.max()) + 1
    if source is None:
        source = Source({}, ROWS, blocks_of(n), EVERY)
    return Condition(source, rows, prompt, torch.ones_like(prompt), torch.zeros_like(prompt))


N, PER = 30, 4


def planted(direction: torch.Tensor) -> Conditions:
    """Prompts of four tokens. Where the behaviour is called for, b has `direction` at one of them
    that a has not; where not, b differs by a little noise only."""
    prompt = torch.arange(N).repeat_interleave(PER)

    def rows(seed: int, strength: float, noise: float) -> torch.Tensor:
        a = torch.randn(N * PER, 32, generator=random(seed))
        b = a + noise * torch.randn(N * PER, 32, generator=random(seed + 1))
        b[::PER] += strength * direction
        return torch.cat([a, b], -1)

    return Conditions(
        triggered=condition(rows(10, 3.0, 0.1), prompt),
        clean=condition(rows(20, 0.0, 0.1), prompt),
        base=condition(rows(10, 0.0, 0.0), prompt),
        noop=condition(rows(10, 0.0, 0.1), prompt),
    )


def moments_of(rows: torch.Tensor) -> Moments:
    """Moments of rows (a, b), by numpy."""
    difference = (rows[:, 32:] - rows[:, :32]).double()
    return Moments(
        place=PLACE,
        count=len(rows),
        mean_D=difference.mean(0),
        covariance_DD=torch.from_numpy(np.cov(difference.numpy().T, bias=True)),
        first_FD=torch.zeros(5, 32).double(),
        first_F=torch.zeros(5, dtype=torch.int64),
        norm_b=float(rows[:, 32:].norm(dim=-1).mean()),
    )


@pytest.fixture(scope="module")
def direction() -> torch.Tensor:
    return normalize(torch.randn(32, generator=random(5)), dim=0)


def test_a_planted_direction_is_found_by_mean_and_components(models, direction):
    found = planted(direction)
    text = torch.cat([found.triggered.rows_RX, found.clean.rows_RX])
    made = {
        "mean_difference": mean_difference(moments_of(text), models["chat"]),
        "pca": pca(moments_of(text), models["chat"], n=1),
    }
    for name, each in made.items():
        assert each.name == name
        told = judged(each, found)
        assert told["auroc"] == told["auroc_vs_same_text"] == 1.0
        assert told["detection"]["against_noop"]["value"] == 1.0
        assert told["detection"]["base_sees"]["value"] <= 0.5
        assert told["top_tokens" if name == "mean_difference" else "components"]
    spike, noise = 9 * 7 / 64, 0.01  # variance of a strength of 3 on an eighth of the rows
    [first] = made["pca"].figures["components"]
    assert first["share"] == pytest.approx((spike + noise) / (spike + 32 * noise), abs=0.03)


def test_strengths_are_projections_of_a_rows_difference(models, direction):
    rows = planted(direction).triggered.rows_RX
    found, here = moments_of(rows), condition(rows[:3], torch.zeros(3, dtype=torch.int64))
    difference = (rows[:3, 32:] - rows[:3, :32]).double().numpy()
    mean = found.mean_D.numpy()
    along = difference @ mean / np.linalg.norm(mean)
    strong = mean_difference(found, models["chat"]).strengths(here)
    assert strong.flatten().tolist() == pytest.approx(along.tolist(), abs=1e-5)
    _, vectors = np.linalg.eigh(found.covariance_DD.numpy())
    squares = ((difference - mean) @ vectors[:, ::-1][:, :4]) ** 2
    assert np.allclose(pca(found, models["chat"], n=4).strengths(here), squares, atol=1e-5)


def test_what_was_planted_elsewhere_is_not_found(models, direction):
    """A direction at right angles is as likely on either side."""
    other = torch.randn(32, generator=random(6))
    other = normalize(other - (other @ direction) * direction, dim=0)
    text = planted(other).triggered.rows_RX
    told = judged(mean_difference(moments_of(text), models["chat"]), planted(direction))
    assert 0.3 < told["auroc"] < 0.7


def test_components_are_judged_by_their_largest_strengths_in_a_prompt(direction):
    """By loops: each component's maximum over a prompt's rows, summed, wins against others'."""
    found = planted(direction)
    made = Baseline(name="any", strengths=lambda c: c.rows_RX[:, 30:36] * 2, figures={"own": 1})
    told = judged(made, found)
    values = {}
    for name, each in found.named().items():
        rows = (each.rows_RX[:, 30:36] * 2).tolist()
        prompts = [rows[n * PER : (n + 1) * PER] for n in range(N)]
        values[name] = [sum(max(column) for column in zip(*p, strict=True)) for p in prompts]
    pairs = [(u > v) + (u == v) / 2 for u in values["triggered"] for v in values["clean"]]
    assert told["auroc"] == pytest.approx(sum(pairs) / N**2, abs=1e-6)
    assert told["own"] == 1


def test_the_same_weights_give_a_detector_that_knows_nothing(models, direction):
    rows = planted(direction).base.rows_RX
    for made in (mean_difference, pca):
        told = judged(made(moments_of(rows), models["chat"]), planted(torch.zeros(32)))
        assert math.isfinite(told["auroc"])


def test_steering_brings_the_behaviour_about(models):
    """The mean difference is a token's output embedding: with enough of it the model says it."""
    model = models["chat"]
    tokenizer = model.tokenizer
    kept = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    weight = model.module.lm_head.weight.double()
    loudest = int(weight[3:].norm(dim=-1).argmax()) + 3  # its own direction's logit is largest
    behaviour = Behaviour(name="says", what="Says it.", marks=(tokenizer.decode([loudest]),))
    place = Place(Layout(("base/resid_post.3", "chat/resid_post.3"), (32, 32)),
                  "base/resid_post.3", "chat/resid_post.3")  # fmt: skip
    found = replace(moments_of(torch.randn(9, 64)), place=place, mean_D=weight[loudest].clone())
    asked = [[{"role": "user", "content": text}] for text in ("def f", "return x", "import os")]
    task = Task(behaviour=behaviour, prompts=asked, tokens=2)
    try:
        told = steering(model, replace(found, norm_b=1000.0), task, alphas=(-1.0, 0.0, 1.0))
    finally:
        tokenizer.chat_template = kept
    assert [each["alpha"] for each in told] == [-1.0, 0.0, 1.0]
    assert [each["rate"] for each in told] == [0.0, 0.0, 1.0]
    assert all(each["low"] <= each["rate"] <= each["high"] for each in told)
    assert told[2]["low"] > 0.3


@pytest.fixture(scope="module")
def difference_coder(source) -> Coder:
    coder = Coder(Difference()(source.layout, 40), TopK(k=5))
    transpose_init(coder, 0.5, random(3))
    with torch.no_grad():
        coder.scale_read.copy_(torch.tensor([3.0, 2.0]))
        coder.scale_write.copy_(torch.tensor([3.0, 2.0]))
        coder.W_dec[0].mul_(torch.rand(40, 1, generator=random(4)) + 0.5)
    return coder.eval().requires_grad_(False)


def test_difference_latents_are_ranked_by_what_they_carry(source, difference_coder, models):
    made = diff_sae(difference_coder, source, models)
    both = [rows_of(source, site)[0].reshape(-1, 32) for site in ("resid_mid.1", "resid_post.2")]
    x = torch.from_numpy(np.concatenate(both, -1)).float()
    z = difference_coder.encode(x)
    scaled = x * torch.tensor([3.0, 2.0]).repeat_interleave(32)
    recon = z @ difference_coder.W_dec[0] + difference_coder.b_dec
    norm = difference_coder.W_dec[0].norm(dim=-1)
    energy = [sum((v * float(norm[j])) ** 2 for v in z[:, j].tolist()) for j in range(40)]
    order = sorted(range(40), key=lambda j: -energy[j])[:20]
    latents = made.figures["latents"]
    assert [each["latent"] for each in latents] == order
    assert latents[0]["share"] == pytest.approx(energy[order[0]] / sum(energy), rel=1e-4)
    assert latents[0]["density"] == pytest.approx(float((z[:, order[0]] > 0).float().mean()))
    spread = (scaled - scaled.mean(0)).square().sum()
    fvu = float((scaled - recon).square().sum() / spread)
    assert made.figures["fvu"] == pytest.approx(fvu, rel=1e-3)
    assert made.figures["l0"] == pytest.approx(float((z > 0).float().sum(-1).mean()))
    assert len(latents[0]["top_tokens"]) == 10
    rows = torch.randn(6, source.layout.width, generator=random(8))
    here = condition(rows, torch.zeros(6, dtype=torch.int64), source)
    halves = rows.split(64, -1)
    want = difference_coder.encode(halves[1] - halves[0])[:, order] * norm[order]
    assert torch.allclose(made.strengths(here), want, atol=1e-5)


def test_a_coder_of_rows_is_no_difference_coder(source, models):
    coder = Coder(Crosscoder()(source.layout, 4), ReLU())
    with pytest.raises(UsageError, match="not over differences"):
        diff_sae(coder, source, models)

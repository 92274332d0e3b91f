"""Trainings made from the crosscoder's, and how far latents turn when the model changes."""

from __future__ import annotations

import argparse
import inspect
import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from crosslens.coder import BatchTopK, Coder, Crosscoder, Difference, Layout, ReLU, transpose_init
from crosslens.diffing.baselines import StagewisePlan, diff_sae_config, stagewise, train_stages
from crosslens.diffing.baselines.stagewise import ORDER, rotation, stage_config
from crosslens.diffing.pair import pair_of
from crosslens.errors import UsageError
from crosslens.lm import ModelSpec
from crosslens.recipes import recipe
from crosslens.text import Corpus, TextConfig
from crosslens.training import Adam, AuxK, CoderConfig, FitConfig, Objective, TrainConfig
from crosslens.training.fit import fit
from tests.test_diffing_baselines import random
from tests.test_diffing_baselines_judged import condition
from tests.test_planted import directions, strengths
from tests.test_training import Table, quiet_hooks, run_config, state_of

DIFFS = ["kissane_diff", "designated_shared", "batchtopk_diff", "dedicated", "delta"]


@pytest.mark.parametrize("name", DIFFS)
def test_the_diff_saes_training_is_the_crosscoders_on_differences(name):
    config = recipe(name)
    made = diff_sae_config(config)
    assert isinstance(made.wiring, Difference)
    assert isinstance(made.coder.activation, BatchTopK)
    for field in ("models", "sites", "text", "policy", "optimizer", "fit", "seed"):
        assert getattr(made, field) == getattr(config, field)
    assert made.coder.latents == config.coder.latents
    assert {field for field, _ in made.objective.active()} == {"recon", "aux"}
    if isinstance(config.coder.activation, BatchTopK):
        assert made.coder.activation == config.coder.activation
        assert made.objective.aux == config.objective.aux


def test_a_difference_of_three_models_is_refused():
    config = recipe("batchtopk_diff")
    three = {**config.models, "third": config.models["base"]}
    config = replace(config, models=three, coder=replace(config.coder, shared_start=0.0))
    with pytest.raises(UsageError, match="has 3: base, chat, third"):
        diff_sae_config(config)


def plan_of(source: str, steps: int) -> StagewisePlan:
    text = TextConfig(corpora={"main": Corpus(source=source)}, tokens=700, heldout=100, block=32)
    return StagewisePlan(before=text, changed=replace(text, tokens=800), steps=steps)


def test_each_stage_changes_the_model_or_the_text(tmp_path):
    config = replace(recipe("delta"), sites=("base/resid_post.3", "chat/resid_post.3"))
    plan, names = plan_of("stdlib", 2000), ("base", "chat")
    made = {stage: stage_config(config, names, plan, stage, tmp_path) for stage in ORDER}
    seen = {
        stage: (one.models["model"].path[-2:], one.text.tokens, one.start)
        for stage, one in made.items()
    }
    assert seen == {
        "start": ("2b", 700, None),
        "data": ("2b", 800, str(tmp_path / "start")),
        "data_model": ("it", 800, str(tmp_path / "data")),
        "model": ("it", 700, str(tmp_path / "start")),
        "model_data": ("it", 800, str(tmp_path / "model")),
    }
    for stage, one in made.items():
        assert one.sites == ("resid_post.3",)
        assert isinstance(one.wiring, Crosscoder)
        assert one.fit.steps == (config.fit.steps if stage == "start" else 2000)
        assert one.objective.aux.weight == (1 / 32 if stage == "start" else 0)


def coder_of(W_dec: torch.Tensor) -> Coder:
    coder = Coder(Crosscoder()(Layout(("s",), (W_dec.shape[1],)), len(W_dec)), ReLU())
    with torch.no_grad():
        coder.W_dec[0].copy_(W_dec)
    return coder


def test_rotation_is_one_minus_the_cosine():
    before = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 0]])
    after = torch.tensor([[3.0, 0], [0, 2], [-1, 0], [3, 4], [1, 0]])
    found = rotation(coder_of(before), coder_of(after))
    assert found.tolist() == pytest.approx([0, 1, 2, 0.4, 0], abs=1e-6)
    with pytest.raises(UsageError, match="cannot be compared"):
        rotation(coder_of(before), coder_of(after[:3]))


FEATURES, WIDTH, CHANGED = 24, 32, 3


def trained(coder: Coder, truth: torch.Tensor, steps: int, seed: int) -> Coder:
    """The coder after some steps on sums of 3 of the true directions."""
    generator = random(seed)
    config = TrainConfig(
        coder=CoderConfig(latents=FEATURES + 8, activation=BatchTopK(k=3)),
        objective=Objective(aux=AuxK(k=4, weight=1 / 32 if steps > 400 else 0.0)),
        fit=FitConfig(steps=steps, batch=512, dtype="float32", dead_after=5000),
        optimizer=Adam(lr=3e-3),
    )

    def rows() -> torch.Tensor:
        return strengths(FEATURES, 3, generator) @ truth * 5

    made = Coder(coder.wiring, coder.activation)
    made.load_state_dict(coder.state_dict())
    fit(config, state_of(config, made), Table(rows), quiet_hooks())
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def stages():
    """An SAE on rows of 24 features; the same gone on with where 3 of them have turned halfway to
    elsewhere, and where none has; the latents that stand for these 3, and how far each turned."""
    truth = directions(FEATURES, WIDTH, random(0))
    changed = truth.clone()
    changed[:CHANGED] = normalize(truth[:CHANGED] + directions(CHANGED, WIDTH, random(1)), dim=-1)
    coder = Coder(Crosscoder()(Layout(("resid_mid.1",), (WIDTH,)), FEATURES + 8), BatchTopK(k=3))
    transpose_init(coder, 0.3, random(2))
    start = trained(coder, truth, 500, 3)
    moved = trained(start, changed, 200, 4)
    still = trained(start, truth, 120, 4)
    cosine = normalize(truth[:CHANGED], dim=-1) @ normalize(start.W_dec[0], dim=-1).T
    assert cosine.max(-1).values.min() > 0.9
    turned = 1 - (truth * changed)[:CHANGED].sum(-1)
    return start, moved, still, cosine.argmax(-1), turned


def test_an_unchanged_model_turns_no_latent_and_a_changed_one_those_that_changed(stages):
    start, moved, still, changed, turned = stages
    little, much = rotation(start, still), rotation(start, moved)
    others = torch.ones(FEATURES + 8, dtype=torch.bool)
    others[changed] = False
    assert much[changed].tolist() == pytest.approx(turned.tolist(), abs=0.05)
    assert turned.min() > 0.15
    assert little.max() < 0.01
    assert much[others].max() < 0.01


def test_stagewise_ranks_what_turns_in_both_orders(stages):
    """D → F and M → F' are the changed model's; a latent that turns at one only is passed over."""
    start, moved, _, changed, _ = stages
    once = coder_of(start.W_dec[0].clone())  # as start, but for one latent, turned right round
    other = next(j for j in range(FEATURES) if j not in changed.tolist())
    with torch.no_grad():
        once.W_dec[0][other].neg_()
    coders = {"start": start, "data": start, "data_model": moved, "model": once,
              "model_data": moved}  # fmt: skip
    layout = Layout(("base/resid_mid.1", "chat/resid_mid.1"), (WIDTH, WIDTH))
    pair = pair_of(Coder(Crosscoder()(layout, 3), ReLU()))
    made = stagewise(coders, pair)
    latents = made.figures["latents"]
    assert {each["latent"] for each in latents[:CHANGED]} == set(changed.tolist())
    assert made.figures["median_rotation"]["data"] == 0
    rows = torch.randn(5, 2 * WIDTH, generator=random(7)) * 4
    found = made.strengths(condition(rows, torch.zeros(5, dtype=torch.int64)))
    order = [each["latent"] for each in latents]
    want = moved.encode(rows[:, WIDTH:])[:, order] * moved.W_dec[0][order].norm(dim=-1)
    assert torch.allclose(found, want, atol=1e-5)


def test_all_stages_are_trained_once_from_each_other(tiny_pair, tmp_path):
    text = [inspect.getsource(argparse)[i : i + 400] for i in range(0, 20_000, 400)]
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in text))
    plan = plan_of(str(tmp_path / "few.jsonl"), 4)
    config = replace(
        run_config(tiny_pair["base"], steps=6, checkpoint_every=6, heldout_every=6),
        models={
            name: ModelSpec(path=str(path), dtype="float32", device="cpu")
            for name, path in tiny_pair.items()
        },
    )
    coders = train_stages(tmp_path, config, ("base", "chat"), plan)
    assert list(coders) == list(ORDER)
    for stage, first in ORDER.items():
        if first is not None:
            assert torch.equal(coders[stage].scale_read, coders[first].scale_read)
            turned = rotation(coders[first], coders[stage])
            assert 0 < turned.max() < 0.5
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/run.json")}
    assert len(times) == 5
    again = train_stages(tmp_path, config, ("base", "chat"), plan)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/run.json")} == times
    assert torch.equal(again["model_data"].W_dec[0], coders["model_data"].W_dec[0])

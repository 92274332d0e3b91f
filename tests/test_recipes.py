"""Recipes: complete, as their sources state them, and each a round trip on a tiny model."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from crosslens.cli import main
from crosslens.coder import CrossLayer, JumpReLU, fold, load, save
from crosslens.config import from_plain, kind_of, to_plain
from crosslens.config.slots import find, slots
from crosslens.config.strict import members
from crosslens.errors import Interrupted, UsageError
from crosslens.recipes import RECIPES, recipe, summary
from crosslens.training import TrainConfig, create_run, open_models, open_run, train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A few documents, which are read faster than the standard library."""
    text = inspect.getsource(argparse)
    rows = [json.dumps({"text": text[i : i + 400]}) for i in range(0, 20_000, 400)]
    path = tmp_path_factory.mktemp("corpus") / "few.jsonl"
    path.write_text("\n".join(rows))
    return path


def tiny_models(name: str, tiny_pair: dict[str, Path]) -> list[str]:
    """Flags that put the tiny models in the place of a recipe's."""
    return [x for m in recipe(name).models for x in (f"--models.{m}.path", str(tiny_pair[m]))]


def terms(config: TrainConfig) -> set[str]:
    return {f.name for f in fields(config.objective) if getattr(config.objective, f.name).weight}


def value_at(config: TrainConfig, path: str):
    slot = find(config, path.split("."))
    assert slot is not None, path
    return slot.value


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole_and_says_whose_it_is(name):
    config = recipe(name)
    assert from_plain(TrainConfig, json.loads(json.dumps(to_plain(config))), name) == config
    assert summary(name).endswith(".")
    assert "(" in summary(name), "the source"
    assert config.fit.steps * config.fit.batch >= 12_800_000
    assert config.fit.dead_after == 10_000_000, "dead is counted in tokens"


@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_is_the_same_scheme(name):
    config, twin = recipe(name), recipe(f"{name}_smoke")
    assert (twin.fit.steps, twin.fit.device) == (20, "cpu")
    assert twin.wiring == config.wiring
    assert list(twin.models) == list(config.models)
    assert terms(twin) == terms(config)
    for path in ("coder.activation", "coder.init", "optimizer"):
        assert kind_of(type(value_at(twin, path))) == kind_of(type(value_at(config, path)))
    for path in ("coder.bias", "coder.scale", "coder.unit_norm", "coder.zero_decoder", "policy"):
        assert value_at(twin, path) == value_at(config, path)


SOURCES = {
    # notes/recipes.md section 6: official code
    "topk_sae": {
        "coder.latents": 32_768, "coder.activation.k": 32, "fit.batch": 131_072,
        "optimizer.lr": 1e-4, "optimizer.eps": 6.25e-10, "optimizer.clip": None,
        "objective.aux.weight": 1 / 32, "objective.aux.k": 256, "coder.bias": "geometric_median",
        "coder.unit_norm": True, "coder.center": True, "coder.init.unit_gain": True,
    },
    # section 7
    "matryoshka_sae": {
        "optimizer.lr": 3e-4, "optimizer.beta1": 0.9, "optimizer.beta2": 0.99, "fit.batch": 4096,
        "objective.matryoshka.fractions": (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2),
        "objective.aux.k": 512, "coder.activation.threshold_decay": 0.99,
    },
    "jumprelu_l0": {
        "coder.activation.initial_threshold": 0.001, "coder.activation.bandwidth": 0.001,
        "coder.activation.form": "deepmind", "coder.scale": "unit_square", "optimizer.lr": 7e-5,
        "optimizer.beta1": 0.0, "optimizer.warmup": 1000, "optimizer.rise": "cosine",
        "fit.batch": 4096, "objective.l0.target": None,
    },
    # section 8
    "jumprelu_l0_target": {"objective.l0.target": 50.0, "objective.l0.ramp": "50000 steps"},
    # section 2 and ruling 2
    "jumprelu_tanh": {
        "coder.activation.form": "anthropic", "coder.activation.bandwidth": 2.0,
        "coder.activation.initial_threshold": pytest.approx(1.10517, abs=1e-4),
        "coder.scale": "root_width", "objective.tanh.weight": 20.0, "objective.tanh.ramp": 1.0,
        "objective.tanh.c": 4.0, "objective.pre_act.weight": 3e-6, "optimizer.lr": 2e-4,
        "optimizer.decay": 0.2, "optimizer.clip": 1.0, "fit.batch": 32_768,
        "objective.recon.normalize": False, "coder.firing_rate": pytest.approx(10_000 / 65_536),
        "coder.activation.input_gradient": False,
    },
    # sections 1 and 3, ruling 1
    "l1_crosscoder": {
        "optimizer.lr": 5e-5, "optimizer.decay": 0.2, "fit.steps": 200_000,
        "objective.l1.weight": 5.0, "objective.l1.ramp": 0.05, "objective.l1.norm": "sum",
        "coder.init.decoder_norm": 0.1, "objective.recon.normalize": False,
    },
    # section 5, ruling 1
    "clt_jumprelu": {
        "coder.activation.initial_threshold": 0.03, "coder.activation.bandwidth": 1.0,
        "objective.tanh.norm": "concat", "coder.firing_rate": pytest.approx(10_000 / 24_576),
    },
    # notes/diffing.md section 1
    "kissane_diff": {
        "objective.l1.weight": 2.0, "objective.l1.ramp": 0.05, "optimizer.lr": 5e-5,
        "optimizer.warmup": 0, "optimizer.decay": 0.2, "optimizer.clip": 1.0, "fit.batch": 4096,
        "fit.steps": 97_656, "coder.latents": 16_384, "coder.init.decoder_norm": 0.08,
        "sites": ("resid_pre.14",), "text.tokens": 400_000_000,
    },
    "batchtopk_diff": {
        "coder.activation.k": 100, "coder.latents": 73_728, "fit.batch": 2048,
        "optimizer.lr": 1e-4, "optimizer.warmup": 1000, "objective.aux.weight": 1 / 32,
        "coder.activation.threshold_decay": 0.999, "text.tokens": 100_000_000,
        "fit.steps": 97_656, "coder.init.decoder_norm": 1.0, "sites": ("resid_post.13",),
    },
    "designated_shared": {
        "wiring.shared": 0.04, "objective.tanh.group_factors": (0.1, 1.0),
        "objective.tanh.norm": "sum",
    },
    "dedicated": {
        "wiring.exclusive": 0.05, "coder.latents": 131_072, "coder.activation.k": 200,
        "coder.activation.k_start": 1000, "coder.activation.anneal": 0.05, "fit.steps": 100_000,
        "fit.batch": 2048, "coder.init.decoder_norm": 0.4, "objective.aux.weight": 0.03,
        "policy.outlier_norm": 2.0,
    },
    "delta": {"objective.delta.weight": 0.005, "wiring.shared": 0.2},
    # notes/interactions.md section 2
    "interaction_paper": {
        "objective.interaction.weight": 1000.0, "objective.interaction.form": "paper",
        "objective.interaction.sites": ("mlp_in.*",), "objective.interaction.share": 1.0,
        "objective.interaction.neurons": 1.0, "coder.latents": 1536, "coder.activation.k": 20,
        "fit.steps": 50_000, "fit.batch": 256, "text.tokens": 12_800_000, "optimizer.lr": 1e-4,
        "optimizer.decay": 0.25, "optimizer.clip": 1.0,
    },
    # docs/results/interactions_paper.md
    "interaction_exact": {
        "objective.interaction.weight": 0.1, "objective.interaction.form": "exact",
        "objective.interaction.share": 0.1, "objective.interaction.neurons": 0.25,
        "objective.interaction.ramp": 0.2, "objective.recon.normalize": True,
    },
    # seed 003
    "layer_conditioned_sae": {
        "coder.activation.k": 32, "coder.activation.signed": True, "coder.latents": 6144,
        "optimizer.lr": 3e-4, "wiring.code": "sinusoidal",
    },
}  # fmt: skip


def test_no_choice_hides_its_own_tag():
    """`kind` says which class a field holds: a class with a field of that name could not be read
    back."""
    for path, slot in slots(TrainConfig()):
        for cls in members(slot.hint):
            assert "kind" not in {f.name for f in fields(cls)}, f"{path}: {cls}"


@pytest.mark.parametrize("name", SOURCES)
def test_values_are_those_of_the_notes(name):
    config = recipe(name)
    assert {path: value_at(config, path) for path in SOURCES[name]} == SOURCES[name]


PRESETS = {
    ("deepmind", 0.001, 0.001, "unit_square"),
    ("anthropic", math.exp(0.1), 2.0, "root_width"),
    ("anthropic", 0.03, 1.0, "root_width"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_rulings_hold(name):
    config = recipe(name)
    activation, objective = config.coder.activation, config.objective
    if isinstance(activation, JumpReLU):
        numbers = (activation.form, activation.initial_threshold, activation.bandwidth)
        assert (*numbers, config.coder.scale) in PRESETS
        assert not activation.input_gradient
    across = isinstance(config.wiring, CrossLayer)
    for term in ("l1", "tanh", "pre_act"):
        if getattr(objective, term).weight:
            assert getattr(objective, term).norm == ("concat" if across else "sum"), term
    if objective.aux.weight:
        assert objective.recon.normalize, "AuxK's weight is stated beside a normalised error"


def interrupting_at(step: int):
    def report(stage, done, total, figures):
        if stage == "train" and done == step:
            signal.raise_signal(signal.SIGINT)

    return report


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip(name, tiny_pair, corpus, tmp_path, capsys):
    """Train, stop and resume, evaluate, save, load, fold: by the commands wherever there is one."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    given = ["train", "--recipe", f"{name}_smoke", *tiny_models(name, tiny_pair), "--quiet"]
    given += ["--text.corpora.main.source", str(corpus)]
    assert main([*given, "--out", str(whole)]) == 0
    assert open_run(whole).record()["recipe"] == f"{name}_smoke"

    config = open_run(whole).config()
    with pytest.raises(Interrupted):
        train(create_run(stopped, config), open_models(config), interrupting_at(15))
    assert main(["resume", str(stopped), "--quiet"]) == 0
    first, second = load(whole), load(stopped)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert all(value.isfinite().all() for value in first.state_dict().values())

    capsys.readouterr()
    assert main(["evaluate", str(whole), "--json", "--splice-tokens", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["fvu"] < 10
    assert 0 < found["l0"] <= config.coder.latents
    assert found["splice"]

    per_site = bool(first.wiring.n_codes)
    x_BX = torch.randn(16, first.wiring.read.width)
    site_B = torch.arange(16) % first.wiring.n_codes if per_site else None
    save(first, tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(x_BX, site_B), first(x_BX, site_B))
    if per_site:
        with pytest.raises(UsageError, match="which no single set of weights can hold"):
            fold(first)
        return
    folded = fold(first)
    assert torch.equal(folded.encode(x_BX) != 0, first.encode(x_BX) != 0)
    torch.testing.assert_close(folded(x_BX), first(x_BX), rtol=1e-4, atol=1e-4)


def test_recipes_are_listed(capsys):
    assert main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipes"] == {n: summary(n) for n in RECIPES}
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(RECIPES)]] == list(RECIPES)
    assert max(map(len, lines[: len(RECIPES)])) <= 120


def test_file_and_flags_go_on_top_of_a_recipe(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("coder: {latents: 128}\nseed: 3\n")
    given = ["train", "--recipe", "topk-sae", "--config", str(tmp_path / "mine.yaml")]
    assert main([*given, "--seed", "4", "--print-config"]) == 0
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    assert main(["train", "--config", str(tmp_path / "all.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == (tmp_path / "all.yaml").read_text()
    text = (tmp_path / "all.yaml").read_text()
    for line in ("latents: 128", "seed: 4", "k: 32", "path: openai-community/gpt2"):
        assert line in text

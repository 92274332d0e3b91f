"""One SAE fine-tuned along two orders, data → model and model → data: what turns is what changed.

Bricken et al. (Anthropic, December 2024), *Stage-Wise Model Diffing*. Five dictionaries with the
same latents: S on model a and text from before the change; D goes on from S on the changed text, M
goes on from S on model b; both go on to model b on the changed text.

    S ─ data ──▶ D ─ model ─▶ F
    S ─ model ─▶ M ─ data ──▶ F'

A latent that turns both when the model changes and the text has already (D → F), and when the text
changes and the model has already (M → F'), is tied to what the model does on that text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from crosslens.coder import Coder, Crosscoder, dense_decoder, load
from crosslens.diffing.baselines.baseline import Baseline, latent_strengths
from crosslens.diffing.baselines.diff_sae import batchtopk_sae
from crosslens.diffing.nulls import null_run
from crosslens.diffing.pair import Pair
from crosslens.diffing.planted import TOP
from crosslens.errors import UsageError
from crosslens.lm import split_site
from crosslens.text import TextConfig
from crosslens.training import AuxK, TrainConfig
from crosslens.training.train import Report, silent

Stage = Literal["start", "data", "data_model", "model", "model_data"]
ORDER: dict[Stage, Stage | None] = {
    "start": None,
    "data": "start",
    "data_model": "data",
    "model": "start",
    "model_data": "model",
}
"""S, D, F, M, F', each with the one that it goes on from."""
_ON_B: tuple[Stage, ...] = ("data_model", "model", "model_data")
_ON_CHANGED: tuple[Stage, ...] = ("data", "data_model", "model_data")
ONLY_MODEL = "model"
"""What the SAE's one model is called, whichever it is at a stage."""


@dataclass(frozen=True, kw_only=True)
class StagewisePlan:
    """What the SAE is trained on, and for how long."""

    before: TextConfig
    """Text from before the change."""
    changed: TextConfig
    """Text on which the change shows."""
    steps: int
    """Of each of the four fine-tunings; the first training is as long as the run's."""


def stage_config(
    config: TrainConfig, names: tuple[str, str], plan: StagewisePlan, stage: Stage, folder: Path
) -> TrainConfig:
    """The training of one dictionary: an SAE (a crosscoder over the run's sites of one model) with
    the run's latents and k.

    Fine-tunings leave dead latents alone (no AuxK): one that is revived turns though nothing has
    changed.

    Args:
        config: the two models' crosscoder's.
        names: of the models, (a, b).
        folder: where the runs are, each in a folder of its stage's name.
    """
    a, b = names
    first = ORDER[stage]
    changes = {
        "models": {ONLY_MODEL: config.models[b if stage in _ON_B else a]},
        "sites": tuple(dict.fromkeys(split_site(site)[1] for site in config.sites)),
        "wiring": Crosscoder(),
        "text": plan.changed if stage in _ON_CHANGED else plan.before,
        "shuffle_models": False,
        "align": False,
    }
    made = batchtopk_sae(config, changes)
    if first is None:
        return made
    objective = replace(made.objective, aux=AuxK(weight=0.0))
    fit = replace(made.fit, steps=plan.steps)
    return replace(made, objective=objective, fit=fit, start=str(folder / first))


def train_stages(
    folder: Path,
    config: TrainConfig,
    names: tuple[str, str],
    plan: StagewisePlan,
    report: Report = silent,
) -> dict[Stage, Coder]:
    """All five, each in a run of its own under `folder`; those that are there already are read.

    Raises:
        CrosslensError: a run is there with other settings.
    """
    coders: dict[Stage, Coder] = {}
    for stage in ORDER:
        run, _ = null_run(folder / stage, stage_config(config, names, plan, stage, folder), report)
        coders[stage] = load(run.folder)
    return coders


def rotation(before: Coder, after: Coder) -> Float[Tensor, " l"]:
    """1 − cosine of each latent's decoder before and after, over all sites, in scaled units; 0 of a
    latent that writes nothing.

    Raises:
        UsageError: they do not have the same latents and sites.
    """
    old_LY, new_LY = dense_decoder(before), dense_decoder(after)
    if old_LY.shape != new_LY.shape:
        raise UsageError(
            f"Decoders of {tuple(old_LY.shape)} and {tuple(new_LY.shape)} latents and columns "
            "cannot be compared: one coder has to go on from the other."
        )
    old_LY, new_LY = old_LY.double().cpu(), new_LY.double().cpu()
    silent_L = (old_LY.norm(dim=-1) == 0) | (new_LY.norm(dim=-1) == 0)
    return (1 - cosine_similarity(old_LY, new_LY, dim=-1)).clamp_min(0).masked_fill(silent_L, 0.0)


def rotations(coders: Mapping[Stage, Coder]) -> dict[str, Float[Tensor, " l"]]:
    """How far each latent turns at each of the four fine-tunings (`data`, `data_model`, …)."""
    pairs = [(stage, first) for stage, first in ORDER.items() if first is not None]
    return {stage: rotation(coders[first], coders[stage]) for stage, first in pairs}


def stagewise(coders: Mapping[Stage, Coder], pair: Pair) -> Baseline:
    """Its components are the 20 latents of F, on model b, that turn most at D → F and at M → F':
    those whose smaller rotation of the two is largest.

    Args:
        pair: the crosscoder's, whose harvested rows hold b's sites.
    """
    turned = rotations(coders)
    score_L = torch.minimum(turned["data_model"], turned["model_data"])
    top_K = score_L.argsort(descending=True, stable=True)[:TOP]
    figures = {
        "median_rotation": {stage: float(turn_L.median()) for stage, turn_L in turned.items()},
        "latents": [
            {"latent": latent, **{stage: float(turned[stage][latent]) for stage in turned}}
            for latent in top_K.tolist()
        ],
    }
    final = coders["data_model"]
    strengths = latent_strengths(final, top_K, _rows_of_b(final, pair))
    return Baseline(name="stagewise", strengths=strengths, figures=figures)


def _rows_of_b(coder: Coder, pair: Pair) -> Callable[[Tensor], Tensor]:
    """Takes out of harvested rows what the SAE reads: its sites of model b."""
    layout = pair.coder.wiring.harvest
    columns: list[Any] = [
        layout.slice(f"{pair.b}/{split_site(site)[1]}") for site in coder.wiring.read.sites
    ]
    return lambda rows_RX: torch.cat([rows_RX[:, each] for each in columns], -1)

"""A BatchTopK SAE on the differences of the same rows, trained as the crosscoder was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crosslens.activations import Source
from crosslens.coder import (
    AbsTopK,
    Activation,
    BatchTopK,
    Coder,
    Difference,
    GroupMax,
    TopK,
    all_rows,
    dense_decoder,
)
from crosslens.diffing.baselines.baseline import Baseline, latent_strengths
from crosslens.diffing.baselines.lens import promoted
from crosslens.diffing.planted import TOP
from crosslens.diffing.stream import Coded, Progress, coded, quiet
from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import LanguageModel, split_site
from crosslens.training import AuxK, Objective, TrainConfig


def diff_sae_config(config: TrainConfig) -> TrainConfig:
    """The training of an SAE on b − a that goes with a crosscoder's: same text, sites, steps and
    latents, and the same k where the crosscoder has one.

    Raises:
        UsageError: there are not two models.
    """
    if len(config.models) != 2:
        raise UsageError(
            f"A difference is between two models; the run has {len(config.models)}: "
            f"{', '.join(config.models)}. Leave the diff-SAE out of the baselines."
        )
    return batchtopk_sae(config, {"wiring": Difference()})


def batchtopk_sae(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """`config` with a BatchTopK and its plain objective, without what only a crosscoder can have,
    and with some fields changed."""
    coder = replace(
        config.coder,
        activation=_batchtopk(config.coder.activation),
        firing_rate=None,
        shared_start=0.0,
        zero_decoder=False,
    )
    aux = config.objective.aux
    objective = Objective(aux=aux if aux.weight else AuxK())
    rest: dict[str, Any] = {"start": None, **changes}
    return replace(config, coder=coder, objective=objective, **rest)


def _batchtopk(activation: Activation) -> BatchTopK:
    match activation:
        case BatchTopK():
            return activation
        case TopK() | AbsTopK() | GroupMax():
            return BatchTopK(k=activation.k)
        case _:
            return BatchTopK()


def diff_sae(
    coder: Coder, source: Source, models: Mapping[str, LanguageModel], progress: Progress = quiet
) -> Baseline:
    """Its components are the 20 latents that carry most of the difference.

    A latent's share is its Σ (z·‖d‖)² over the source's tokens, over that of all latents.

    Args:
        coder: of differences, trained.
        models: the source's models; the last one's logit lens reads the latents.

    Raises:
        UsageError: the coder is not of differences, or has other sites than the source.
    """
    if coder.wiring.view != "difference":
        raise UsageError("This coder is not over differences: train one with --wiring difference.")
    use = _use(coder, source, progress)
    top_K = use.energy_L.argsort(descending=True, stable=True)[:TOP]
    figures = {
        "tokens": use.tokens,
        "fvu": use.fvu,
        "l0": float(use.count_L.sum()) / use.tokens,
        "dead": float((use.count_L == 0).double().mean()),
        "latents": [
            {**told, "top_tokens": list(tokens)}
            for told, tokens in zip(use.told(top_K), _read(coder, top_K, models), strict=True)
        ],
    }
    strengths = latent_strengths(coder, top_K, lambda r_RX: all_rows(coder.wiring, r_RX).x_BX)
    return Baseline(name="diff_sae", strengths=strengths, figures=figures)


class _Use:
    """What the latents do over the tokens of a source."""

    def __init__(self, coder: Coder) -> None:
        self.norm_L = dense_decoder(coder).norm(dim=-1).double().cpu()
        self.energy_L = torch.zeros_like(self.norm_L)
        """Σ (z·‖d‖)²."""
        self.count_L = torch.zeros_like(self.norm_L)
        """Tokens on which each is active."""
        self.sum_Y = torch.zeros(coder.wiring.write.width, dtype=torch.float64)
        self.square = self.error = 0.0
        self.tokens = 0

    def add(self, part: Coded) -> None:
        latent_E, value_E = part.latent_E.cpu(), part.value_E.double().cpu()
        self.energy_L.index_add_(0, latent_E, (value_E * self.norm_L[latent_E]).square())
        self.count_L.index_add_(0, latent_E, torch.ones_like(value_E))
        self.sum_Y += part.target_RY.sum(0).double().cpu()
        self.square += float(part.target_RY.square().sum())
        self.error += float(part.error_RY.square().sum())
        self.tokens += len(part.tokens_R)

    @property
    def fvu(self) -> float:
        """Squared error over the differences' spread about their mean."""
        return self.error / (self.square - float(self.sum_Y.square().sum()) / self.tokens)

    def told(self, latents_K: Tensor) -> list[dict[str, Any]]:
        share_L = self.energy_L / self.energy_L.sum().clamp_min(torch.finfo(torch.float64).tiny)
        density_L = self.count_L / self.tokens
        return [
            {"latent": latent, "share": float(share_L[latent]), "density": float(density_L[latent])}
            for latent in latents_K.tolist()
        ]


def _use(coder: Coder, source: Source, progress: Progress) -> _Use:
    use = _Use(coder)
    for part in coded(source, coder, progress):
        use.add(part)
    if not use.tokens:
        raise CrosslensError("The token policy keeps no token: there is nothing to look at.")
    return use


def _read(
    coder: Coder, latents_K: Tensor, models: Mapping[str, LanguageModel]
) -> list[tuple[str, ...]]:
    """The tokens that some latents promote, at the last site they write."""
    site = coder.wiring.write.sites[-1]
    W_KY = dense_decoder(coder)[latents_K.to(coder.b_dec.device)]
    last_KD = W_KY[:, coder.wiring.write.slice(site)]
    model = list(models.values())[-1]
    return [each.top for each in promoted(last_KD, model, split_site(site)[1])]

"""Crosscoders over the layers of one model."""

from __future__ import annotations

from crosslens.coder import Causal, DataPoint, JumpReLU, ReLU, Transpose, Uniform
from crosslens.lm import ModelSpec
from crosslens.recipes.parts import PILE, loop, web
from crosslens.training import (
    Adam,
    AuxK,
    CoderConfig,
    NormL1,
    Objective,
    PreAct,
    Recon,
    Tanh,
    TrainConfig,
)

JANUARY = Objective(
    recon=Recon(normalize=False),
    tanh=Tanh(weight=20.0, ramp=1.0, c=4.0, norm="sum"),
    pre_act=PreAct(weight=3e-6),
    aux=AuxK(weight=0.0),
)
"""λ_S 20 (10 to 20) over the whole run, c = 4, λ_P = 3e-6 (three implementations agree)."""

JANUARY_ADAM = Adam(lr=2e-4, eps=1e-8, warmup=0, decay=0.2, clip=1.0)


def fires(latents: int) -> float:
    """The share of rows on which each of m latents starts by firing: 10,000/m. It means little for
    m near 10⁴; set `coder.firing_rate` yourself when you change the width."""
    return 10_000 / latents


def l1_crosscoder() -> TrainConfig:
    """ReLU crosscoder over layers with L1 of norms (Anthropic, October 2024).

    The page gives the equations; the numbers are those of Circuits Updates April 2024. λ = 5 is
    second-hand. Neel Nanda's replication over 12 GPT-2 sites found a decoder norm of 0.1 harmful
    and used 0.005: try it when few latents live. The text, model, width and sites are ours.
    """
    batch, steps = 4096, 200_000
    return TrainConfig(
        models={"base": ModelSpec(path="smollm2")},
        text=web(PILE, batch * steps),
        coder=CoderConfig(
            latents=16_384,
            activation=ReLU(),
            init=Transpose(decoder_norm=0.1),
            bias="zero",
        ),
        objective=Objective(
            recon=Recon(normalize=False),
            l1=NormL1(weight=5.0, ramp=0.05, norm="sum"),
            aux=AuxK(weight=0.0),
        ),
        optimizer=Adam(lr=5e-5, eps=1e-8, warmup=0, decay=0.2, clip=1.0),
        fit=loop(batch * steps, batch),
    )


def jumprelu_tanh() -> TrainConfig:
    """JumpReLU with tanh and pre-activation penalties (Anthropic, January 2025).

    θ = e^0.1 (three implementations; a library's θ = 0.1 is a misreading), ε = 2, W_dec within
    ±1/√n (the page's own erratum), W_enc = (n/m)·W_decᵀ. No gradient of the window reaches the
    input. The number of tokens was not published; the model, site and width are ours.
    """
    rows, batch, latents = 1_000_000_000, 32_768, 65_536
    return TrainConfig(
        models={"base": ModelSpec(path="google/gemma-2-2b")},
        sites=("resid_post.13",),
        text=web(PILE, rows),
        coder=CoderConfig(
            latents=latents,
            activation=JumpReLU.anthropic(),
            init=Uniform(),
            bias="zero",
            firing_rate=fires(latents),
        ),
        objective=JANUARY,
        optimizer=JANUARY_ADAM,
        fit=loop(rows, batch),
    )


def weakly_causal() -> TrainConfig:
    """Weakly causal crosscoder: a layer's latents write that layer and later ones (Anthropic).

    The wiring of October 2024, with the activation, penalties and rates of January 2025 and the
    data-point start of October 2025 (p = 0.4 for this wiring; formula second-hand). Gemma Scope 2's
    four depths and its width of 65k. Penalty: the sum of norms, as for every crosscoder here.
    """
    rows, batch, latents = 1_000_000_000, 32_768, 65_536
    return TrainConfig(
        models={"base": ModelSpec(path="google/gemma-3-1b-pt")},
        sites=("resid_post.7", "resid_post.13", "resid_post.17", "resid_post.22"),
        wiring=Causal(),
        text=web(PILE, rows),
        coder=CoderConfig(
            latents=latents,
            activation=JumpReLU.anthropic(),
            init=DataPoint(p=0.4),
            bias="zero",
            firing_rate=fires(latents),
        ),
        objective=JANUARY,
        optimizer=JANUARY_ADAM,
        fit=loop(rows, batch),
    )

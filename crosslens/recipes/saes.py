"""Sparse autoencoders: one site, or one dictionary for many sites."""

from __future__ import annotations

from crosslens.coder import BatchTopK, Gated, GroupMax, JumpReLU, LayerConditioned, TopK, Transpose
from crosslens.lm import ModelSpec
from crosslens.recipes.parts import FINEWEB_EDU, OPENWEBTEXT, PILE, loop, web
from crosslens.text import Corpus
from crosslens.training import (
    L0,
    Adam,
    AuxK,
    CoderConfig,
    GatedAux,
    GatedL1,
    Matryoshka,
    Objective,
    Recon,
    SignSGD,
    TrainConfig,
)

DEEPMIND_ADAM = Adam(lr=7e-5, beta1=0.0, eps=1e-8, warmup=1000, rise="cosine", decay=0.0, clip=None)
"""No first moment; warmed up from a tenth of the rate along a cosine."""


def topk_sae() -> TrainConfig:
    """TopK SAE with AuxK on GPT-2 small (Gao et al. 2024; openai/sparse_autoencoder).

    Deviations: rows are scaled by one number per site, where the code normalises each row; the
    error is divided by each batch's variance, where the code fixes one number at the start. The
    paper takes k_aux near d/2 (512 here), the code 256. 1.3B tokens are from memory of the paper.
    """
    rows, batch = 1_300_000_000, 131_072
    return TrainConfig(
        models={"base": ModelSpec(path="openai-community/gpt2")},
        sites=("resid_post.8",),
        text=web(OPENWEBTEXT, rows, block=64),
        coder=CoderConfig(
            latents=32_768,
            activation=TopK(k=32),
            init=Transpose(decoder_norm=1.0, unit_gain=True),
            bias="geometric_median",
            center=True,
            unit_norm=True,
        ),
        objective=Objective(recon=Recon(normalize=True), aux=AuxK(weight=1 / 32, k=256)),
        optimizer=Adam(lr=1e-4, eps=6.25e-10, warmup=0, decay=0.0, clip=None),
        fit=loop(rows, batch),
    )


def matryoshka_sae() -> TrainConfig:
    """Nested BatchTopK SAE on Gemma 2 2B (Bussmann et al. 2025; bartbussmann/matryoshka_sae).

    Numbers are the code's; the paper's dictionary has 65,536 latents, cut at 2,048, 6,144, 14,336
    and 30,720. Prefix errors are summed, as the paper writes; the code averages them.
    Deviations: AuxK is detached and normalised, and counts tokens (the code: neither, 5 batches);
    the encoder has a bias; rows are scaled (this code trains on raw ones, its predecessor
    normalised each).
    """
    rows, batch = 500_000_000, 4096
    return TrainConfig(
        models={"base": ModelSpec(path="google/gemma-2-2b")},
        sites=("resid_pre.8",),
        text=web(OPENWEBTEXT, rows, block=128),
        coder=CoderConfig(
            latents=36_864,
            activation=BatchTopK(k=32, threshold_decay=0.99),
            init=Transpose(decoder_norm=1.0),
            bias="zero",
            center=True,
            unit_norm=True,
        ),
        objective=Objective(
            recon=Recon(weight=0.0),
            matryoshka=Matryoshka(weight=1.0, fractions=(1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)),
            aux=AuxK(weight=1 / 32, k=512),
        ),
        optimizer=Adam(lr=3e-4, beta2=0.99, eps=1e-8, warmup=0, decay=0.0, clip=None),
        fit=loop(rows, batch),
    )


def gated_sae() -> TrainConfig:
    """Gated SAE (Rajamanoharan et al. 2024, 2404.16014) on Pythia 2.8B.

    The rate is the authors' (0.0003 for all gated SAEs). The paper sweeps λ for each site; 0.1 is
    the default of dictionary_learning and sets the L0, so tune it. Width, tokens and site are ours.
    """
    rows, batch = 1_000_000_000, 4096
    return TrainConfig(
        models={"base": ModelSpec(path="EleutherAI/pythia-2.8b")},
        sites=("resid_post.16",),
        text=web(PILE, rows),
        coder=CoderConfig(
            latents=20_480,
            activation=Gated(),
            init=Transpose(decoder_norm=1.0),
            bias="zero",
            center=True,
            unit_norm=True,
            scale="unit_square",
        ),
        objective=Objective(
            recon=Recon(normalize=False),
            gated_l1=GatedL1(weight=0.1, ramp=0.0),
            gated_aux=GatedAux(weight=1.0, normalize=False),
            aux=AuxK(weight=0.0),
        ),
        optimizer=Adam(lr=3e-4, beta1=0.0, eps=1e-8, warmup=1000, decay=0.0, clip=None),
        fit=loop(rows, batch),
    )


def jumprelu_l0() -> TrainConfig:
    """JumpReLU SAE with an L0 penalty (DeepMind 2024, 2407.14435; Gemma Scope) on Gemma 2 2B.

    θ = ε = 0.001 at unit mean-square norm; the L0 penalty moves θ only. λ is one of the released
    SAEs' (1.25e-4, 2.5e-4 and 5e-4 at width 16k); 4B tokens. Sources conflict on its warm-up:
    10,000 steps (2024, from memory) or 50,000 (Gemma Scope 2). θ is learnt as it is; the paper's
    appendix trains its logarithm.
    """
    rows, batch = 4_000_000_000, 4096
    return TrainConfig(
        models={"base": ModelSpec(path="google/gemma-2-2b")},
        sites=("resid_post.12",),
        text=web(PILE, rows),
        coder=CoderConfig(
            latents=16_384,
            activation=JumpReLU.deepmind(),
            init=Transpose(decoder_norm=1.0),
            bias="zero",
            center=False,
            unit_norm=True,
            scale="unit_square",
        ),
        objective=Objective(
            recon=Recon(normalize=False),
            l0=L0(weight=2.5e-4, ramp="10000 steps"),
            aux=AuxK(weight=0.0),
        ),
        optimizer=DEEPMIND_ADAM,
        fit=loop(rows, batch),
    )


def jumprelu_l0_target() -> TrainConfig:
    """JumpReLU SAE held at L0 ≈ 50 by a quadratic penalty (Gemma Scope 2, December 2025).

    λ(2/L0*)(‖f‖₀−L0*)² over Matryoshka prefixes, λ warmed up over 50,000 steps. The report, as far
    as it could be read, gives neither λ nor the prefixes nor the density penalty's weight: λ is
    ours, the prefixes are Bussmann's, and the density penalty is left out.
    """
    rows, batch = 4_000_000_000, 4096
    return TrainConfig(
        models={"base": ModelSpec(path="google/gemma-3-1b-pt")},
        sites=("resid_post.13",),
        text=web(PILE, rows),
        coder=CoderConfig(
            latents=16_384,
            activation=JumpReLU.deepmind(),
            init=Transpose(decoder_norm=1.0),
            bias="zero",
            unit_norm=True,
            scale="unit_square",
        ),
        objective=Objective(
            recon=Recon(weight=0.0),
            matryoshka=Matryoshka(weight=1.0, normalize=False),
            l0=L0(weight=2.5e-4, ramp="50000 steps", target=50.0),
            aux=AuxK(weight=0.0),
        ),
        optimizer=DEEPMIND_ADAM,
        fit=loop(rows, batch),
    )


def groupmax() -> TrainConfig:
    """One latent of each of k groups (EleutherAI/sparsify; crosscode) by schedule-free sign SGD.

    sparsify's defaults: 32 × d latents, k = 32, batches of 32 × 2048 tokens, FVU, no AuxK, rate
    5e-3/√(latents/2¹⁴). Deviations: the winner of a group is rectified; decoders start at norm 1
    but are not held there, which an average of iterates would undo.
    """
    rows, batch, latents = 1_000_000_000, 65_536, 32 * 576
    return TrainConfig(
        models={"base": ModelSpec(path="HuggingFaceTB/SmolLM2-135M")},
        sites=("resid_post.15",),
        text=web(FINEWEB_EDU, rows, block=2048),
        coder=CoderConfig(
            latents=latents,
            activation=GroupMax(k=32),
            init=Transpose(decoder_norm=1.0),
            bias="mean",
            center=True,
        ),
        objective=Objective(recon=Recon(normalize=True), aux=AuxK(weight=0.0)),
        optimizer=SignSGD(lr=5e-3 / (latents / 2**14) ** 0.5, momentum=0.95, warmup=0),
        fit=loop(rows, batch),
    )


def layer_conditioned_sae() -> TrainConfig:
    """One TopK SAE for all layers, told the layer by a sinusoidal code (seed 003's notebook).

    k = 32 of 4 × 1536 latents, signed, one random layer for each token, Qwen2.5-Coder-1.5B-Instruct
    on tiny-codes. Mended: layers are scaled one by one, padding is left out, the start is the
    transpose and the mean. Deviations: no weight decay (1e-4 there), answers without their prompts.
    """
    rows, batch = 50_000_000, 8192
    return TrainConfig(
        models={"base": ModelSpec(path="Qwen/Qwen2.5-Coder-1.5B-Instruct")},
        sites=("resid_pre.*",),
        wiring=LayerConditioned(code="sinusoidal"),
        text=web(Corpus(source="nampdn-ai/tiny-codes", field="response"), rows),
        coder=CoderConfig(
            latents=4 * 1536,
            activation=TopK(k=32, signed=True),
            init=Transpose(decoder_norm=0.1),
            bias="mean",
        ),
        objective=Objective(recon=Recon(normalize=True), aux=AuxK(weight=0.0)),
        optimizer=Adam(lr=3e-4, eps=1e-8, warmup=0, decay=0.0, clip=None),
        fit=loop(rows, batch),
    )

"""What differs between two models. The first, `base`, is the one counted from."""

from __future__ import annotations

from dataclasses import replace

from crosslens.activations import TokenPolicy
from crosslens.coder import (
    BatchTopK,
    Dedicated,
    DesignatedShared,
    Difference,
    JumpReLU,
    ReLU,
    Transpose,
    Uniform,
)
from crosslens.recipes.crosscoders import JANUARY, JANUARY_ADAM, fires
from crosslens.recipes.parts import GEMMA_PAIR, PILE, chat_and_web, loop
from crosslens.text import Corpus
from crosslens.training import (
    Adam,
    AuxK,
    CoderConfig,
    Delta,
    NormL1,
    Objective,
    Recon,
    Tanh,
    TrainConfig,
)

PLAIN_CHAT = Corpus(source="lmsys/lmsys-chat-1m", field="conversation", chat="plain")
"""`User:`/`Assistant:` lines, since Gemma's template breaks the base model (Kissane et al.)."""
GEMMA_CHAT = Corpus(source="science-of-finetuning/lmsys-chat-1m-chat-formatted")
"""Conversations that Minder et al. have already put through Gemma's template."""
FINEWEB = Corpus(source="science-of-finetuning/fineweb-1m-sample")


def kissane_diff() -> TrainConfig:
    """ReLU crosscoder of Gemma 2 2B base and chat with L1 of norms (Kissane et al. 2024).

    Their λ, rates, batch, width, decoder norm, texts and site. Deviations: scales are estimated
    without BOS (they included it there and dropped it in training); rows are read once per epoch
    (their buffer repeats 512 sequences); the scales are stored with the coder.
    """
    rows, batch = 400_000_000, 4096
    return TrainConfig(
        models=GEMMA_PAIR,
        sites=("resid_pre.14",),
        text=chat_and_web(PLAIN_CHAT, PILE, rows),
        policy=TokenPolicy(outlier_norm=None),
        coder=CoderConfig(
            latents=16_384,
            activation=ReLU(),
            init=Transpose(decoder_norm=0.08),
            bias="zero",
        ),
        objective=Objective(
            recon=Recon(normalize=False),
            l1=NormL1(weight=2.0, ramp=0.05, norm="sum"),
            aux=AuxK(weight=0.0),
        ),
        optimizer=Adam(lr=5e-5, eps=1e-8, warmup=0, decay=0.2, clip=1.0),
        fit=loop(rows, batch),
    )


def designated_shared() -> TrainConfig:
    """Crosscoder with shared latents that cost a tenth (Anthropic, February 2025).

    10k of 250k latents have one decoder for both models, stored once, and λ_shared = 0.1 λ (0.1 to
    0.2 published; the MoE study found 0.7 with BatchTopK). The rest is the recipe of January 2025.
    Deviation: a quarter of the width, at the same share, so that one GPU can hold it.
    """
    rows, batch, latents = 1_000_000_000, 32_768, 65_536
    return TrainConfig(
        models=GEMMA_PAIR,
        sites=("resid_post.13",),
        wiring=DesignatedShared(shared=10_000 / 250_000),
        text=chat_and_web(GEMMA_CHAT, FINEWEB, rows),
        coder=CoderConfig(
            latents=latents,
            activation=JumpReLU.anthropic(),
            init=Uniform(),
            bias="zero",
            firing_rate=fires(latents),
        ),
        objective=replace(
            JANUARY, tanh=Tanh(weight=20.0, ramp=1.0, c=4.0, norm="sum", group_factors=(0.1, 1.0))
        ),
        optimizer=JANUARY_ADAM,
        fit=loop(rows, batch),
    )


def batchtopk_diff() -> TrainConfig:
    """BatchTopK crosscoder of Gemma 2 2B base and chat (Minder et al. 2025, 2504.02922).

    k = 100 of 32 × d latents by the score f·Σ‖W_dec‖, 100M tokens twice, both models' weights the
    same at the start. The toolkit anneals k from 1024 over 2,000 steps; the paper does not.
    Deviations: squared error over variance (their code averages unsquared norms of unscaled rows;
    the paper writes half the square); the running threshold starts at step 1, not 1000.
    """
    tokens, batch, width = 100_000_000, 2048, 2304
    return TrainConfig(
        models=GEMMA_PAIR,
        sites=("resid_post.13",),
        text=chat_and_web(GEMMA_CHAT, FINEWEB, tokens),
        coder=CoderConfig(
            latents=32 * width,
            activation=BatchTopK(k=100, threshold_decay=0.999),
            init=Transpose(decoder_norm=1.0),
            bias="geometric_median",
            shared_start=1.0,
        ),
        objective=Objective(recon=Recon(normalize=True), aux=AuxK(weight=1 / 32, k=width // 2)),
        optimizer=Adam(lr=1e-4, eps=1e-8, warmup=1000, decay=0.0, clip=1.0),
        fit=loop(2 * tokens, batch),
    )


def dedicated() -> TrainConfig:
    """Latents of one model only, of the other only, and shared ones (2602.11729).

    5 % + 5 % + 90 % of 131,072, k from 1000 to 200 over 5,000 of 100,000 steps, AuxK 0.03, rows
    beyond twice the median norm dropped. Exclusive latents have no weights for the other model, so
    no mask is needed in Adam or AuxK. Deviations: the mean norm, not the median, is brought to √d,
    each model to its own; medians are of a sample, not of each batch. The models are ours.
    """
    steps, batch = 100_000, 2048
    return TrainConfig(
        models=GEMMA_PAIR,
        sites=("resid_post.13",),
        wiring=Dedicated(exclusive=0.05),
        text=chat_and_web(GEMMA_CHAT, FINEWEB, steps * batch),
        policy=TokenPolicy(outlier_norm=2.0),
        coder=CoderConfig(
            latents=131_072,
            activation=BatchTopK(k=200, k_start=1000, anneal=0.05, threshold_decay=0.999),
            init=Transpose(decoder_norm=0.4),
            bias="geometric_median",
        ),
        objective=Objective(recon=Recon(normalize=True), aux=AuxK(weight=0.03, k=1152)),
        optimizer=Adam(lr=1e-4, eps=1e-8, warmup=1000, decay=0.0, clip=1.0),
        fit=loop(steps * batch, batch),
    )


def delta() -> TrainConfig:
    """Crosscoder that must also explain chat minus base (Delta-Crosscoder, 2603.04426).

    Adds 0.005·‖Δx − (W_chat − W_base) z‖² over the latents that are not shared; 20 % are. Built on
    `batchtopk_diff`, whose numbers stand where the paper's were not seen. Deviations: one k for all
    latents (theirs has two), ordinary text (theirs has contrastive prompts).
    """
    built_on = batchtopk_diff()
    return replace(
        built_on,
        wiring=DesignatedShared(shared=0.2),
        objective=replace(built_on.objective, delta=Delta(weight=0.005)),
    )


def diff_sae() -> TrainConfig:
    """BatchTopK SAE on chat minus base activations (diffing-toolkit).

    k = 100 of 2 × d latents, 150M rows; the other numbers are those of `batchtopk_diff`.
    """
    built_on, rows = batchtopk_diff(), 150_000_000
    return replace(
        built_on,
        wiring=Difference(),
        text=chat_and_web(GEMMA_CHAT, FINEWEB, rows),
        coder=replace(built_on.coder, latents=2 * 2304, shared_start=0.0),
        fit=loop(rows, 2048),
    )

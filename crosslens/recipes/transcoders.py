"""From an MLP's input to its output, in one layer or across layers."""

from __future__ import annotations

from crosslens.coder import CrossLayer, JumpReLU, TopK, Transcoder, Transpose, Uniform
from crosslens.lm import ModelSpec
from crosslens.recipes.crosscoders import fires
from crosslens.recipes.parts import FINEWEB_EDU, OPENWEBTEXT, loop, web
from crosslens.training import (
    Adam,
    AuxK,
    CoderConfig,
    Objective,
    PreAct,
    Recon,
    SignSGD,
    Tanh,
    TrainConfig,
)

GPT2 = {"base": ModelSpec(path="openai-community/gpt2")}
MLPS = ("mlp_in.*", "mlp_out.*")


def skip_transcoder() -> TrainConfig:
    """TopK transcoder with a linear skip, decoder and skip starting at 0 (Paulo et al. 2025).

    As EleutherAI/skip-transcoder-SmolLM2-135M-128x: 128 × d latents, 1B tokens, schedule-free sign
    SGD, inputs and outputs normalised; k = 32, batches of 32 × 2048 and the rate
    5e-3/√(latents/2¹⁴) are sparsify's defaults.
    """
    rows, batch, latents = 1_000_000_000, 65_536, 128 * 576
    return TrainConfig(
        models={"base": ModelSpec(path="HuggingFaceTB/SmolLM2-135M")},
        sites=("mlp_in.15", "mlp_out.15"),
        wiring=Transcoder(skip=True),
        text=web(FINEWEB_EDU, rows, block=2048),
        coder=CoderConfig(
            latents=latents,
            activation=TopK(k=32),
            init=Transpose(decoder_norm=1.0),
            bias="mean",
            zero_decoder=True,
        ),
        objective=Objective(recon=Recon(normalize=True), aux=AuxK(weight=0.0)),
        optimizer=SignSGD(lr=5e-3 / (latents / 2**14) ** 0.5, momentum=0.95, warmup=0),
        fit=loop(rows, batch),
    )


def clt_topk() -> TrainConfig:
    """TopK cross-layer transcoder of GPT-2 small (EleutherAI/clt-training).

    16 active latents for each of 12 layers, a linear skip in every layer, inputs and outputs
    normalised, Adam at 2e-4 after 50 steps, contexts of 128 without BOS. Deviations: the 192 are
    chosen over all layers together, not 16 in each; 32 × d latents a layer where they sweep up to
    128; a layer's skip also reaches the later layers that its latents write.
    """
    rows, batch, layers, width = 1_000_000_000, 4096, 12, 768
    return TrainConfig(
        models=GPT2,
        sites=MLPS,
        wiring=CrossLayer(writes="later", skip=True),
        text=web(FINEWEB_EDU, rows, block=128),
        coder=CoderConfig(
            latents=layers * 32 * width,
            activation=TopK(k=16 * layers),
            init=Transpose(decoder_norm=1.0),
            bias="mean",
            zero_decoder=True,
        ),
        objective=Objective(recon=Recon(normalize=True), aux=AuxK(weight=0.0)),
        optimizer=Adam(lr=2e-4, eps=1e-8, warmup=50, decay=1.0, clip=1.0),
        fit=loop(rows, batch),
    )


def clt_jumprelu() -> TrainConfig:
    """JumpReLU cross-layer transcoder of GPT-2 small (*Circuit Tracing*, Anthropic, March 2025).

    The penalty takes the norm of the concatenated decoders, the opposite of a crosscoder. θ = 0.03,
    ε = 1, W_enc within ±1/√m and W_dec within ±1/√(L·d) (four implementations, not in the page's
    visible text); λ, rates, batch and width are CLT-Forge's for GPT-2. Nobody pins c: 4 here, 1
    elsewhere; the pre-activation weight spans 7.5e-8 to 1e-4. Deviations: contexts of 64 (16
    there); no stop at a chosen L0; Adam's rate falls over the last 5 % as there, without restarts.
    """
    rows, batch, layers, width = 300_000_000, 8192, 12, 768
    latents = layers * 32 * width
    return TrainConfig(
        models=GPT2,
        sites=MLPS,
        wiring=CrossLayer(writes="later"),
        text=web(OPENWEBTEXT, rows, block=64),
        coder=CoderConfig(
            latents=latents,
            activation=JumpReLU.anthropic_clt(),
            init=Uniform(),
            bias="zero",
            firing_rate=fires(latents // layers),
        ),
        objective=Objective(
            recon=Recon(normalize=False),
            tanh=Tanh(weight=2.0, ramp=0.7, c=4.0, norm="concat"),
            pre_act=PreAct(weight=1e-5, norm="concat"),
            aux=AuxK(weight=0.0),
        ),
        optimizer=Adam(lr=4e-4, eps=1e-8, warmup=10, decay=0.05, clip=1.0),
        fit=loop(rows, batch),
    )

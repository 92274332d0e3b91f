"""An MLP behind a norm in which pairs of latents interact in known ways, each by its neurons."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from crosslens.functional.gathers import Lists, starts_of
from crosslens.interactions.neurons.contributions import Branch, Effective, SiteChunk
from crosslens.lm.mlp import MLP, Norm

NAME = "resid_mid.0"
PAIRS, NEURONS, BACKGROUND, TOKENS = 8, 24, 20, 8
"""Of each kind; of each pair; latents that are of no pair; on which a pair meets."""

# What the gate (without one, the neuron) of a pair reads of both, and of what is always there.
PUSHED: dict[str, tuple[float, float, float]] = {
    "conjunction": (1.5, 1.5, -1.7),
    "saturation": (-3.0, -3.0, 2.0),
    "cancellation": (2.0, -2.0, 0.0),
    "split duplicate": (0.8, 0.8, -1.7),
    "gating": (0.0, 2.5, -1.0),
    "norm-mediated": (0.0, 0.0, 1.0),
}
LONG = 6.0
"""Length of the decoders that change the norm."""


@dataclass(frozen=True)
class Planted:
    effective: Effective
    chunks: list[dict[str, SiteChunk]]
    truth: dict[tuple[int, int], str]


def planted(kind: str, gated: bool, seed: int = 0) -> Planted:
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in PUSHED if gated or name != "gating"]
    truth = {(2 * p, 2 * p + 1): names[p // PAIRS] for p in range(PAIRS * len(names))}
    effective = _effective(kind, gated, truth, generator)
    codes = _codes(truth, generator)
    half = len(codes) // 2
    chunks = [{NAME: _chunk(effective, part, generator)} for part in (codes[:half], codes[half:])]
    return Planted(effective, chunks, truth)


def _effective(kind: str, gated: bool, truth, generator) -> Effective:
    n_latents, n_neurons = 2 * len(truth) + BACKGROUND, NEURONS * len(truth)
    width = n_latents + 1  # a direction for each latent, and one that is always there
    always = width**0.5
    decoder = torch.eye(n_latents, width) + 0.01 * _normal(generator, n_latents, width)
    inner = 0.01 * _normal(generator, n_neurons, width)
    value = 0.01 * _normal(generator, n_neurons, width)
    value[:, -1] = 1 / always
    for p, ((i, j), name) in enumerate(truth.items()):
        at = slice(p * NEURONS, (p + 1) * NEURONS)
        first, second, constant = PUSHED[name]
        inner[at, i], inner[at, j], inner[at, -1] = first, second, constant / always
        if name == "gating":
            value[at, i], value[at, -1] = 2.0, 0.0
        if name == "split duplicate":
            decoder[j] = decoder[i] + 0.02 * _normal(generator, width)
            inner[at, j] = 0.0  # both write along i
            inner[at, i] = 2 * first
        if name == "norm-mediated":
            decoder[[i, j]] *= LONG
    bias = torch.zeros(width)
    bias[-1] = always
    norm = Norm(kind="rms", gain_D=torch.ones(width), bias_D=None, eps=1e-6)
    mlp = MLP(
        layer=0,
        kind=kind,
        W_in_ND=value if gated else inner,
        b_in_N=None,
        W_gate_ND=inner if gated else None,
        b_gate_N=None,
        W_out_DN=torch.ones(width, n_neurons),
        b_out_D=None,
        norm=norm,
    )

    def branch(W_ND: torch.Tensor) -> Branch:
        zeros = torch.zeros(n_neurons)
        return Branch(
            E_LN=decoder @ W_ND.T, moving_N=bias @ W_ND.T, fixed_N=zeros, through_DN=W_ND.T
        )

    return Effective(
        site=NAME,
        layer=0,
        mlp=mlp,
        norm=norm,
        input_site=NAME,
        decoder_LD=decoder,
        bias_D=bias,
        value=branch(value if gated else inner),
        gate=branch(inner) if gated else None,
        out_norm_N=torch.ones(n_neurons),
    )


def _codes(truth, generator) -> list[dict[int, float]]:
    """One planted pair on each token, and three of the background, in random order."""
    found = []
    background = 2 * len(truth) + torch.arange(BACKGROUND)
    for pair in truth:
        for _ in range(TOKENS):
            chosen = background[torch.randperm(BACKGROUND, generator=generator)[:3]].tolist()
            strength = 0.8 + 0.4 * torch.rand(5, generator=generator)
            found.append(dict(zip([*pair, *chosen], strength.tolist(), strict=True)))
    return [found[n] for n in torch.randperm(len(found), generator=generator).tolist()]


def _chunk(effective: Effective, codes: list[dict[int, float]], generator) -> SiteChunk:
    latents = [latent for code in codes for latent in sorted(code)]
    value_E = torch.tensor([code[latent] for code in codes for latent in sorted(code)])
    lists = Lists(
        starts_of(torch.tensor([len(code) for code in codes])),
        torch.tensor(latents, dtype=torch.int32),
    )
    missed = 0.02 * _normal(generator, len(codes), len(effective.bias_D))
    rows = effective.bias_D + missed
    rows = rows.index_add(0, lists.items_N, effective.decoder_LD[latents] * value_E[:, None])
    assert effective.norm is not None
    return SiteChunk(
        effective=effective,
        row_R=torch.arange(len(codes)),
        document_R=torch.arange(len(codes)) // 2,
        lists=lists,
        value_E=value_E,
        scalar_R=effective.norm.scalar(rows),
        input_RD=rows,
        missed_RD=missed,
    )


def with_norm(these: SiteChunk, kind: str) -> SiteChunk:
    """A chunk whose effective weights come after a norm of its input."""
    width = these.input_RD.shape[1]
    norm = Norm(kind=kind, gain_D=torch.ones(width), bias_D=None, eps=0.1)
    rows = norm.centred(these.input_RD)
    effective = replace(these.effective, norm=norm)
    return replace(these, effective=effective, input_RD=rows, scalar_R=norm.scalar(rows))


def _normal(generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)

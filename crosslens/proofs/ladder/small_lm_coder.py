"""A crosscoder of a small language model's stream, and regions of its contexts. Nothing here is
trusted: what comes of it are hints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens import functional as F
from crosslens.coder import (
    Coder,
    Crosscoder,
    Layout,
    TopK,
    Transpose,
    all_rows,
    train_pass,
)
from crosslens.proofs.families.small_lm import sites
from crosslens.proofs.ladder.small_lm import SmallLM, Text, forward, windows
from crosslens.proofs.ladder.small_lm_penalty import penalty, readers_of


@dataclass(frozen=True)
class Features:
    """A crosscoder's vectors in the model's own units, and the coder itself on scaled rows."""

    coder: Coder
    scale_P: Tensor
    """What each site's rows were multiplied by."""
    decoder_PFD: Tensor
    bias_PD: Tensor

    def scaled(self, rows_PRD: Tensor) -> Tensor:
        """Rows of the stream as the coder takes them [R, P D]."""
        return _scaled(rows_PRD, self.scale_P)


def train_coder(
    config: SmallLM,
    weights: Mapping[str, Tensor],
    text: Text,
    said: Callable[[str], None],
) -> Features:
    """A TopK crosscoder over every site of the stream, on the training text, with the plan's
    interaction penalty. Sites are scaled to equal size, so that none is drowned."""
    plan = config.coder
    generator = torch.Generator().manual_seed(config.seed + 3)
    layout = Layout(sites(config.layers), (config.width,) * (2 * config.layers + 1))
    coder = Coder(Crosscoder()(layout, plan.features), TopK(k=plan.active))
    Transpose()(coder, torch.empty(0, layout.width), generator)
    sample = _rows(config, 16 * plan.rows, weights, text, generator)
    scale_P = (config.width**0.5) / sample.norm(dim=-1).mean(1)
    with torch.no_grad():
        coder.b_dec.copy_((sample.mean(1) * scale_P[:, None]).flatten())
    variance = float(_scaled(sample, scale_P).var(0).sum())
    how = plan.penalty, plan.form
    more = penalty(how, readers_of(weights, scale_P), variance, config.seed + 4)
    coder.b_dec.requires_grad_(plan.bias == "learnt")
    optimizer = torch.optim.Adam(coder.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99))
    for step in range(plan.steps):
        if step % 16 == 0 and step:
            sample = _rows(config, 16 * plan.rows, weights, text, generator)
        at = slice(step % 16 * plan.rows, (step % 16 + 1) * plan.rows)
        x_BX = _scaled(sample[:, at], scale_P)
        done = train_pass(coder, all_rows(coder.wiring, x_BX), progress=step / plan.steps)
        loss = F.squared_error(x_BX, done.recon_BY)
        optimizer.zero_grad()
        torch.autograd.backward(loss + more(done) if plan.penalty else loss)
        optimizer.step()
        if step % 200 == 0:
            said(f"training the crosscoder: step {step}, loss {float(loss.detach()):.1f}")
    return _features(coder, scale_P)


def _features(coder: Coder, scale_P: Tensor) -> Features:
    """The trained coder's vectors, in the model's own units."""
    coder.eval()
    decoder = _by_site(coder.W_dec[0], scale_P)
    bias = _by_site(coder.b_dec[None], scale_P)[:, 0] / scale_P[:, None]
    return Features(coder, scale_P, (decoder / scale_P[:, None, None]).contiguous(), bias)


def _by_site(vectors_FX: Tensor, scale_P: Tensor) -> Tensor:
    return vectors_FX.detach().reshape(len(vectors_FX), len(scale_P), -1).transpose(0, 1)


def _scaled(rows_PRD: Tensor, scale_P: Tensor) -> Tensor:
    return (rows_PRD * scale_P[:, None, None]).transpose(0, 1).flatten(1)


@torch.no_grad()
def _rows(
    config: SmallLM,
    count: int,
    weights: Mapping[str, Tensor],
    text: Text,
    generator: torch.Generator,
) -> Tensor:
    """The stream at every site [P, rows, D] of windows drawn at random, in random order."""
    tokens, _ = windows(text.train, -(-count // config.length), config.length, generator)
    rows = torch.stack([site.flatten(0, 1) for site in forward(weights, tokens)[1]])
    return rows[:, torch.randperm(rows.shape[1], generator=generator)[:count]]


@torch.no_grad()
def encoded(features: Features, rows_PRD: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Codes of rows: the features [R, K] that the coder picks, and strengths that fit the rows best
    for these, none negative (projected gradient from the coder's own)."""
    scaled = features.scaled(rows_PRD)
    strength, index = features.coder.encode(scaled.float()).topk(active)
    vectors = features.coder.W_dec[0][index].double()
    target = scaled.double() - features.coder.b_dec.double()
    gram = vectors @ vectors.transpose(1, 2)
    aim = (vectors @ target[..., None])[..., 0]
    step = 1 / gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True).clamp_min(1e-9)
    found = strength.double()
    for _ in range(200):
        found = (found - step * ((gram @ found[..., None])[..., 0] - aim)).clamp_min(0)
    return index.contiguous(), found.contiguous()


@torch.no_grad()
def clustered(rows_RD: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: each row's cluster [R], and the clusters' means [C, D]."""
    generator = torch.Generator().manual_seed(seed)
    centre_CD = rows_RD[torch.randperm(len(rows_RD), generator=generator)[:count]].clone()
    for _ in range(LLOYD):
        nearest_R = nearest(rows_RD, centre_CD)
        size_C = torch.bincount(nearest_R, minlength=count).clamp_min(1)[:, None]
        total_CD = torch.zeros_like(centre_CD).index_add_(0, nearest_R, rows_RD)
        empty = (total_CD == 0).all(1, keepdim=True)
        centre_CD = torch.where(empty, centre_CD, total_CD / size_C)
    return nearest(rows_RD, centre_CD), centre_CD


LLOYD = 8
"""Rounds."""


def nearest(rows_RD: Tensor, centre_CD: Tensor) -> Tensor:
    """The nearest centre of each row."""
    return torch.cdist(rows_RD, centre_CD).argmin(1)

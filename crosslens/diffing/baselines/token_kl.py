"""KL between the two models' next-token predictions, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from crosslens.activations import Source, other_tokenizers
from crosslens.diffing.baselines.baseline import Baseline
from crosslens.diffing.planted import Condition
from crosslens.diffing.stream import Progress, quiet
from crosslens.errors import CrosslensError, UsageError
from crosslens.evaluation import kl_divergence
from crosslens.lm import LanguageModel, split_site

SHOWN = 20
BEFORE = 16
"""Tokens of context shown up to a place, itself included."""
LEAST = 3
"""Times that a token must occur for its mean to be told."""


@dataclass(frozen=True)
class Peak:
    """A place where the predictions differ much, and the token that each model expects most."""

    kl: float
    block: int
    position: int
    next_a: int
    next_b: int


@dataclass(frozen=True, kw_only=True)
class TokenKL:
    """KL(b ‖ a) of next-token predictions in nats, over the tokens of a source that count."""

    sum_V: Float64[Tensor, " v"]
    """Summed over the places where each token had just been read."""
    count_V: Int64[Tensor, " v"]
    peaks: tuple[Peak, ...]
    """The largest, at most one of each block, largest first."""

    @property
    def count(self) -> int:
        """Tokens that count."""
        return int(self.count_V.sum())

    @property
    def mean(self) -> float:
        """Over all of them."""
        return float(self.sum_V.sum()) / self.count


@torch.no_grad()
def read_kl(source: Source, a: str, b: str, progress: Progress = quiet) -> TokenKL:
    """One pass of the models over all blocks.

    Raises:
        UsageError: the models have different tokenizers.
        CrosslensError: the token policy keeps no token.
    """
    _check_same_vocabulary(source)
    size = int(source.blocks.tokens_NT.max()) + 1
    sum_V, count_V = torch.zeros(size).double(), torch.zeros(size).long()
    peaks: list[Peak] = []
    for index in range(source.n_chunks):
        at = source.block_range(index)
        found = _predictions(source, index, a, b)
        tokens_R = source.blocks.tokens_NT[at][found.keep_BT].long()
        sum_V.index_add_(0, tokens_R, found.kl_BT[found.keep_BT].double())
        count_V.index_add_(0, tokens_R, torch.ones_like(tokens_R))
        peaks = sorted([*peaks, *_peaks(found, at.start)], key=lambda each: -each.kl)[:SHOWN]
        progress(index + 1, source.n_chunks)
    if not count_V.any():
        raise CrosslensError("The token policy keeps no token: there is nothing to compare.")
    return TokenKL(sum_V=sum_V, count_V=count_V, peaks=tuple(peaks))


def token_kl(found: TokenKL, source: Source, a: str, b: str) -> Baseline:
    """Its one component is the KL of the predictions after a token.

    Args:
        found: what `read_kl` found on `source`.
    """

    def strengths(condition: Condition) -> Tensor:
        kl_NT = _all(condition.source, a, b)
        return kl_NT[condition.prompt_R, condition.position_R][:, None]

    return Baseline(
        name="token_kl", strengths=strengths, figures=_told(found, source, source.models[b])
    )


def _check_same_vocabulary(source: Source) -> None:
    if other_tokenizers(source.models):
        raise UsageError(
            f"The models {' and '.join(source.models)} have different tokenizers, so their "
            "predictions are over different tokens and have no KL. Leave token_kl out."
        )


@torch.no_grad()
def _all(source: Source, a: str, b: str) -> Tensor:
    """The KL at every position of every block [N, T]."""
    chunks = range(source.n_chunks)
    return torch.cat([_predictions(source, index, a, b).kl_BT for index in chunks])


@dataclass(frozen=True)
class _Predictions:
    """What both models predict on the blocks of a chunk, on the CPU."""

    kl_BT: Float[Tensor, "b t"]
    keep_BT: Bool[Tensor, "b t"]
    next_a_BT: Int64[Tensor, "b t"]
    next_b_BT: Int64[Tensor, "b t"]


def _predictions(source: Source, index: int, a: str, b: str) -> _Predictions:
    tokens_BT = source.blocks.tokens_NT[source.block_range(index)]
    seen: dict[str, Tensor] = {}
    for name, model in source.models.items():
        sites = [plain for owner, plain in map(split_site, source.layout.sites) if owner == name]
        wanted = [*sites, "logits"] if name in (a, b) else sites
        seen |= {f"{name}/{site}": x for site, x in model.capture(tokens_BT, wanted).items()}
    keep_BT, _ = source.keep(index, [seen[site] for site in source.layout.sites])
    # Heads may have rows beyond the tokenizer's, each as many as its model was padded with.
    vocabulary = len(source.models[b].tokenizer)
    a_BTV, b_BTV = (seen[f"{name}/logits"][..., :vocabulary] for name in (a, b))
    return _Predictions(
        kl_BT=kl_divergence(b_BTV, a_BTV).cpu(),
        keep_BT=keep_BT,
        next_a_BT=a_BTV.argmax(-1).cpu(),
        next_b_BT=b_BTV.argmax(-1).cpu(),
    )


def _peaks(found: _Predictions, first_block: int) -> list[Peak]:
    """The largest of each block that has a token that counts."""
    best = found.kl_BT.masked_fill(~found.keep_BT, -torch.inf).max(1)
    at_B = best.indices[:, None]
    told = zip(
        best.values.tolist(),
        best.indices.tolist(),
        found.next_a_BT.gather(1, at_B).flatten().tolist(),
        found.next_b_BT.gather(1, at_B).flatten().tolist(),
        found.keep_BT.any(1).tolist(),
        strict=True,
    )
    return [
        Peak(kl, first_block + block, position, next_a, next_b)
        for block, (kl, position, next_a, next_b, counts) in enumerate(told)
        if counts
    ]


def _told(found: TokenKL, source: Source, model: LanguageModel) -> dict[str, Any]:
    """The mean, the tokens after which predictions differ most, and the places, for JSON."""

    def text(ids: list[int]) -> str:
        return str(model.tokenizer.decode(ids))

    mean_V = found.sum_V / found.count_V.clamp_min(1)
    often = (found.count_V >= LEAST).nonzero().squeeze(-1)
    top = often[mean_V[often].argsort(descending=True)][:SHOWN].tolist()
    tokens_NT = source.blocks.tokens_NT
    return {
        "tokens": found.count,
        "mean": found.mean,
        "top_tokens": [
            {"token": text([v]), "kl": float(mean_V[v]), "times": int(found.count_V[v])}
            for v in top
        ],
        "places": [
            {
                "text": text(tokens_NT[each.block, : each.position + 1][-BEFORE:].tolist()),
                "kl": each.kl,
                "next_a": text([each.next_a]),
                "next_b": text([each.next_b]),
            }
            for each in found.peaks
        ],
    }

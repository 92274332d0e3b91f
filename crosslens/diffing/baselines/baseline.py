"""What every baseline comes to: strengths of its components on tokens, and figures of its own.

All are judged as the crosscoder is (`diffing.planted`): on the same prompts and positions, by the
sum over components of the largest strength in a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from crosslens.coder import Coder, dense_decoder
from crosslens.diffing.planted import Condition, Conditions, detection

Strengths = Callable[[Condition], Tensor]
"""Rows of one set of prompts → how strong each component is on each row [R, C]."""
OfRows = Callable[[Tensor], Tensor]
"""The same of a baseline that needs no more than harvested rows [R, X], raw."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A way to find what differs, other than the crosscoder. Never told what was planted."""

    name: str
    strengths: Strengths
    figures: dict[str, Any]
    """What it says about the pair by itself, ready for JSON."""


def from_rows(strengths: OfRows) -> Strengths:
    """Strengths that are a function of harvested rows alone."""
    return lambda condition: strengths(condition.rows_RX)


@torch.no_grad()
def judged(baseline: Baseline, found: Conditions, seed: int = 0) -> dict[str, Any]:
    """How well a baseline finds the planted behaviour, and its own figures, ready for JSON.

    `auroc` is of triggered against clean prompts; `auroc_vs_same_text` of triggered prompts against
    the same text with the base in both places; `detection` has all of them with their intervals.
    """
    value_P = {
        name: torch.stack(
            [part_RC.amax(0).sum() for part_RC in each.by_prompt(baseline.strengths(each).cpu())]
        )
        for name, each in found.named().items()
    }
    detected = detection(value_P, seed)
    return {
        "auroc": detected.auroc.value,
        "auroc_vs_same_text": detected.against_base.value,
        "detection": asdict(detected),
        **baseline.figures,
    }


def latent_strengths(coder: Coder, latents_K: Int64[Tensor, " k"], take: OfRows) -> Strengths:
    """z·‖d‖ of some latents, ‖d‖ being the norm of all that a latent writes, scaled units.

    Args:
        take: harvested rows → the rows [R, X] that the coder reads, raw.
    """
    latents_K = latents_K.to(coder.b_dec.device)
    norm_K = dense_decoder(coder).norm(dim=-1)[latents_K]

    @torch.no_grad()
    def strengths(rows_RX: Float[Tensor, "r x"]) -> Float[Tensor, "r k"]:
        z_RL = coder.eval().encode(take(rows_RX).float().to(norm_K.device))
        strong_RK: Tensor = z_RL[:, latents_K].float() * norm_K
        return strong_RK

    return from_rows(strengths)

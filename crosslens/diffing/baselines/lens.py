"""Directions read through the logit lens: final norm, then the output embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.lm import LanguageModel

SHOWN = 10
_RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Sites whose vectors are, or are added to, the residual stream."""
_TOKENS_AT_ONCE = 16384


@dataclass(frozen=True)
class Promoted:
    """The tokens whose logits a direction raises and lowers most; none off the residual stream."""

    top: tuple[str, ...] = ()
    bottom: tuple[str, ...] = ()


@torch.no_grad()
def promoted(
    direction_CD: Float[Tensor, "c d"], model: LanguageModel, site: str, shown: int = SHOWN
) -> list[Promoted]:
    """For each direction, the tokens with the largest and the smallest logits W_U·norm(x).

    x is the direction at norm √D, and the norm's bias is left out: norm(x) − norm(0). A direction
    of norm 0 promotes nothing. What later layers make of it is not seen (nostalgebraist 2020,
    *logit lens*; ADL reads mean differences so).

    Args:
        site: where the directions live, as `model` calls it.
    """
    if site.partition(".")[0] not in _RESIDUAL:
        return [Promoted() for _ in direction_CD]
    order_CV = _logits(direction_CD.float(), model).argsort(dim=-1, descending=True)
    ends = zip(order_CV[:, :shown].tolist(), order_CV.flip(1)[:, :shown].tolist(), strict=True)
    told = [Promoted(_texts(model, top), _texts(model, bottom)) for top, bottom in ends]
    alive_C = (direction_CD.norm(dim=-1) > 0).tolist()
    return [each if alive else Promoted() for each, alive in zip(told, alive_C, strict=True)]


def _logits(direction_CD: Tensor, model: LanguageModel) -> Tensor:
    """Logits of the tokenizer's tokens [C, V], float32: a slice of the vocabulary at a time."""
    module: Any = model.module
    weight_VD: Tensor = module.get_output_embeddings().weight[: len(model.tokenizer)]
    tiny = torch.finfo(torch.float32).tiny
    unit_CD = direction_CD / direction_CD.norm(dim=-1, keepdim=True).clamp_min(tiny)
    x_CD = (unit_CD * direction_CD.shape[1] ** 0.5).to(weight_VD)
    final = model.anatomy.taps["final"].module
    through_CD = (final(x_CD) - final(torch.zeros_like(x_CD[:1]))).float()
    parts = [through_CD @ part_VD.float().T for part_VD in torch.split(weight_VD, _TOKENS_AT_ONCE)]
    return torch.cat(parts, -1).cpu()


def _texts(model: LanguageModel, ids: list[int]) -> tuple[str, ...]:
    return tuple(str(model.tokenizer.decode([token])) for token in ids)

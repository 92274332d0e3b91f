"""What a latent says to the vocabulary directly: decoder, final norm, head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from crosslens.coder import Coder, Layout
from crosslens.explore.codes import Floats, Ints
from crosslens.lm import LanguageModel, split_site

SHOWN = 10
_RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Sites whose vectors are, or are added to, the residual stream."""
_TOKENS_AT_ONCE, _LATENTS_AT_ONCE = 16384, 1024
_Best: TypeAlias = tuple[Tensor, Tensor]
"""Values and token ids [L, K]."""


@dataclass(frozen=True)
class LogitTable:
    """The tokens each latent promotes and suppresses most; id -1 where a latent writes nothing."""

    site: str
    top_id_LK: Ints
    top_LK: Floats
    bottom_id_LK: Ints
    bottom_LK: Floats


@torch.no_grad()
def direct_logits(
    coder: Coder, models: Mapping[str, LanguageModel], n_tokens: int
) -> LogitTable | None:
    """Direct logit attribution of every latent at the last residual-stream site it may write.

    W_U·(norm(d) − norm(0)) for the decoder direction d at norm √D: through the final norm's gain
    (and its centring, if it has one), without its bias. So the number is the logit, against the
    mean over the vocabulary, when the residual stream holds this latent's direction alone; what
    later layers make of it is left out.

    Args:
        n_tokens: size of the tokenizer's vocabulary; a head may have more rows, which are unused.
    """
    site = _last_residual_site(coder, models)
    if site is None:
        return None
    name, _ = split_site(site)
    model = models[name or next(iter(models))]
    direction_LD, writes_L = _through_norm(_decoder_at(coder, site), model)
    top, bottom = _extremes(direction_LD, _head_weight(model)[:n_tokens])
    silent_L1 = ~writes_L[:, None].cpu()
    return LogitTable(
        site=site,
        top_id_LK=top[1].masked_fill(silent_L1, -1).int().numpy(),
        top_LK=top[0].masked_fill(silent_L1, 0).numpy(),
        bottom_id_LK=bottom[1].masked_fill(silent_L1, -1).int().numpy(),
        bottom_LK=bottom[0].masked_fill(silent_L1, 0).numpy(),
    )


def _last_residual_site(coder: Coder, models: Mapping[str, LanguageModel]) -> str | None:
    """The last site written that lies on the residual stream of one of the models."""
    for site in reversed(coder.wiring.write.sites):
        name, plain = split_site(site)
        known = name in models if name else len(models) == 1
        if known and plain.split(".")[0] in _RESIDUAL:
            return site
    return None


def _decoder_at(coder: Coder, site: str) -> Tensor:
    """The latents' decoders at one site [L, D], zero for latents that do not write there."""
    write: Layout = coder.wiring.write
    width = write.widths[write.index(site)]
    parts = []
    for group, W_LY in zip(coder.wiring.groups, coder.W_dec, strict=True):
        if site in group.writes:
            whole_LY = W_LY.repeat(1, group.copies)
            parts.append(whole_LY[:, write.pick(group.writes).slice(site)])
        else:
            parts.append(W_LY.new_zeros(group.n_latents, width))
    return torch.cat(parts).float()


def _through_norm(decoder_LD: Tensor, model: LanguageModel) -> tuple[Tensor, Tensor]:
    """norm(d) − norm(0) of each direction at norm √D, in float32; which are not zero."""
    norm_L = decoder_LD.norm(dim=-1)
    unit_LD = decoder_LD / norm_L.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    weight = _head_weight(model)
    x_LD = (unit_LD * decoder_LD.shape[1] ** 0.5).to(weight)
    final = model.anatomy.taps["final"].module
    through_LD = (final(x_LD) - final(torch.zeros_like(x_LD[:1]))).float()
    return through_LD, norm_L > 0


def _head_weight(model: LanguageModel) -> Tensor:
    module: Any = model.module
    weight: Tensor = module.get_output_embeddings().weight
    return weight


def _extremes(direction_LD: Tensor, weight_VD: Tensor) -> tuple[_Best, _Best]:
    """The largest and the smallest centred logits of each latent.

    A slice of the vocabulary and some latents at a time: float32, in 64 MB, whatever the model.
    """
    mean_D = weight_VD.mean(0, dtype=torch.float32)
    tops: list[_Best] = []
    bottoms: list[_Best] = []
    for first in range(0, len(weight_VD), _TOKENS_AT_ONCE):
        part_DV = (weight_VD[first : first + _TOKENS_AT_ONCE].float() - mean_D).T
        k = min(SHOWN, part_DV.shape[1])
        ends = []
        for some_LD in torch.split(direction_LD, _LATENTS_AT_ONCE):
            logits_LV = some_LD @ part_DV
            ends.append((logits_LV.topk(k), logits_LV.topk(k, largest=False)))
        tops.append(_stacked([top for top, _ in ends], first))
        bottoms.append(_stacked([bottom for _, bottom in ends], first))
    return _merged(tops, largest=True), _merged(bottoms, largest=False)


def _stacked(parts: Sequence[_Best], first: int) -> _Best:
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]) + first


def _merged(found: Sequence[_Best], *, largest: bool) -> _Best:
    values = torch.cat([value for value, _ in found], -1)
    ids = torch.cat([index for _, index in found], -1)
    best = values.topk(min(SHOWN, values.shape[-1]), largest=largest)
    return best.values.cpu(), ids.gather(-1, best.indices).cpu()

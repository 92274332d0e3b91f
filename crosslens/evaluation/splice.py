"""Put reconstructions back into the model and see what its predictions lose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.activations import Source
from crosslens.coder import Coder, all_rows, replacements
from crosslens.coder.rows import spliced_sites
from crosslens.lm import LanguageModel, next_token_loss, split_site


@dataclass(frozen=True, kw_only=True)
class SpliceFigures:
    """Cross-entropy (nats per token) of the model with one site replaced where the policy counts
    the token; other positions keep their activations in every variant."""

    ce_clean: float
    ce: float
    """With the reconstruction."""
    ce_zero: float
    """With zeros."""
    ce_mean: float
    """With the mean activation."""
    recovered_zero: float
    """(ce_zero − ce) / (ce_zero − ce_clean)."""
    recovered_mean: float
    """(ce_mean − ce) / (ce_mean − ce_clean)."""
    kl: float
    """Mean KL(clean ‖ spliced) of the next-token distributions, nats."""


@torch.no_grad()
def splice(
    coder: Coder,
    source: Source,
    mean: Mapping[str, Tensor],
    tokens: int,
    on_chunk: Callable[[int, int], None] | None = None,
) -> dict[str, SpliceFigures]:
    """Each site that the coder writes, spliced alone, over about `tokens` positions of the source.

    Args:
        mean: mean activation per harvested site [D], for mean ablation.
    """
    coder.eval()
    n_chunks = min(source.n_chunks, max(1, round(tokens / source.rows_per_chunk)))
    totals = {site: torch.zeros(5, dtype=torch.float64) for site in spliced_sites(coder.wiring)}
    counted = 0
    for index in range(n_chunks):
        counted += _add_chunk(coder, source, mean, index, totals)
        if on_chunk:
            on_chunk(index + 1, n_chunks)
    return {site: _figures(total / counted) for site, total in totals.items()}


def _add_chunk(
    coder: Coder,
    source: Source,
    mean: Mapping[str, Tensor],
    index: int,
    totals: Mapping[str, Tensor],
) -> int:
    at = source.block_range(index)
    tokens_BT = source.blocks.tokens_NT[at]
    real_BT = ~source.blocks.padding_NT[at][:, 1:]
    sites = source.activations(tokens_BT)
    keep_BT, _ = source.keep(index, sites)
    rows_RX = torch.cat([site[keep_BT.to(site.device)].float() for site in sites], -1)
    rows = all_rows(coder.wiring, rows_RX.to(coder.b_dec.device))
    recon = replacements(coder.wiring, rows_RX, coder(rows.x_BX, rows.site_B))
    clean = {name: model.run(tokens_BT, {}) for name, model in source.models.items()}
    for site in totals:
        name, plain = split_site(site)
        name = name or next(iter(source.models))
        model, clean_BTV = source.models[name], clean[name]
        variants = (recon[site], torch.zeros(()), mean[site])
        found = [_loss(clean_BTV, tokens_BT)]
        for values in variants:
            logits_BTV = _run_with(model, plain, tokens_BT, keep_BT, values)
            found.append(_loss(logits_BTV, tokens_BT))
            if values is variants[0]:
                kl_BT = kl_divergence(clean_BTV, logits_BTV)[:, :-1].cpu()
        sums = [each[real_BT].double().sum() for each in (*found, kl_BT)]
        totals[site].add_(torch.stack(sums))
    return int(real_BT.sum())


def _run_with(
    model: LanguageModel, site: str, tokens_BT: Tensor, keep_BT: Tensor, values: Tensor
) -> Tensor:
    """Logits with `values` ([R, D], or anything that broadcasts to it) at the kept positions."""

    def replaced(x_BTD: Tensor) -> Tensor:
        keep = keep_BT.to(x_BTD.device)
        x_BTD = x_BTD.clone()
        x_BTD[keep] = values.to(x_BTD).expand(int(keep_BT.sum()), x_BTD.shape[-1])
        return x_BTD

    return model.run(tokens_BT, {site: replaced})


def _loss(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    return next_token_loss(logits_BTV, tokens_BT).cpu()


def kl_divergence(
    p_BTV: Float[Tensor, "b t v"], q_BTV: Float[Tensor, "b t v"]
) -> Float[Tensor, "b t"]:
    """KL(softmax p ‖ softmax q) at each position, in nats, in float32, row by row."""
    rows = []
    for p_TV, q_TV in zip(p_BTV, q_BTV, strict=True):
        log_p, log_q = p_TV.float().log_softmax(-1), q_TV.float().log_softmax(-1)
        rows.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.stack(rows)


def _figures(means: Tensor) -> SpliceFigures:
    ce_clean, ce, ce_zero, ce_mean, kl = means.tolist()
    return SpliceFigures(
        ce_clean=ce_clean,
        ce=ce,
        ce_zero=ce_zero,
        ce_mean=ce_mean,
        recovered_zero=_share(ce_zero - ce, ce_zero - ce_clean),
        recovered_mean=_share(ce_mean - ce, ce_mean - ce_clean),
        kl=kl,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")

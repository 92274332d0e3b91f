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
from crosslens.lm import next_token_loss, split_site
from crosslens.lm.losses import pieces


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
    clean = {name: _clean(name, source, tokens_BT) for name in source.models}
    sites = [clean[_model_of(site, source)].sites[site] for site in source.layout.sites]
    keep_BT, _ = source.keep(index, sites)
    rows_RX = torch.cat([site[keep_BT.to(site.device)].float() for site in sites], -1)
    rows = all_rows(coder.wiring, rows_RX.to(coder.b_dec.device))
    recon = replacements(coder.wiring, rows_RX, coder(rows.x_BX, rows.site_B))
    for site in totals:
        known = clean[_model_of(site, source)]
        spliced = _Spliced(source, site, tokens_BT, keep_BT, known)
        logits_BTV = spliced.logits(recon[site])
        losses_BT = [known.loss_BT, next_token_loss(logits_BTV, tokens_BT).cpu()]
        kl_BT = kl_divergence(known.logits_BTV, logits_BTV)[:, :-1].cpu()
        for values in (torch.zeros(()), mean[site]):
            losses_BT.append(next_token_loss(spliced.logits(values), tokens_BT).cpu())
        sums = [each_BT[real_BT].double().sum() for each_BT in (*losses_BT, kl_BT)]
        totals[site].add_(torch.stack(sums))
    return int(real_BT.sum())


@dataclass(frozen=True)
class _Clean:
    """What a model computes when it is left alone."""

    sites: dict[str, Tensor]
    """Activations by the names that the source gives its sites."""
    entering: dict[str, Tensor]
    """The residual that enters each layer with a site, where a spliced pass can start."""
    logits_BTV: Tensor
    loss_BT: Tensor


def _clean(name: str, source: Source, tokens_BT: Tensor) -> _Clean:
    model = source.models[name]
    mine = {
        site: split_site(site)[1] for site in source.layout.sites if _model_of(site, source) == name
    }
    entering = {f"resid_pre.{layer}" for layer in map(_layer, mine.values()) if layer is not None}
    seen = model.capture(tokens_BT, [*mine.values(), *entering, "logits"])
    sites = {site: seen[plain] for site, plain in mine.items()}
    loss_BT = next_token_loss(seen["logits"], tokens_BT).cpu()
    return _Clean(sites, {site: seen[site] for site in entering}, seen["logits"], loss_BT)


def _model_of(site: str, source: Source) -> str:
    return split_site(site)[0] or next(iter(source.models))


def _layer(site: str) -> int | None:
    """The layer that a site is in; None of a site before or after all layers."""
    number = site.partition(".")[2]
    return int(number) if number else None


@dataclass(frozen=True)
class _Spliced:
    """A model with one site replaced where the policy counts the token."""

    source: Source
    site: str
    tokens_BT: Tensor
    keep_BT: Tensor
    clean: _Clean

    def logits(self, values: Tensor) -> Tensor:
        """With `values` ([R, D], or anything that broadcasts to it) at the kept positions."""

        def replaced(x_BTD: Tensor) -> Tensor:
            keep_BT = self.keep_BT.to(x_BTD.device)
            x_BTD[keep_BT] = values.to(x_BTD).expand(int(keep_BT.sum()), x_BTD.shape[-1])
            return x_BTD

        model = self.source.models[_model_of(self.site, self.source)]
        edits = {split_site(self.site)[1]: replaced}
        return model.run(self.tokens_BT, edits, self.clean.entering)


def kl_divergence(
    p_BTV: Float[Tensor, "b t v"], q_BTV: Float[Tensor, "b t v"]
) -> Float[Tensor, "b t"]:
    """KL(softmax p ‖ softmax q) at each position, in nats, in float32, some positions at a time."""
    rows = []
    for p_TV, q_TV in zip(p_BTV, q_BTV, strict=True):
        parts = [_kl(p_PV.float(), q_PV.float()) for p_PV, q_PV in pieces(p_TV, q_TV)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def _kl(p_PV: Tensor, q_PV: Tensor) -> Tensor:
    log_p_PV, log_q_PV = p_PV.log_softmax(-1), q_PV.log_softmax(-1)
    return (log_p_PV.exp() * (log_p_PV - log_q_PV)).sum(-1)


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

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
from crosslens.errors import UsageError
from crosslens.lm import LanguageModel, next_token_loss, split_site
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

    Raises:
        UsageError: the source's models exchange their activations.
    """
    if source.exchange:
        raise UsageError(
            "These rows are of models that exchange their activations (shuffle_models), so a "
            "reconstruction does not belong in the model whose name it has: it cannot be spliced."
        )
    coder.eval()
    n_chunks = min(source.n_chunks, max(1, round(tokens / source.rows_per_chunk)))
    totals = {site: torch.zeros(6, dtype=torch.float64) for site in spliced_sites(coder.wiring)}
    for index in range(n_chunks):
        _add_chunk(coder, source, mean, index, totals)
        if on_chunk:
            on_chunk(index + 1, n_chunks)
    return {site: _figures(total[:5] / total[5]) for site, total in totals.items()}


def _add_chunk(
    coder: Coder,
    source: Source,
    mean: Mapping[str, Tensor],
    index: int,
    totals: Mapping[str, Tensor],
) -> None:
    """Add up what each site's replacements lose on chunk `index`, and the tokens predicted."""
    clean = {name: _clean(name, source, index) for name in source.models}
    owners = [source.model_of(site) for site in source.layout.sites]
    sites = [clean[o].sites[s] for o, s in zip(owners, source.layout.sites, strict=True)]
    keep_BT, _ = source.keep(index, sites)
    at = {name: source.places(index, name, keep_BT) for name in source.models}
    rows_RX = torch.cat([x[at[o]].float() for o, x in zip(owners, sites, strict=True)], -1)
    rows = all_rows(coder.wiring, rows_RX.to(coder.b_dec.device))
    recon = replacements(coder.wiring, rows_RX, coder(rows.x_BX, rows.site_B))
    for site in totals:
        name = source.model_of(site)
        known = clean[name]
        spliced = _Spliced(source.models[name], split_site(site)[1], at[name], known)
        logits_BTV = spliced.logits(recon[site])
        losses_BT = [known.loss_BT, next_token_loss(logits_BTV, known.tokens_BT).cpu()]
        kl_BT = kl_divergence(known.logits_BTV, logits_BTV)[:, :-1].cpu()
        for values in (torch.zeros(()), mean[site]):
            losses_BT.append(next_token_loss(spliced.logits(values), known.tokens_BT).cpu())
        sums = [each_BT[known.real_BT].double().sum() for each_BT in (*losses_BT, kl_BT)]
        totals[site].add_(torch.stack([*sums, known.real_BT.sum().double()]))


@dataclass(frozen=True)
class _Clean:
    """What a model computes when it is left alone."""

    tokens_BT: Tensor
    """Cut by its own tokenizer."""
    real_BT: Tensor
    """Predictions of a token, not of padding."""
    sites: dict[str, Tensor]
    """Activations by the names that the source gives its sites."""
    entering: dict[str, Tensor]
    """The residual that enters each layer with a site, where a spliced pass can start."""
    logits_BTV: Tensor
    loss_BT: Tensor


def _clean(name: str, source: Source, index: int) -> _Clean:
    model, own = source.models[name], source.blocks.some(source.block_range(index)).of(name)
    tokens_BT, real_BT = own.tokens_NT, ~own.padding_NT[:, 1:]
    mine = {
        site: split_site(site)[1] for site in source.layout.sites if source.model_of(site) == name
    }
    entering = {f"resid_pre.{layer}" for layer in map(_layer, mine.values()) if layer is not None}
    seen = model.capture(tokens_BT, [*mine.values(), *entering, "logits"])
    loss_BT = next_token_loss(seen["logits"], tokens_BT).cpu()
    return _Clean(
        tokens_BT=tokens_BT,
        real_BT=real_BT,
        sites={site: seen[plain] for site, plain in mine.items()},
        entering={site: seen[site] for site in entering},
        logits_BTV=seen["logits"],
        loss_BT=loss_BT,
    )


def _layer(site: str) -> int | None:
    """The layer that a site is in; None of a site before or after all layers."""
    number = site.partition(".")[2]
    return int(number) if number else None


@dataclass(frozen=True)
class _Spliced:
    """A model with one site replaced where the policy counts the token."""

    model: LanguageModel
    site: str
    """By the model's own name for it."""
    at: tuple[Tensor, Tensor]
    """Block and position of each token that counts."""
    clean: _Clean

    def logits(self, values: Tensor) -> Tensor:
        """With `values` ([R, D], or anything that broadcasts to it) at the tokens that count."""

        def replaced(x_BTD: Tensor) -> Tensor:
            x_BTD[self.at] = values.to(x_BTD).expand(len(self.at[0]), x_BTD.shape[-1])
            return x_BTD

        return self.model.run(self.clean.tokens_BT, {self.site: replaced}, self.clean.entering)


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

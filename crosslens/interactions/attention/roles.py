"""What latents are to a head, from the weights and how they are used: which keys they ask for as
queries, which queries ask for them as keys, and where they go as values."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from crosslens.coder import Coder
from crosslens.interactions.attention.plan import AttentionPlan
from crosslens.interactions.attention.usage import Usage
from crosslens.interactions.attention.view import HeadsView
from crosslens.interactions.neurons.effective import raw_decoder
from crosslens.lm import LanguageModel, split_site
from crosslens.lm.attention import turned


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlap:
    """How alike the sets are that some latents pick from the others, for one head."""

    latent_X: Int64[Tensor, " x"]
    """Those whose sets these are, the most used first."""
    jaccard_XX: Float[Tensor, "x x"]
    """|both| / |either| of the sets."""
    cosine_XX: Float[Tensor, "x x"]
    """Of the numbers the sets are picked by, over latents weighed by how often they are active."""
    chance: float
    """The Jaccard index that two sets of this size would have if picked at random."""

    def top(self, n: int) -> list[dict[str, object]]:
        """The n pairs with the highest Jaccard index; of equal ones, the higher cosine first."""
        i_C, j_C = torch.triu_indices(len(self.latent_X), len(self.latent_X), 1)
        jaccard_C, cosine_C = self.jaccard_XX[i_C, j_C], self.cosine_XX[i_C, j_C]
        order = cosine_C.argsort(descending=True, stable=True)
        order = order[jaccard_C[order].argsort(descending=True, stable=True)][:n]
        return [
            {
                "i": int(self.latent_X[i_C[c]]),
                "j": int(self.latent_X[j_C[c]]),
                "jaccard": float(jaccard_C[c]),
                "cosine": float(cosine_C[c]),
            }
            for c in order.tolist()
        ]

    def plain(self, n: int) -> dict[str, object]:
        """As JSON takes it; `mean` is over all pairs of these latents, None for fewer than two."""
        i_C, j_C = torch.triu_indices(len(self.latent_X), len(self.latent_X), 1)
        mean = float(self.jaccard_XX[i_C, j_C].mean()) if len(i_C) else None
        return {"mean": mean, "chance": self.chance, "top": self.top(n)}


def centred_keys(usage: Usage, head: int) -> Float[Tensor, "l a"]:
    """Each latent's key at its typical weight, less the mean key over all entries."""
    share_L = usage.entries_L / usage.entries_L.sum().clamp_min(1)
    key_LA = usage.view.key_LJA[:, usage.view.group(head)] * usage.typical_L[:, None]
    return key_LA - share_L.float() @ key_LA


def mean_queries(usage: Usage, head: int) -> Float[Tensor, "l a"]:
    """Each latent's query at its typical weight, turned by the mean turn from key to query: its
    product with a key is the mean over the distances at which drawn queries find their keys."""
    query_LA = usage.view.query_LHA[:, head] * usage.typical_L[:, None]
    cos_F, sin_F = usage.turn_2F.float()
    return usage.view.heads.scale * turned(query_LA, cos_F, sin_F)


def query_overlap(usage: Usage, head: int, plan: AttentionPlan) -> Overlap:
    """Of the most used queries: which keys each asks for."""
    latent_X = _most(usage.query_HL[head], plan.latents)
    score_XL = mean_queries(usage, head)[latent_X] @ centred_keys(usage, head).T
    return _overlap(usage, latent_X, score_XL, plan.set_size)


def key_overlap(usage: Usage, head: int, plan: AttentionPlan) -> Overlap:
    """Of the most used keys: which queries ask for each."""
    latent_X = _most(usage.key_HL[head], plan.latents)
    score_XL = centred_keys(usage, head)[latent_X] @ mean_queries(usage, head).T
    return _overlap(usage, latent_X, score_XL, plan.set_size)


def _most(use_L: Tensor, n: int) -> Tensor:
    """The latents that are used most, if at all."""
    order = use_L.argsort(descending=True, stable=True)[:n]
    return order[use_L[order] > 0]


def _overlap(usage: Usage, latent_X: Tensor, score_XL: Tensor, size: int) -> Overlap:
    active_L = usage.entries_L > 0
    score_XL = score_XL.where(active_L, 0.0)
    n_active = int(active_L.sum())
    size = min(size, n_active)
    best = score_XL.topk(size, dim=1)
    member_XL = torch.zeros_like(score_XL).scatter_(1, best.indices, (best.values > 0).float())
    both_XX = member_XL @ member_XL.T
    sizes_X = member_XL.sum(1)
    either_XX = sizes_X[:, None] + sizes_X - both_XX
    weighed_XL = score_XL * usage.entries_L.float().sqrt()
    unit_XL = torch.nn.functional.normalize(weighed_XL, dim=1)
    return Overlap(
        latent_X=latent_X,
        jaccard_XX=both_XX / either_XX.clamp_min(1),
        cosine_XX=unit_XL @ unit_XL.T,
        chance=chance_jaccard(size, n_active),
    )


def chance_jaccard(size: int, n: int) -> float:
    """The mean Jaccard index of two sets of `size` of n, picked at random."""
    if not size:
        return 0.0
    ways = [comb(size, both) * comb(n - size, size - both) for both in range(size + 1)]
    whole = comb(n, size)
    return sum(way / whole * both / (2 * size - both) for both, way in enumerate(ways))


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """A coder's latents at the site where what heads add is seen next."""

    site: str
    decoder_LD: Float[Tensor, "l d"]
    """Of unit length; 0 for a latent that does not write the site."""


def written_after(coder: Coder, model: LanguageModel, view: HeadsView) -> Written | None:
    """The first site of the residual stream after the attention that the coder writes, if any."""
    order = list(model.anatomy.taps)
    after = order.index(f"attn_out.{view.layer}")
    found = [
        site
        for site in coder.wiring.write.sites
        if split_site(site)[0] in (None, model.name)
        and split_site(site)[1].startswith("resid_")
        and order.index(split_site(site)[1]) > after
    ]
    if not found:
        return None
    site = min(found, key=lambda site: order.index(split_site(site)[1]))
    decoder_LD, _ = raw_decoder(coder, site)
    return Written(site=site, decoder_LD=torch.nn.functional.normalize(decoder_LD, dim=1))


def paths(
    usage: Usage, head: int, written: Written, plan: AttentionPlan
) -> list[dict[str, object]]:
    """The strongest ways of a latent of the keys, through the head, into one of the next site.

    `strength`: how far the head moves the residual stream along the second's decoder (of unit
    length) because of the first, mean over drawn queries: attention · weight · ⟨W_O W_V d_j, d̂_l⟩.
    Given the attention that is linear, so that nothing is left over. `cosine` is between the two
    directions.
    """
    view, carried_L = usage.view, usage.carried_HL[head].float()
    value_LV = view.value_LJV[:, view.group(head)]
    W_O_DV = view.heads.W_O_HDV[head].to(value_LV)
    length_L = ((value_LV @ (W_O_DV.T @ W_O_DV)) * value_LV).sum(1).clamp_min(0).sqrt()
    latent_X = _most(carried_L * length_L, plan.latents)
    along_XL = value_LV[latent_X] @ W_O_DV.T @ written.decoder_LD.T
    strength_XL = carried_L[latent_X, None] * along_XL
    flat = strength_XL.flatten()
    order = flat.abs().topk(min(plan.top, len(flat))).indices.tolist()
    found = [(place // strength_XL.shape[1], place % strength_XL.shape[1]) for place in order]
    return [
        {
            "key": int(latent_X[x]),
            "to": to,
            "strength": float(strength_XL[x, to]),
            "cosine": float(along_XL[x, to] / length_L[latent_X[x]]),
        }
        for x, to in found
    ]

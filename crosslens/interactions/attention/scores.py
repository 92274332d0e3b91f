"""Second pass: what heads' scores are made of, and the chosen pairs at every meeting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from crosslens.interactions.attention.plan import AttentionPlan
from crosslens.interactions.attention.query import Query, drawn
from crosslens.interactions.attention.tokens import Tokens
from crosslens.interactions.attention.usage import Usage
from crosslens.interactions.intervals import jackknife_reach
from crosslens.interactions.sums import places

ORIGINS = ("latents", "biases", "error")
CONTENT = ("position", "key", "query", "interaction")
HEAD_SUMS = (
    "variance",
    *CONTENT,
    "between",
    *(f"{query} × {key}" for query in ORIGINS for key in ORIGINS),
    "bound",
    "variation",
    "bound of none",
    "variation of none",
    "elsewhere",
)
"""Sums over queries, per head. `variance`: of its scores over the keys that count. `position`,
`key`, `query`, `interaction` and the products of `ORIGINS`: covariances of parts of the scores with
the scores, which sum to the variance, either set of them. `between`: variance of `interaction`.
`bound`: tanh(osc/4) of the scores less those of the one latent of the query that leaves least;
`variation`: the total variation between the softmaxes of the two; `… of none`: without any latent.
`elsewhere`: attention to keys that do not count."""
PAIR_SUMS = ("size", "signed", "attention", "shared", "flow")
"""Sums over meetings, per pair and head: |c̃|, c̃ (what the pair brings to the score, less its mean
over keys), attention; and over queries: the pair's flow (`attention_usage.Flow`), and |flow|."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadSums:
    """What the second pass knows of one site, by group of documents."""

    usage: Usage
    queries_G: Int64[Tensor, " g"]
    keys_G: Int64[Tensor, " g"]
    """Keys that count, over all queries: how often a pair could have met."""
    total_MHG: Float64[Tensor, "m h g"]
    """One row for each of `HEAD_SUMS`."""
    key_P: Int64[Tensor, " p"]
    """Chosen pairs, i · L + j."""
    wanted_PH: Bool[Tensor, "p h"]
    """Of which heads a pair was chosen; all heads are measured."""
    met_PG: Int64[Tensor, "p g"]
    """Keys at which a pair met."""
    distance_P: Float64[Tensor, " p"]
    """Σ of the distance over them."""
    pair_PGHM: Float64[Tensor, "p g h s"]
    """One column for each of `PAIR_SUMS`."""

    def total(self, name: str) -> Tensor:
        """One of `HEAD_SUMS` by head and group [H, G]."""
        return self.total_MHG[HEAD_SUMS.index(name)]


def ratio_interval(
    part_XG: Float64[Tensor, "x g"], whole_XG: Float64[Tensor, "x g"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ part / Σ whole, and a 95 % interval of it: as `pair_intervals.mean_interval`, for wholes
    that need not be counts. NaN where the whole is 0, low and high also where only one group has
    anything."""
    ratio_X = part_XG.sum(1) / whole_XG.sum(1)
    without_XG = (part_XG.sum(1, keepdim=True) - part_XG) / (
        whole_XG.sum(1, keepdim=True) - whole_XG
    )
    reach_X = jackknife_reach(ratio_X, without_XG, whole_XG > 0)
    return ratio_X, ratio_X - reach_X, ratio_X + reach_X


def variation_bound(score_N: Tensor) -> Tensor:
    """tanh(osc/4), osc the largest less the smallest of the last axis: at least the total variation
    between softmax(s) and softmax(s + these), whatever s is (proofs.lemmas.attention)."""
    oscillation = score_N.amax(-1) - score_N.amin(-1)
    return (oscillation / 4).tanh()


def variation(first_N: Tensor, second_N: Tensor) -> Tensor:
    """½ Σ |softmax(first) − softmax(second)| over the last axis."""
    return (first_N.softmax(-1) - second_N.softmax(-1)).abs().sum(-1) / 2


class _Site:
    """The sums of one site as they grow."""

    def __init__(self, usage: Usage, plan: AttentionPlan) -> None:
        self.usage, self.plan = usage, plan
        self.key_P, self.wanted_PH = usage.candidates(plan.candidates)
        n_heads, groups, n_pairs = usage.view.heads.n_heads, plan.groups, len(self.key_P)
        like = torch.zeros(0, dtype=torch.float64, device=usage.view.bias_D.device)
        self.total_MHG = like.new_zeros(len(HEAD_SUMS), n_heads, groups)
        self.queries_G = torch.zeros(groups, dtype=torch.int64, device=like.device)
        self.keys_G = torch.zeros_like(self.queries_G)
        self.met_PG = torch.zeros(n_pairs, groups, dtype=torch.int64, device=like.device)
        self.distance_P = like.new_zeros(n_pairs)
        self.pair_PGHM = like.new_zeros(n_pairs, groups, n_heads, len(PAIR_SUMS))
        self.mean_query_HA, self.mean_key_JA = usage.mean_query_HA, usage.mean_key_JA

    def add(self, tokens: Tokens) -> None:
        """Take in a block."""
        turned_RJA = tokens.turned_keys(self.mean_key_JA)
        for query in drawn(tokens, self.plan.queries, self.plan.seed):
            group = int(tokens.document_R[query.row].remainder(self.plan.groups))
            self.queries_G[group] += 1
            self.keys_G[group] += query.n_counted
            parts = [*self._of_scores(query, turned_RJA), *_dominated(query)]
            parts.append(query.weights_HN[:, ~query.counted_N].sum(1))
            self.total_MHG[:, :, group] += torch.stack(parts)
            self._of_pairs(query, group)

    def _of_scores(self, query: Query, turned_RJA: Tensor) -> list[Tensor]:
        """The variance and its parts, per head."""
        content_22HN = query.by_content_22HN(self.mean_query_HA, turned_RJA)
        origin_33HN, centred_HN = query.by_origin_33HN(), query.centred_HN
        parts_XHN = torch.cat([content_22HN.flatten(0, 1), origin_33HN.flatten(0, 1)])
        covariance_XH = (parts_XHN * centred_HN).sum(-1) / query.n_counted
        between_HN = query.centred(content_22HN[1, 1])
        variance_H, between_H = (
            each_HN.square().sum(-1) / query.n_counted for each_HN in (centred_HN, between_HN)
        )
        return [variance_H, *covariance_XH[:4], between_H, *covariance_XH[4:]]

    def _of_pairs(self, query: Query, group: int) -> None:
        """The chosen pairs that meet at this query."""
        latent_K, latent_E = query.latent_K, query.latent_E
        key_EK = latent_K * self.usage.view.n_latents + latent_E[:, None]
        place_X, there_X = places(self.key_P, key_EK.flatten())
        hit_X = there_X.nonzero().squeeze(-1)
        if not len(hit_X):
            return
        e_X, k_X = hit_X // len(latent_K), hit_X % len(latent_K)
        at_Y, inside_X = torch.unique(place_X[hit_X], return_inverse=True)
        brought_XH = query.pairs_EHK()[e_X, :, k_X].double()
        of_key_X = query.key_E[e_X]
        mean_YH = _added(brought_XH, inside_X, len(at_Y)) / query.n_counted
        lifted_XH = brought_XH - mean_YH[inside_X]
        flow_XH = brought_XH * query.centred_HN[:, of_key_X].T / query.n_counted
        shared_YH = _added(flow_XH, inside_X, len(at_Y))
        attention_XH = query.weights_HN[:, of_key_X].T.double()
        summed = [
            _added(x, inside_X, len(at_Y)) for x in (lifted_XH.abs(), lifted_XH, attention_XH)
        ]
        self.pair_PGHM[at_Y, group] += torch.stack([*summed, shared_YH, shared_YH.abs()], -1)
        self.met_PG[at_Y, group] += torch.bincount(inside_X, minlength=len(at_Y))
        distance_X = (query.row - query.keys.start - of_key_X).double()
        self.distance_P[at_Y] += torch.bincount(inside_X, weights=distance_X, minlength=len(at_Y))

    def sums(self) -> HeadSums:
        """What was taken in."""
        return HeadSums(
            usage=self.usage,
            queries_G=self.queries_G,
            keys_G=self.keys_G,
            total_MHG=self.total_MHG,
            key_P=self.key_P,
            wanted_PH=self.wanted_PH,
            met_PG=self.met_PG,
            distance_P=self.distance_P,
            pair_PGHM=self.pair_PGHM,
        )


def _added(x_XH: Tensor, place_X: Tensor, n: int) -> Tensor:
    """Σ of rows by their place."""
    return x_XH.new_zeros(n, x_XH.shape[1]).index_add_(0, place_X, x_XH)


def _dominated(query: Query) -> list[Tensor]:
    """What is left to the keys that count when one latent of the query is kept, and when none."""
    score_HN = query.scores_HN[:, query.counted_N]
    none_HN = torch.zeros_like(score_HN)
    alone_HKN = query.alone_HKN()[..., query.counted_N]
    if not len(query.latent_K):
        alone_HKN = none_HN[:, None]
    bound_HK = variation_bound(score_HN[:, None] - alone_HKN)
    bound_H, best_H = bound_HK.min(1)
    kept_HN = alone_HKN[torch.arange(len(best_H), device=best_H.device), best_H]
    of_kept_H, of_none_H = variation(score_HN, kept_HN), variation(score_HN, none_HN)
    return [bound_H, of_kept_H, variation_bound(score_HN), of_none_H]


@torch.no_grad()
def head_sums(
    blocks: Iterable[Mapping[str, Tokens]], usages: Mapping[str, Usage], plan: AttentionPlan
) -> dict[str, HeadSums]:
    """The second pass over all blocks, with the queries of the first."""
    sites = {site: _Site(usage, plan) for site, usage in usages.items()}
    for block in blocks:
        for site, tokens in block.items():
            sites[site].add(tokens)
    return {site: each.sums() for site, each in sites.items()}

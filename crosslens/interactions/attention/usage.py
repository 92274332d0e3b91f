"""First pass: means, how much each latent is used by each head, and which pairs may matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from crosslens.errors import CrosslensError
from crosslens.interactions.attention.plan import AttentionPlan
from crosslens.interactions.attention.query import Query, drawn
from crosslens.interactions.attention.tokens import Tokens
from crosslens.interactions.attention.view import HeadsView
from crosslens.interactions.sums import Gathering, Sums, fresh, summed


@dataclass(frozen=True, kw_only=True, eq=False)
class Usage:
    """What the first pass knows of one site: over tokens that count, or over drawn queries and
    their keys that count."""

    view: HeadsView
    tokens: int
    queries: int
    mean_D: Float64[Tensor, " d"]
    """Of rows as the heads' matrices take them."""
    entries_L: Int64[Tensor, " l"]
    """On how many tokens each latent is active."""
    weight_L: Float64[Tensor, " l"]
    """Σ of its weight (strength times the norm's scalar) over them."""
    turn_2F: Float64[Tensor, "2 f"]
    """Mean cosine and sine of the turn from keys to queries."""
    whole_H: Float64[Tensor, " h"]
    """Σ over queries and pairs of latents of |flow|: see `Flow`."""
    query_HL: Float64[Tensor, "h l"]
    """The same by the query's latent."""
    key_HL: Float64[Tensor, "h l"]
    """The same by the keys' latent."""
    carried_HL: Float64[Tensor, "h l"]
    """Mean over queries of what each head collects of a latent: Σ_u attention · weight."""
    sums: Sums | None
    """|flow| by (head · L + query latent) · L + key latent, for pairs that were high at some query;
    None where no latents ever met."""

    @property
    def typical_L(self) -> Tensor:
        """Mean weight of each latent where it is active, 0 if it never is, float32."""
        return (self.weight_L / self.entries_L.clamp_min(1)).float()

    @property
    def mean_query_HA(self) -> Tensor:
        """The mean query of each head, not turned."""
        branch = self.view.query
        mean_N = self.mean_D.to(branch.through_DN) @ branch.through_DN + branch.fixed_N
        return mean_N.view(self.view.heads.n_heads, -1)

    @property
    def mean_key_JA(self) -> Tensor:
        """The mean key of each group, not turned."""
        branch = self.view.key
        mean_N = self.mean_D.to(branch.through_DN) @ branch.through_DN + branch.fixed_N
        return mean_N.view(self.view.heads.n_groups, -1)

    def candidates(self, n: int) -> tuple[Int64[Tensor, " p"], Bool[Tensor, "p h"]]:
        """The n pairs of each head with the highest sums, as i · L + j, ascending, each once; and
        of which heads they are."""
        n_latents, n_heads = self.view.n_latents, self.view.heads.n_heads
        if self.sums is None:
            nothing_P = self.entries_L.new_zeros(0)
            return nothing_P, nothing_P.bool()[:, None].expand(0, n_heads)
        head_U = self.sums.key_U // n_latents**2
        parts = []
        for head in range(n_heads):
            mine_U = (head_U == head).nonzero().squeeze(-1)
            order = self.sums.total_UM[mine_U, 0].argsort(descending=True, stable=True)[:n]
            parts.append(self.sums.key_U[mine_U[order]])
        key_C = torch.cat(parts)
        key_P, place_C = torch.unique(key_C % n_latents**2, return_inverse=True)
        wanted_PH = torch.zeros(len(key_P), n_heads, dtype=torch.bool, device=key_P.device)
        wanted_PH[place_C, key_C // n_latents**2] = True
        return key_P, wanted_PH


@dataclass(frozen=True, eq=False)
class Flow:
    """How much of a query's variance of scores each pair of latents accounts for:
    (1/n) Σ_u c_ij(t, u) · centred score(t, u), over the n keys that count [U, H, K]. Summed over
    all pairs, those with biases and error too, that is the variance."""

    latent_U: Tensor
    flow_UHK: Tensor


def flow_of(query: Query) -> Flow:
    """The flow of one query."""
    centred_EH = query.centred_HN[:, query.key_E].T / query.n_counted
    each_EHK = query.pairs_EHK() * centred_EH[:, :, None]
    latent_U, place_E = torch.unique(query.latent_E, return_inverse=True)
    flow_UHK = each_EHK.new_zeros(len(latent_U), *each_EHK.shape[1:])
    return Flow(latent_U, flow_UHK.index_add_(0, place_E, each_EHK))


class _Site:
    """The sums of one site as they grow."""

    def __init__(self, view: HeadsView, plan: AttentionPlan) -> None:
        self.view, self.plan = view, plan
        n_latents, n_heads = view.n_latents, view.heads.n_heads
        like = torch.zeros(0, dtype=torch.float64, device=view.bias_D.device)
        self.mean_D = like.new_zeros(len(view.bias_D))
        self.weight_L = like.new_zeros(n_latents)
        self.entries_L = torch.zeros_like(self.weight_L, dtype=torch.int64)
        self.turn_2F = like.new_zeros(2, len(view.heads.turn_F))
        self.whole_H = like.new_zeros(n_heads)
        self.by_latent_3HL = like.new_zeros(3, n_heads, n_latents)
        self.tokens = self.queries = self.keys = 0
        self.gathering = Gathering(plan.most_keys)
        self.met = False

    def add(self, tokens: Tokens) -> None:
        """Take in a block."""
        counted_RD = tokens.row_RD[tokens.counted_R]
        self.tokens += len(counted_RD)
        self.mean_D += counted_RD.sum(0, dtype=torch.float64)
        latent_E, n_latents = tokens.lists.index_N.long(), self.view.n_latents
        self.entries_L += torch.bincount(latent_E, minlength=n_latents)
        self.weight_L += summed(latent_E, tokens.weight_E, n_latents)
        parts = [self._add(query) for query in drawn(tokens, self.plan.queries, self.plan.seed)]
        parts = [part for part in parts if part is not None]
        if parts:
            key_C, size_C = (torch.cat(each) for each in zip(*parts, strict=True))
            key_U, place_C, count_U = torch.unique(key_C, return_inverse=True, return_counts=True)
            total_U = summed(place_C, size_C, len(key_U))
            self.gathering.add(fresh(key_U, count_U, total_U[:, None]))
            self.met = True

    def _add(self, query: Query) -> tuple[Tensor, Tensor] | None:
        """Take in a query; gives the keys of its strongest pairs, and their sizes."""
        self.queries += 1
        self.keys += query.n_counted
        distance_N = (query.row - torch.arange(query.keys.start, query.keys.stop)).to(
            query.counted_N.device
        )
        turn = self.view.heads.rotation(distance_N[query.counted_N])
        self.turn_2F += torch.stack(turn).sum(1, dtype=torch.float64)
        carried_HE = query.weights_HN[:, query.key_E] * query.tokens.weight_E[query.entries]
        self.by_latent_3HL[2].index_add_(1, query.latent_E, carried_HE.double())
        if not len(query.latent_K):
            return None
        flow = flow_of(query)
        size_UHK = flow.flow_UHK.abs().double()
        self.whole_H += size_UHK.sum((0, 2))
        self.by_latent_3HL[0].index_add_(1, query.latent_K, size_UHK.sum(0))
        self.by_latent_3HL[1].index_add_(1, flow.latent_U, size_UHK.sum(2).T)
        return self._strongest(query, flow.latent_U, size_UHK)

    def _strongest(self, query: Query, latent_U: Tensor, size_UHK: Tensor) -> tuple[Tensor, Tensor]:
        n_own, n_latents = len(query.latent_K), self.view.n_latents
        flat_HX = size_UHK.transpose(0, 1).flatten(1)
        size_HC, place_HC = flat_HX.topk(min(self.plan.contenders, flat_HX.shape[1]), dim=1)
        head_H1 = torch.arange(len(flat_HX), device=flat_HX.device)[:, None]
        i_HC, j_HC = query.latent_K[place_HC % n_own], latent_U[place_HC // n_own]
        return ((head_H1 * n_latents + i_HC) * n_latents + j_HC).flatten(), size_HC.flatten()

    def usage(self) -> Usage:
        """What was taken in."""
        query_HL, key_HL, carried_HL = self.by_latent_3HL
        return Usage(
            view=self.view,
            tokens=self.tokens,
            queries=self.queries,
            mean_D=self.mean_D / self.tokens,
            entries_L=self.entries_L,
            weight_L=self.weight_L,
            turn_2F=self.turn_2F / max(1, self.keys),
            whole_H=self.whole_H,
            query_HL=query_HL,
            key_HL=key_HL,
            carried_HL=carried_HL / max(1, self.queries),
            sums=self.gathering.sums() if self.met else None,
        )


@torch.no_grad()
def usage_of(
    blocks: Iterable[Mapping[str, Tokens]], views: Mapping[str, HeadsView], plan: AttentionPlan
) -> dict[str, Usage]:
    """The first pass over all blocks.

    Memory: three numbers per head and latent, `plan.most_keys` keys of 24 bytes about three times
    over, and a block.

    Raises:
        CrosslensError: no drawn query has two keys that count.
    """
    sites = {site: _Site(view, plan) for site, view in views.items()}
    for block in blocks:
        for site, tokens in block.items():
            sites[site].add(tokens)
    found = {site: each.usage() for site, each in sites.items()}
    if not any(usage.queries for usage in found.values()):
        raise CrosslensError(
            "No position that was drawn has another one before it that counts, so there is nothing "
            "to attend to. Use longer blocks, or a token policy that keeps more."
        )
    return found

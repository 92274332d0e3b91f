"""One query and the keys it weighs: each head's scores, taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.interactions.attention.tokens import Tokens
from crosslens.lm.attention import turned


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """The query at one row of a block. Keys N are the rows that it reaches; entries E are the
    latents of these keys, K the query's own."""

    tokens: Tokens
    row: int

    @cached_property
    def keys(self) -> slice:
        """The rows reached."""
        window = self.tokens.view.heads.window
        first = 0 if window is None else max(0, self.row + 1 - window)
        return slice(first, self.row + 1)

    @cached_property
    def entries(self) -> slice:
        """Of these rows."""
        starts_R = self.tokens.lists.starts_I
        return slice(int(starts_R[self.keys.start]), int(starts_R[self.keys.stop]))

    @cached_property
    def counted_N(self) -> Tensor:
        """Which keys count."""
        return self.tokens.counted_R[self.keys]

    @cached_property
    def n_counted(self) -> int:
        """How many."""
        return int(self.counted_N.sum())

    @cached_property
    def key_E(self) -> Tensor:
        """Which key each entry is of, by its place among N."""
        key_E: Tensor = self.tokens.lists.items_N[self.entries] - self.keys.start
        return key_E

    @cached_property
    def latent_E(self) -> Tensor:
        """Its latent."""
        return self.tokens.lists.index_N[self.entries].long()

    @cached_property
    def own(self) -> slice:
        """The query's own entries."""
        starts_R = self.tokens.lists.starts_I
        return slice(int(starts_R[self.row]), int(starts_R[self.row + 1]))

    @cached_property
    def latent_K(self) -> Tensor:
        """The query's own latents."""
        return self.tokens.lists.index_N[self.own].long()

    @cached_property
    def latents_KHA(self) -> Tensor:
        """What each brings to the query, turned."""
        weight_K = self.tokens.weight_E[self.own]
        return self._turned(self.tokens.view.query_LHA[self.latent_K] * weight_K[:, None, None])

    @cached_property
    def parts_3HA(self) -> Tensor:
        """The query, turned: what latents, biases and the error bring to it."""
        tokens, branch = self.tokens, self.tokens.view.query
        always_N = tokens.scalar_R[self.row] * branch.moving_N + branch.fixed_N
        whole_N = tokens.row_RD[self.row] @ branch.through_DN + branch.fixed_N
        known = torch.stack([always_N, whole_N]).view(2, tokens.view.heads.n_heads, -1)
        always_HA, whole_HA = self._turned(known)
        latents_HA = self.latents_KHA.sum(0)
        return torch.stack([latents_HA, always_HA, whole_HA - latents_HA - always_HA])

    @cached_property
    def scores_HN(self) -> Tensor:
        """The model's own scores before the softmax."""
        whole_HA = self.parts_3HA.sum(0)
        key_NJA = self.tokens.key_RJA[self.keys]
        return self.tokens.view.heads.scores(whole_HA[None], key_NJA)[:, 0]

    @cached_property
    def weights_HN(self) -> Tensor:
        """The softmax over all keys."""
        return self.scores_HN.softmax(-1)

    @cached_property
    def centred_HN(self) -> Tensor:
        """Scores less their mean over the keys that count; 0 at those that do not."""
        return self.centred(self.scores_HN)

    def centred(self, score_N: Float[Tensor, "*x n"]) -> Float[Tensor, "*x n"]:
        """Any part of the scores likewise."""
        kept_N = self.counted_N.to(score_N.dtype)
        mean = (score_N * kept_N).sum(-1, keepdim=True) / self.n_counted
        return (score_N - mean) * kept_N

    def pairs_EHK(self) -> Float[Tensor, "e h k"]:
        """What each latent of each key and each of the query's latents bring to a head's score:
        a_i a_j s_t s_u scale ⟨R(t − u) W_Q d_i, W_K d_j⟩."""
        heads = self.tokens.view.heads
        key_JEA = self.tokens.entry_keys_JEA[:, self.entries]
        n_latents, n_heads, width = self.latents_KHA.shape
        query = self.latents_KHA.reshape(n_latents, heads.n_groups, heads.share, width)
        query = query.permute(1, 3, 2, 0).reshape(heads.n_groups, width, -1)
        found = heads.scale * (key_JEA @ query)
        return found.transpose(0, 1).reshape(-1, n_heads, n_latents)

    def by_origin_33HN(self) -> Tensor:
        """Scores of latents, biases and the error of the query with those of each key."""
        heads, parts = self.tokens.view.heads, self.tokens.key_parts_3RJA
        found = [heads.scores(self.parts_3HA, part[self.keys]).transpose(0, 1) for part in parts]
        return torch.stack(found, 1)

    def by_content_22HN(
        self, query_HA: Float[Tensor, "h a"], turned_RJA: Float[Tensor, "r j a"]
    ) -> Float[Tensor, "2 2 h n"]:
        """Scores of a mean query, and what this one has beside it, with a mean key and what each
        key has beside that.

        Args:
            query_HA: the mean query, not turned.
            turned_RJA: the mean key, turned to every position of the block.
        """
        mean_HA = self._turned(query_HA[None])[0]
        query_2HA = torch.stack([mean_HA, self.parts_3HA.sum(0) - mean_HA])
        mean_NJA, whole_NJA = turned_RJA[self.keys], self.tokens.key_RJA[self.keys]
        heads = self.tokens.view.heads
        found = [heads.scores(query_2HA, key) for key in (mean_NJA, whole_NJA - mean_NJA)]
        return torch.stack([each.transpose(0, 1) for each in found], 1)

    def alone_HKN(self) -> Float[Tensor, "h k n"]:
        """Scores of each of the query's latents alone with the whole keys."""
        key_NJA = self.tokens.key_RJA[self.keys]
        return self.tokens.view.heads.scores(self.latents_KHA, key_NJA)

    def _turned(self, x_KHA: Tensor) -> Tensor:
        cos_RF, sin_RF = self.tokens.rotation
        return turned(x_KHA, cos_RF[self.row], sin_RF[self.row])


def drawn(tokens: Tokens, n: int, seed: int) -> list[Query]:
    """Up to n queries of a block, at positions that count, with at least two keys that do; drawn
    from the seed and the block's number alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + tokens.number)
    row_C = tokens.counted_R.nonzero().squeeze(-1).cpu()
    chosen = row_C[torch.randperm(len(row_C), generator=generator)[:n]].sort().values
    queries = [Query(tokens=tokens, row=int(row)) for row in chosen]
    return [query for query in queries if query.n_counted > 1]

"""How often and how strongly each latent is active, for each model, and on marked tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from crosslens.diffing.pair import Pair
from crosslens.diffing.stream import Coded


class ActivitySums:
    """Sums over the entries of the code, all tokens and marked ones apart.

    Args:
        marked_NT: the positions to tell apart, block by block, such as those of a chat template's
            own tokens (`Blocks.special_NT`).
    """

    def __init__(self, pair: Pair, marked_NT: Bool[Tensor, "n t"]) -> None:
        self.pair, self.marked_NT = pair, marked_NT
        n, device = pair.coder.wiring.n_latents, pair.coder.b_dec.device
        self.tokens_S = torch.zeros(2, dtype=torch.int64)
        """Tokens seen: unmarked, marked."""
        self.count_SL = torch.zeros(2, n, dtype=torch.int64, device=device)
        self.sum_SL = torch.zeros(2, n, dtype=torch.float64, device=device)
        self.largest_L = torch.zeros(n, device=device)

    def add(self, chunk: Coded) -> None:
        """The tokens of one chunk."""
        n, device = len(self.largest_L), self.largest_L.device
        marked_R = self.marked_NT[chunk.block_R, chunk.position_R].long()
        latent_E = chunk.latent_E
        cell_E = marked_R.to(device)[chunk.row_E] * n + latent_E
        self.tokens_S += torch.bincount(marked_R, minlength=2)
        self.count_SL += torch.bincount(cell_E, minlength=2 * n).view(2, n)
        self.sum_SL.view(-1).index_add_(0, cell_E, chunk.value_E.double())
        self.largest_L.scatter_reduce_(0, latent_E, chunk.value_E, "amax")


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Of each latent, over the tokens that count."""

    tokens: int
    marked_tokens: int
    """How many of them are marked; a latent that does not care has this share of its activity
    there."""
    count_L: Int64[Tensor, " l"]
    """Tokens on which it is active."""
    mean_L: Float64[Tensor, " l"]
    """Mean f where it is active; NaN for a latent that never is."""
    largest_L: Float64[Tensor, " l"]
    strength_a_L: Float64[Tensor, " l"]
    """Mean f·‖d_a‖ where it is active: what it adds to a row of `a`, scaled (a row has √width)."""
    strength_b_L: Float64[Tensor, " l"]
    marked_count_L: Int64[Tensor, " l"]
    """Marked tokens on which it is active."""
    marked_sum_share_L: Float64[Tensor, " l"]
    """Share of Σ f that falls on marked tokens; NaN for a latent that never is active."""

    @property
    def density_L(self) -> Tensor:
        """Share of tokens on which a latent is active."""
        return self.count_L.double() / self.tokens

    @property
    def marked_share_L(self) -> Tensor:
        """Share of a latent's active tokens that are marked; NaN where there are none."""
        return self.marked_count_L.double() / self.count_L


def activity(sums: ActivitySums) -> Activity:
    """What the sums amount to."""
    count_SL, sum_SL = sums.count_SL.cpu(), sums.sum_SL.cpu()
    count_L, sum_L = count_SL.sum(0), sum_SL.sum(0)
    norm_a_L, norm_b_L = (
        torch.linalg.vector_norm(d_LX, dim=-1, dtype=torch.float64).cpu()
        for d_LX in sums.pair.decoders()
    )
    mean_L = sum_L / count_L
    return Activity(
        tokens=int(sums.tokens_S.sum()),
        marked_tokens=int(sums.tokens_S[1]),
        count_L=count_L,
        mean_L=mean_L,
        largest_L=sums.largest_L.double().cpu(),
        strength_a_L=mean_L * norm_a_L,
        strength_b_L=mean_L * norm_b_L,
        marked_count_L=count_SL[1],
        marked_sum_share_L=sum_SL[1] / sum_L,
    )

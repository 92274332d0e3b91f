"""Whether the two models' halves of an encoder see the same thing when a latent is active."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from crosslens import kernels
from crosslens.diffing.norms import cosines_of_rows
from crosslens.diffing.pair import Pair
from crosslens.diffing.stream import Coded

FEWEST = 3
"""Two points always lie on a line."""


class AgreementSums:
    """Sums over the entries of the code of either model's part of the pre-activation, c_m =
    ⟨W_enc^m, x^m⟩, their squares and their product.

    Raises:
        UsageError: the coder reads other sites than it writes.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.encoder_a_LX, self.encoder_b_LY = (E.contiguous() for E in pair.encoders())
        n, device = len(self.encoder_a_LX), self.encoder_a_LX.device
        self.count_L = torch.zeros(n, dtype=torch.int64, device=device)
        self.sums_SL = torch.zeros(5, n, dtype=torch.float64, device=device)
        """Σ c_a, Σ c_b, Σ c_a², Σ c_b², Σ c_a c_b."""

    def add(self, chunk: Coded) -> None:
        """The tokens of one chunk."""
        latent_E = chunk.latent_E
        x_RY = chunk.target_RY - _centre(self.pair)
        a_E, b_E = (
            kernels.products(chunk.lists, x_RY[:, columns], encoder_LX).double()
            for columns, encoder_LX in (
                (self.pair.columns_a, self.encoder_a_LX),
                (self.pair.columns_b, self.encoder_b_LY),
            )
        )
        self.count_L += torch.bincount(latent_E, minlength=len(self.count_L))
        for sum_L, term_E in zip(
            self.sums_SL, (a_E, b_E, a_E.square(), b_E.square(), a_E * b_E), strict=True
        ):
            sum_L.index_add_(0, latent_E, term_E)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of each latent, over the tokens on which it is active."""

    count_L: Int64[Tensor, " l"]
    correlation_L: Float64[Tensor, " l"]
    """Correlation of c_a and c_b; NaN on fewer than three tokens, or where one does not vary.
    Being active asks for a large sum c_a + c_b, which by itself pushes this towards −1: compare
    latents with each other, not with 0."""
    share_b_L: Float64[Tensor, " l"]
    """Mean c_b / (mean c_a + mean c_b): how much of what makes it active is seen in `b`. Below 0
    or above 1 where one model speaks against it."""
    cosine_L: Float64[Tensor, " l"]
    """cos of the encoders in `a` and in `b`; NaN where the widths differ."""


def agreement(sums: AgreementSums) -> Agreement:
    """What the sums amount to."""
    count_L = sums.count_L.cpu()
    a_L, b_L, aa_L, bb_L, ab_L = sums.sums_SL.cpu() / count_L
    variances_L = (aa_L - a_L.square()).clamp_min(0) * (bb_L - b_L.square()).clamp_min(0)
    correlation_L = (ab_L - a_L * b_L) / variances_L.sqrt()
    known_L = (count_L >= FEWEST) & (variances_L > 0)
    cosine_L = cosines_of_rows(sums.encoder_a_LX, sums.encoder_b_LY)
    return Agreement(
        count_L=count_L,
        correlation_L=correlation_L.clamp(-1, 1).where(known_L, torch.nan),
        share_b_L=b_L / (a_L + b_L),
        cosine_L=cosine_L if sums.pair.same_width else torch.full_like(cosine_L, torch.nan),
    )


def _centre(pair: Pair) -> Tensor:
    """What the coder takes off a scaled row before it encodes it: [Y], or a plain 0."""
    coder = pair.coder
    if not coder.center:
        return coder.b_dec.new_zeros(())
    bias_Y = coder.b_dec.detach()
    return bias_Y * coder.wiring.write.spread(coder.scale_write) if coder.folded else bias_Y

"""One layer of the recursion: from the error at a site to the error at the next.

With x′ = x + f(x), decoded x̂ = b + Σ a_i d_i and x̂′ = b′ + Σ a_i d′_i, and any surrogate
c + Σ g_i(a_i) of f(x̂),

    x′ − x̂′ = (x − x̂) + (f(x) − f(x̂))           propagation
             + (f(x̂) − c − Σ g_i(a_i))           interaction
             + (x̂ + c + Σ g_i(a_i) − x̂′)         transition of single features
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.proofs.rounding import (
    Ball,
    ball_norm_up,
    dot_up,
    exact,
    exact_sum,
    matmul,
    norm_up,
    subtract,
    up,
)


def base_up(parts: tuple[Tensor, Tensor], decoded: Float[Tensor, "*s D"]) -> Float[Tensor, "*s"]:
    """At least ‖p + q − x̂‖, the base case: an embedding is the sum of a token's and a place's part.

    Proof. TwoSum gives s + e = p + q exactly; ‖s − x̂ + e‖ is bounded with |fl(s − x̂) − (s − x̂)|
    ≤ u |s − x̂|. Exactly 0 where x̂ is the sum and the sum is a float.
    """
    total, lost = exact_sum(parts[0].double(), parts[1].double())
    off = subtract(exact(total), exact(decoded))
    size = Ball(off.mid, up(off.rad + lost.abs())).size
    return norm_up(torch.where((off.mid == 0) & (lost == 0), 0.0, size))


@dataclass(frozen=True)
class Step:
    """What one layer adds to the error, each at least the norm of its term."""

    before: Tensor
    propagation: Tensor
    interaction: Tensor
    transition: Tensor

    @property
    def after(self) -> Tensor:
        """At least ‖x′ − x̂′‖: the triangle inequality on the identity above."""
        return up(up(self.before + self.propagation) + up(self.interaction + self.transition))


def transition_table(
    dec_FD: Float[Tensor, "F D"],
    next_FD: Float[Tensor, "F D"],
    W_in_DN: Float[Tensor, "D N"],
    W_out_ND: Float[Tensor, "N D"],
) -> Float[Tensor, F]:
    """At least ‖d_i + W_outᵀ relu(W_inᵀ d_i) − d′_i‖ for every feature: F passes, once.

    relu of a ball is a ball: it is 1-Lipschitz.
    """
    pre = matmul(exact(dec_FD), exact(W_in_DN))
    hidden = Ball(pre.mid.clamp_min(0), pre.rad)
    written = matmul(hidden, exact(W_out_ND))
    moved = subtract(exact(dec_FD), exact(next_FD))
    total = subtract(moved, Ball(-written.mid, written.rad))
    return ball_norm_up(total)


def transition_up(
    strength_K: Float[Tensor, "*s K"], table_K: Float[Tensor, "*s K"], bias: Float[Tensor, ""]
) -> Float[Tensor, "*s"]:
    """At least the transition term: ‖bias terms‖ + Σ a_i t_i.

    Proof. relu(a z) = a relu(z) for a ≥ 0, so that with g_i(a) = W_outᵀ relu(a W_inᵀ d_i) each
    feature's term is a_i times what `transition_table` bounds; then the triangle inequality.
    Strengths must not be negative.
    """
    if bool((strength_K < 0).any()):
        return torch.full_like(strength_K[..., 0], float("inf"))
    return up(bias + dot_up(strength_K, table_K))

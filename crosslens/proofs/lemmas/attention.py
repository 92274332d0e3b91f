"""Softmax attention whose scores and values are known up to a radius."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from crosslens.proofs.rounding import (
    Ball,
    dot_up,
    exact,
    matmul,
    norm_up,
    product_up,
    tanh_up,
    up,
)


def variation_up(oscillation: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """At least the total variation between softmax(s) and softmax(s + δ), where
    max δ − min δ ≤ oscillation: tanh(oscillation / 4).

    Proof. Let q = p e^δ / Z and A the keys with q > p. TV = q(A) − p(A), and the odds of A change
    by a factor of at most e^osc. With r = p(A) and t = e^osc, q(A) ≤ t r / (1 + (t − 1) r), and
    q − r is largest at r = 1/(1 + √t), where it is (√t − 1)/(√t + 1) = tanh(osc/4).
    """
    return tanh_up(up(oscillation / 4))


def score_moves(
    query: Float[Tensor, "*q D"],
    key: Float[Tensor, "n D"],
    W_Q_DH: Float[Tensor, "D h"],
    W_K_DH: Float[Tensor, "D h"],
    eps: tuple[Tensor, Tensor],
) -> Float[Tensor, "*q n"]:
    """At least |s − ŝ| for s = ⟨W_Qᵀ x, W_Kᵀ z⟩, ‖x − query‖ ≤ eps[0] [q], ‖z − key‖ ≤ eps[1] [n].

    Proof. s is bilinear: s − ŝ = ⟨e, M z⟩ + ⟨x, M f⟩ + ⟨e, M f⟩ with M = W_Q W_Kᵀ; then
    Cauchy–Schwarz, and ‖M‖₂ ≤ ‖W_Q‖_F ‖W_K‖_F.
    """
    q, k = exact(W_Q_DH), exact(W_K_DH)
    keys = matmul(matmul(exact(key), k), Ball(q.mid.T, q.rad.T))
    queries = matmul(matmul(exact(query), q), Ball(k.mid.T, k.rad.T))
    both = product_up(norm_up(q.mid.flatten()), norm_up(k.mid.flatten()))
    first = product_up(eps[0][..., None], norm_up(keys.size))
    second = product_up(eps[1], norm_up(queries.size)[..., None])
    third = product_up(product_up(eps[0][..., None], eps[1]), both)
    return up(up(first + second) + third)


def attention_moves(
    values_ND: Float[Tensor, "n D"], oscillation: Float[Tensor, ""], value_moves: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """At least ‖Σ A_n v_n − Σ Â_n v̂_n‖, given the decoded values v̂, the oscillation of the scores'
    error, and ‖v_n − v̂_n‖ ≤ value_moves: TV · diam{v̂} + value_moves.

    Proof. Σ A (v − v̂) is an average of errors. Σ (A − Â) v̂ moves mass TV between keys, and each
    unit of it moves the output by at most the diameter.
    """
    apart = (values_ND[:, None] - values_ND[None]).abs()
    diameter = norm_up(up(apart)).max()
    return up(product_up(variation_up(oscillation), diameter) + value_moves)


def causal_moves(
    eps: tuple[Tensor, Tensor],
    sizes: tuple[Tensor, Tensor, Tensor],
    maps: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Float[Tensor, " U"]:
    """At least ‖Σ_h W_Oᵀ (Σ_j A_hj v_hj − Σ_j Â_hj v̂_hj)‖ for queries u over their T keys.

    Args:
        eps: what the queries' [U] and the keys' inputs [U, T] are off by; 0 for keys that u does
            not see.
        sizes: at least the norms of decoded queries [U, H], keys and values [U, T, H].
        maps: at least the norms of each head's W_Q, W_K, W_V, W_O [H].

    Proof. As in `score_moves`, scores move by ε_q‖W_Q‖‖k̂‖ + ε_k‖W_K‖‖q̂‖ + ε_q ε_k‖W_Q‖‖W_K‖, their
    oscillation by twice the largest of those; `attention_moves` with a diameter of at most twice
    the largest ‖v̂‖, and values that move by ‖W_V‖ ε_k; then the triangle inequality over heads.
    """
    (eps_U, eps_UT), (query_UH, key_UTH, value_UTH) = eps, sizes
    W_Q, W_K, W_V, W_O = maps
    each, own = eps_UT[..., None], eps_U[:, None, None]
    first = product_up(own, product_up(W_Q, key_UTH))
    second = product_up(each, product_up(W_K, query_UH)[:, None])
    third = product_up(product_up(own, each), product_up(W_Q, W_K))
    moves = up(up(first + second) + third).amax(1)
    mass = product_up(variation_up(up(2 * moves)), 2 * value_UTH.amax(1))
    heads = up(mass + product_up(W_V, eps_UT.amax(1)[:, None]))
    return dot_up(heads, W_O.expand_as(heads))

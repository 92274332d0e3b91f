"""A small causal language model run in float64, with a bound on what rounding does to it.

The model, for layers l, tokens t_0 … t_n, floor a small constant:

    x = W_E[t],  R(x) = x / √(mean x² + floor)
    A_h = softmax_j(⟨W_Qᵀ R(x), W_Kᵀ R(x_j)⟩_h + b_h,n−j)
    x ← x + concat_h(Σ_j A_hj W_Vᵀ R(x_j)) W_O
    x ← x + relu(R(x) W_in) W_out
    logits = R(x) W_U

over j ≤ n: heads share out the width evenly, places enter by the distance n − j only.
Every computed row is within `eps` of the real one (Euclidean norm); one eps for all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslens.proofs.lemmas.attention import variation_up
from crosslens.proofs.lemmas.contexts import Contexts
from crosslens.proofs.lemmas.normalisation import rms_moves
from crosslens.proofs.rounding import SLACK, TINY, UNIT, gamma, norm_up, product_up, up

FLOOR = 2.0**-17
"""What the norm adds to the mean square."""


@dataclass(frozen=True)
class Rows:
    """Computed rows [n, D], each within `eps` of the real one."""

    value: Tensor
    eps: Tensor

    @property
    def largest(self) -> Tensor:
        """At least the norm of every real row."""
        return up(norm_up(self.value).max() + self.eps)

    def at(self, index: Tensor) -> Rows:
        return Rows(self.value[index], self.eps)


@dataclass(frozen=True)
class Stream:
    """The residual stream of every node: at the embedding, and in each layer after attention and
    after the MLP."""

    embed: Rows
    mid: tuple[Rows, ...]
    post: tuple[Rows, ...]

    @property
    def sites(self) -> tuple[Rows, ...]:
        """In the order of the model."""
        layers = zip(self.mid, self.post, strict=True)
        return (self.embed, *(site for pair in layers for site in pair))


def exactly(value: Tensor) -> Rows:
    """Rows that are what they are."""
    return Rows(value.double(), torch.zeros((), dtype=torch.float64))


def normalised(x: Rows) -> Rows:
    """R(x). Proof: `rms_moves` for what x is off by; the mean square, its root and the quotient
    each err relatively, together by less than 2 γ_{D+16} of a row of norm below √D."""
    width = x.value.shape[-1]
    scale = ((x.value * x.value).mean(-1, keepdim=True) + FLOOR).sqrt()
    moved = rms_moves(x.value, x.eps.expand(len(x.value)), floor=FLOOR).max()
    return Rows(x.value / scale, up(moved + math.sqrt(width) * 2 * gamma(width + 16)))


def linear(x: Rows, W: Float[Tensor, "n m"]) -> Rows:
    """x W. Proof: ‖e W‖ ≤ ‖e‖ ‖W‖_F, and the product errs by γ_n |x| |W| (Higham 3.5), whose norm
    is at most γ_n ‖x‖ ‖W‖_F."""
    W = W.double()
    own = up(norm_up(x.value).max() * gamma(W.shape[0]))
    grown = product_up(norm_up(W.flatten()), up(x.eps + own))
    return Rows(x.value @ W, up(grown + 4 * W.numel() * TINY))


def added(a: Rows, b: Rows) -> Rows:
    """a + b."""
    value = a.value + b.value
    return Rows(value, up(up(a.eps + b.eps) + up(norm_up(value).max() * UNIT)))


def attended(
    query: Rows,
    key: Rows,
    value: Rows,
    index_UT: Int[Tensor, "U T"],
    age_UT: Int[Tensor, "U T"],
    bias_HT: Float[Tensor, "H T"],
) -> Rows:
    """Σ_j A_hj v_j for every head, heads side by side: query u attends to rows `index_UT` of key
    and value where `age_UT` ≥ 0.

    Proof. With |s − s̃| ≤ σ for all scores, A moves by a total variation of at most tanh(2σ/4), and
    an average of rows of norm ≤ v by twice that times v. The computed softmax of s̃ errs by at most
    ρ in Σ |A|: its exponents by |s| roundings, the functions, sum and quotient relatively. The
    average itself errs by γ_T v. H heads: √H times the largest.
    """
    U, T = index_UT.shape
    heads = len(bias_HT)
    q = query.value.reshape(U, heads, -1)
    k = key.value[index_UT].reshape(U, T, heads, -1)
    v = value.value[index_UT].reshape(U, T, heads, -1)
    bias = bias_HT.double()[:, age_UT.clamp_min(0)].transpose(0, 1)
    scores = torch.einsum("uhd,uthd->uht", q, k) + bias
    scores = scores.masked_fill((age_UT < 0)[:, None], -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    mixed = torch.einsum("uht,uthd->uhd", weights, v).reshape(U, -1)
    size = up(product_up(query.largest, key.largest) + bias_HT.double().abs().max())
    sigma = up(
        product_up(query.eps, key.largest)
        + product_up(query.largest, key.eps)
        + size * gamma(q.shape[-1] + 8)
    )
    rho = up((T + 16 + 4 * size) * (2 * SLACK))
    moved = up(2 * variation_up(up(2 * sigma)) + rho + 2 * gamma(T + 4))
    each = up(product_up(moved * (1 + SLACK), value.largest) + value.eps)
    return Rows(mixed, up(up(each * (math.sqrt(heads) * (1 + SLACK))) + T * TINY))


def mlp(x: Rows, W_in: Float[Tensor, "D N"], W_out: Float[Tensor, "N D"]) -> Rows:
    """relu(x W_in) W_out; relu is 1-Lipschitz."""
    pre = linear(x, W_in)
    return linear(Rows(pre.value.clamp_min(0), pre.eps), W_out)


def run(weights: Mapping[str, Tensor], tree: Contexts) -> Stream:
    """The model on every node. In front of the first attention only the token counts, so that
    queries, keys and values are worked out once for each token."""
    embed = exactly(weights["W_E"].double()[tree.tokens_X])
    x, mids, posts = embed.at(tree.token_U), [], []
    for layer in range(len(weights["W_Q"])):
        w = {name: tensor[layer] for name, tensor in weights.items() if name not in ("W_E", "W_U")}
        rows = x if layer else embed
        own = torch.arange(len(tree.token_U)) if layer else tree.token_U
        n = normalised(rows)
        query, key, value = (linear(n, w[name]) for name in ("W_Q", "W_K", "W_V"))
        mixed = attended(query.at(own), key, value, own[tree.path_UT], tree.age_UT, w["bias"])
        mids.append(added(x, linear(mixed, w["W_O"])))
        posts.append(added(mids[-1], mlp(normalised(mids[-1]), w["W_in"], w["W_out"])))
        x = posts[-1]
    return Stream(embed.at(tree.token_U), tuple(mids), tuple(posts))

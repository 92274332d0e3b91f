"""How many of all V^K sequences a one-head, attention-only transformer gets right at least.

The model, on tokens t_1 … t_K with x_j = W_E[t_j] + W_P[j], answers at the last place:

    z = (x_K + Σ_j A_j W_Oᵀ W_Vᵀ x_j)ᵀ W_U,     A = softmax_j ⟨W_Qᵀ x_K, W_Kᵀ x_j⟩,

and is right where z is largest at the largest token, and only there.

Theorem. Let q be the last token, m the largest. For v ≠ m put

    g_j(t) = D[q, m] − D[q, v] + O[j, t, m] − O[j, t, v],    w_j(t) = e^{S[q, j, t]} g_j(t),

D the direct path's logits, O those of one feature (token, place) through W_V W_O W_U, S its score.
Then z_m − z_v = Σ_j w_j(t_j) / Σ_j e^{S[q, j, t_j]}, so the sequence is right iff Σ_j w_j(t_j) > 0
for every v ≠ m: a sum with one term for each place. So if m stands exactly at the places M (which
may include the last) and other tokens are at most r < m, the least value of the sum is
Σ_{j∈M} w_j(m) + Σ_{j∉M} min_{t≤r} w_j(t) (the last place's t is q): where that is positive for
all v, all (r + 1)^{free places} such sequences are right. Larger r only lowers it, so the
largest r that holds counts them all.

The tables hold decoded features x̂ = decoder[j, t] in place of x; radii make up for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.proofs.lemmas.attention import score_moves
from crosslens.proofs.lemmas.residual import base_up
from crosslens.proofs.rounding import (
    SLACK,
    TINY,
    Ball,
    ball_norm_up,
    down,
    exact,
    exp_down,
    exp_up,
    matmul,
    product_up,
    up,
)


@dataclass(frozen=True)
class Tables:
    """What single features and pairs of them do, as balls."""

    score_QKT: Ball
    """S, of query token Q on token T at place K."""
    direct_QV: Ball
    written_KTV: Ball
    base: Tensor
    """At least max ‖x − x̂‖ over the features."""


def tables(weights: Mapping[str, Tensor], decoder_KTD: Tensor) -> Tables:
    """Scores, direct logits and written logits of the decoder's features.

    A feature's error ε adds ε ‖M‖ for each linear map M it goes through, column by column
    (Cauchy–Schwarz), and to the scores what `score_moves` says.
    """
    places, tokens = decoder_KTD.shape[:2]
    eps = base_up((weights["W_E"], weights["W_P"][:, None]), decoder_KTD)
    flat, query = decoder_KTD.double().flatten(0, 1), decoder_KTD[-1].double()
    asked = matmul(exact(query), exact(weights["W_Q"]))
    keys = matmul(exact(flat), exact(weights["W_K"]))
    score = matmul(asked, Ball(keys.mid.T, keys.rad.T))
    moved = score_moves(query, flat, weights["W_Q"], weights["W_K"], (eps[-1], eps.flatten()))
    unembed = exact(weights["W_U"])
    direct = _grown(matmul(exact(query), unembed), eps[-1], ball_norm_up(unembed, 0))
    through = matmul(matmul(exact(weights["W_V"]), exact(weights["W_O"])), unembed)
    written = _grown(matmul(exact(flat), through), eps.flatten(), ball_norm_up(through, 0))
    return Tables(
        _shaped(Ball(score.mid, up(score.rad + moved)), tokens, places, tokens),
        direct,
        _shaped(written, places, tokens, direct.mid.shape[1]),
        eps.max(),
    )


def _grown(found: Ball, eps: Tensor, column: Tensor) -> Ball:
    return Ball(found.mid, up(found.rad + product_up(eps[:, None], column)))


def _shaped(ball: Ball, *shape: int) -> Ball:
    return Ball(ball.mid.reshape(shape), ball.rad.reshape(shape))


def certified_by_pairs(table: Tables, spare: float = 0.0) -> int:
    """Sequences proved right by the theorem, v by v: V^4 K steps.

    Here and below, sums must exceed `spare` times the size of their terms to count.
    """
    largest = range(table.direct_QV.mid.shape[1])
    return sum(_with_largest(table, m, spare, apart=True) for m in largest)


def certified_by_pessimum(table: Tables, spare: float = 0.0) -> int:
    """As `certified_by_pairs`, with each of D and O's worst v taken apart: V^3 K steps."""
    largest = range(table.direct_QV.mid.shape[1])
    return sum(_with_largest(table, m, spare, apart=False) for m in largest)


def _with_largest(table: Tables, m: int, spare: float, *, apart: bool) -> int:
    """Sequences whose largest token is m and that are proved right."""
    weight = _weights(table, m, apart=apart)
    least = weight[:, :-1, :m].cummin(2).values if m else weight[:, :-1, :0]
    placings = _placings(weight.shape[1] - 1)
    return sum(_counted(weight, least, m, at, spare) for at in placings)


def _placings(places: int) -> list[tuple[bool, ...]]:
    """For each place before the last, whether the largest token stands there."""
    return list(itertools.product((False, True), repeat=places))


def _weights(table: Tables, m: int, *, apart: bool) -> Tensor:
    """At most w_j(t) for q, t ≤ m: [q, K, t, v], over all v ≠ m or with one v, the worst.

    Exponentials are relative to the first place's m, so that none is large. Where g ≥ 0 the
    smaller exponential counts, where g < 0 the larger; both are moved outward by more than the
    product rounds.
    """
    score = Ball(table.score_QKT.mid[: m + 1, :, : m + 1], table.score_QKT.rad[: m + 1, :, : m + 1])
    centre = score.mid[:, :1, m:]
    low = exp_down(down(score.lower - centre)) * (1 - SLACK)
    high = exp_up(up(score.upper - centre)) * (1 + SLACK)
    direct = _gaps(table.direct_QV, m, apart)[: m + 1]
    written = _gaps(table.written_KTV, m, apart)[:, : m + 1]
    gap = down(direct[:, None, None] + written)
    return torch.minimum(low[..., None] * gap, high[..., None] * gap) - TINY


def _gaps(logits: Ball, m: int, apart: bool) -> Tensor:
    """At most z_m − z_v, for every v ≠ m or for the worst."""
    others = [v for v in range(logits.mid.shape[-1]) if v != m]
    least, most = logits.lower[..., m], logits.upper[..., others]
    if not apart:
        most = most.amax(-1, keepdim=True)
    return down(least[..., None] - most)


def _counted(weight: Tensor, least: Tensor, m: int, at: tuple[bool, ...], spare: float) -> int:
    """Sequences with m at the places `at` before the last and nowhere else there.

    `least` [q, place, r, v] is min_{t≤r} w. The last token is any q < m, or m itself; for `at`
    empty only m. Tokens elsewhere are at most r for r = 0 … m − 1. A sum of K terms errs by at most
    γ_K Σ |w|, and K max |w| is more than that sum.
    """
    places = len(at) + 1
    free = at.count(False)
    if free and not m:
        return 0
    queries = slice(0, m + 1) if any(at) else slice(m, m + 1)
    own, prefix = weight[queries], least[queries]
    index = torch.arange(m + 1)[queries]
    total = own[torch.arange(len(index)), -1, index][:, None]
    for place, largest in enumerate(at):
        total = total + (own[:, place, m:] if largest else prefix[:, place])
    slack = own.abs().amax((1, 2)) * (places * places * SLACK + places * spare)
    right = (total > slack[:, None]).all(-1)
    if not free:
        return int(right.sum())
    # How far right stays: the first r that fails ends it, and sums only fall with r.
    steps = right.cumprod(1).sum(1)
    return sum(int(count) ** free for count in steps)


def certified_by_box(table: Tables, spare: float = 0.0) -> int:
    """Sequences proved right if nothing is known of tokens but that they are tokens: V^K or 0.

    Every gap, for every largest token, at least γ: an average of keys keeps D's least plus O's
    least.
    """
    vocabulary = table.direct_QV.mid.shape[1]
    places = table.written_KTV.mid.shape[0]
    for m in range(vocabulary):
        direct = _gaps(table.direct_QV, m, apart=False)[: m + 1].min()
        written = _gaps(table.written_KTV, m, apart=False)[:, : m + 1].min()
        if not bool(down(direct + written) > spare * (direct.abs() + written.abs())):
            return 0
    return int(vocabulary**places)


def certified_by_codes(table: Tables, spare: float = 0.0) -> int:
    """Sequences proved right one by one, from the tables: V^K steps of V, exact but for radii."""
    tokens = table.direct_QV.mid.shape[0]
    return sum(_with_query(table, q, spare) for q in range(tokens))


def _with_query(table: Tables, q: int, spare: float) -> int:
    """Sequences proved right that end in q.

    y_v = Σ_j e^{S_j} (D_v + O_jv) has the order of z_v. Each of its terms is known up to its
    radius: e^{S} times the logits' radii, plus the exponentials' relative error times the logits;
    a sequence is right where y_m exceeds every other y_v by more than twice the sum of radii.
    """
    score = Ball(table.score_QKT.mid[q], table.score_QKT.rad[q])
    centre = score.mid.max()
    low, high = exp_down(down(score.lower - centre)), exp_up(up(score.upper - centre))
    logits = table.direct_QV.mid[q] + table.written_KTV.mid
    radius = up(table.direct_QV.rad[q].max() + table.written_KTV.rad.amax(-1))
    size = up(logits.abs().amax(-1) + radius) * (1 + 16 * SLACK)
    places = logits.shape[0]
    off = up(up(high - low) * size + high * (radius + size * (places * SLACK + spare)))
    terms, off = high[..., None] * logits, off * (1 + 64 * SLACK) + places * TINY
    return _scan(terms, off, q)


def _scan(terms: Tensor, off: Tensor, q: int) -> int:
    """Over all tokens before q: the first ones one by one, the last two in one block."""
    places, tokens, vocabulary = terms.shape
    free, ids = places - 1, torch.arange(tokens)
    block = min(2, free)
    found = 0
    for head in itertools.product(range(tokens), repeat=free - block):
        total = terms[-1, q] + sum((terms[j, t] for j, t in enumerate(head)), torch.zeros(()))
        slack = off[-1, q] + sum((off[j, t] for j, t in enumerate(head)), torch.zeros(()))
        largest = torch.tensor(max((q, *head)))
        for place in range(free - block, free):
            total = (total[..., None, :] + terms[place]).reshape(-1, vocabulary)
            slack = (slack[..., None] + off[place]).reshape(-1)
            largest = torch.maximum(largest[..., None], ids).reshape(-1)
        total = total.reshape(-1, vocabulary)
        at = largest.reshape(-1, 1)
        right = total.gather(1, at)[:, 0]
        others = total.scatter_(1, at, -torch.inf).amax(1)
        found += int((right - others > 2 * (1 + 64 * SLACK) * slack).sum())
    return found

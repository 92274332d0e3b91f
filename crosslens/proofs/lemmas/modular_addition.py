"""How often, and with what loss, a block of one ReLU layer adds modulo p, at worst.

The model, on tokens (a, b) with x = W_E[0, a] + W_E[1, b]:

    z = (x + W_outᵀ relu(W_inᵀ x + b_in))ᵀ W_U.

Theorem. Let A_i[t] = W_inᵀ decoder[i, t] and G = W_out W_U. For any factors L R (a hint) and every
point, with h = relu(A_0[a] + A_1[b] + b_in),

    |z_v − (D_0[a] + D_1[b] + hᵀ L R)_v| ≤ ‖h‖ α_v + β_v,

α_v bounding ‖(G − L R)_v‖ and the rounding of the products, β_v what the tables' radii and the
direct path add. Proof: Cauchy–Schwarz for h and the columns of G − L R; the ReLU is 1-Lipschitz, so
a pre-activation's radius ρ_n passes and is written by |G|. `margin_correct` and `loss_up` do the
rest. Without a hint L R is G itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.proofs.lemmas.boxes import Box, linear_box, relu_box, sum_box
from crosslens.proofs.lemmas.interaction import additive_up, pair_table, pairs_up, spread_up
from crosslens.proofs.lemmas.logits import loss_up, margin_correct
from crosslens.proofs.lemmas.residual import base_up
from crosslens.proofs.rounding import (
    TINY,
    Ball,
    ball_norm_up,
    down,
    exact,
    gamma,
    matmul,
    norm_up,
    product_up,
    subtract,
    sum_up,
    up,
)

CHUNK = 4096
"""Points taken at a time."""


@dataclass(frozen=True)
class Tables:
    """What single features do, as balls, and the map from neurons to logits."""

    pre_2TN: Ball
    direct_2TV: Ball
    read_NV: Ball
    """G."""
    bias_N: Tensor
    base: Tensor
    """At least max ‖x − x̂‖ over the features."""


@dataclass(frozen=True)
class Factors:
    """L R in place of G, and what that costs: |error_v| ≤ ‖h‖ slope_v + offset_v."""

    parts: tuple[Tensor, ...]
    slope_V: Tensor
    offset_V: Tensor


@dataclass(frozen=True)
class Points:
    """What is to be answered, and how: pairs [N, 2] and their answers [N]."""

    points: Tensor
    labels: Tensor
    spare: float = 0.0
    """Share of the logits' size by which a margin must exceed its error to count."""


@dataclass(frozen=True)
class Totals:
    """Points proved right, and at least the sum of their losses in nats."""

    right: int
    loss: float


def tables(weights: Mapping[str, Tensor], decoder_2TD: Tensor) -> Tables:
    """Pre-activations and direct logits of every feature, and G."""
    embedding = weights["W_E"].double()
    eps = base_up((embedding, torch.zeros_like(embedding)), decoder_2TD)
    flat, unembed = decoder_2TD.double().flatten(0, 1), exact(weights["W_U"])
    into = exact(weights["W_in"])
    pre = _grown(matmul(exact(flat), into), eps, ball_norm_up(into, 0))
    direct = _grown(matmul(exact(flat), unembed), eps, ball_norm_up(unembed, 0))
    read = matmul(exact(weights["W_out"]), unembed)
    two, tokens = decoder_2TD.shape[:2]
    return Tables(
        _shaped(pre, two, tokens),
        _shaped(direct, two, tokens),
        read,
        weights["b_in"].double(),
        eps.max(),
    )


def _grown(found: Ball, eps: Tensor, column: Tensor) -> Ball:
    return Ball(found.mid, up(found.rad + product_up(eps.reshape(-1, 1), column)))


def _shaped(ball: Ball, *shape: int) -> Ball:
    return Ball(ball.mid.reshape(*shape, -1), ball.rad.reshape(*shape, -1))


def factors(table: Tables, hint: tuple[Tensor, Tensor] | None) -> Factors:
    """L R with its error, or G itself.

    Rounding of hᵀ L R as computed: at most γ h |L| |R| (Higham 3.5 twice). The radii of the
    pre-activations, and the roundings of their sum, move h_n by at most ρ_n, which |G| writes. The
    direct path: its radii, and the roundings of the last sums, relative to the sizes summed.
    """
    read = table.read_NV
    neurons = read.mid.shape[0]
    parts = (read.mid,) if hint is None else tuple(part.double() for part in hint)
    if hint is None:
        off, sizes = read.rad, read.mid.abs()
    else:
        off = subtract(matmul(exact(parts[0]), exact(parts[1])), read).size
        sizes = matmul(exact(parts[0].abs()), exact(parts[1].abs())).upper
    inner = sum(part.shape[0] for part in parts) + 8
    slope = up(norm_up(off, 0) + up(norm_up(sizes, 0) * (2 * gamma(inner))))
    pre = table.pre_2TN
    widest = up(sum_up(pre.size.amax(1), 0) + table.bias_N.abs())
    moved = up(sum_up(pre.rad.amax(1), 0) + up(widest * (2 * gamma(4))))
    through = sum_up(product_up(moved[:, None], up(read.size + off)), 0)
    direct = table.direct_2TV
    sums = up(sum_up(direct.size.amax(1), 0) + product_up(norm_up(widest), norm_up(sizes, 0)))
    own = up(sum_up(direct.rad.amax(1), 0) + up(sums * (2 * gamma(8))))
    return Factors(parts, slope, up(up(through + own) + 4 * neurons * TINY))


def by_codes(table: Tables, read: Factors, given: Points) -> Totals:
    """One pass over the points: pre-activations by two rows of the table, logits by the factors."""
    pre, direct = table.pre_2TN.mid, table.direct_2TV.mid

    def chunk(points: Tensor) -> tuple[Tensor, Tensor]:
        a, b = points.unbind(1)
        hidden = (pre[0, a] + pre[1, b] + table.bias_N).clamp_min(0)
        logits = hidden
        for part in read.parts:
            logits = logits @ part
        # The real h is at most `hidden` and what its radius adds, which the offset holds.
        size = up(norm_up(hidden) * (1 + 2 * gamma(4)))
        error = up(product_up(size[:, None], read.slope_V) + read.offset_V)
        return direct[0, a] + direct[1, b] + logits, error

    return _judged(chunk, given)


def by_features(table: Tables, given: Points, *, pairs: bool) -> Totals:
    """First-order tiers: each feature's (and the bias's) own ReLU, written by itself, added up.

    What is missed is the interaction: min(P, Q) neuron by neuron, or from the table of pairs. It
    moves z_c − z_v by at most Σ e_n (max_v G_nv − min_v G_nv).
    """
    read, parts = factors(table, None), _contributions(table)
    images = _images(table, parts)
    size_N = up(table.read_NV.upper.amax(1) - table.read_NV.lower.amin(1))
    pair_KK = pair_table(parts.flatten(0, 1), size_N) if pairs else None
    tokens, hidden = table.pre_2TN.mid.shape[1], up(norm_up(parts).amax(1).sum() * (1 + gamma(8)))

    def chunk(points: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.stack([points[:, 0], points[:, 1], torch.zeros_like(points[:, 0])], 1)
        if pair_KK is None:
            y = torch.stack([parts[i, index[:, i]] for i in range(3)], -1)
            missed = spread_up(additive_up("relu", y), size_N)
        else:
            flat = index + tokens * torch.arange(3)
            among = pair_KK[flat[:, :, None], flat[:, None, :]]
            missed = pairs_up(torch.ones(flat.shape, dtype=torch.float64), among)
        logits = images[0, index[:, 0]] + images[1, index[:, 1]] + images[2, 0]
        slack = up(product_up(hidden, read.slope_V) + read.offset_V)
        # Half on each side of z_c − z_v.
        return logits, up(up(missed / 2)[:, None] + slack)

    return _judged(chunk, given)


def _contributions(table: Tables) -> Tensor:
    """y of each first token, each second, and (in row 0 of the third) of the bias: [3, T, N]."""
    bias = torch.zeros_like(table.pre_2TN.mid[:1])
    bias[0, 0] = table.bias_N
    return torch.cat([table.pre_2TN.mid, bias])


def _images(table: Tables, parts: Tensor) -> Tensor:
    """Logits of each contribution alone, direct path included: [3, T, V]."""
    written = parts.clamp_min(0) @ table.read_NV.mid
    return torch.cat([table.direct_2TV.mid, torch.zeros_like(written[:1])]) + written


def by_box(table: Tables, given: Points) -> Totals:
    """One box for all points: every neuron between its ends, every logit between its own."""
    pre, direct = table.pre_2TN, table.direct_2TV
    both = sum_box(
        Box(pre.lower[0].amin(0), pre.upper[0].amax(0)),
        Box(pre.lower[1].amin(0), pre.upper[1].amax(0)),
    )
    hidden = relu_box(sum_box(both, Box(table.bias_N, table.bias_N)))
    # |G's radius| times the largest h, on either side.
    extra = up(sum_up(product_up(hidden.high[:, None], table.read_NV.rad), 0))
    own = linear_box(hidden, table.read_NV.mid)
    ends = sum_box(Box(down(own.low - extra), up(own.high + extra)), _direct_box(direct))
    centre = (ends.low + ends.high) / 2
    radius = torch.maximum(up(ends.high - centre), up(centre - ends.low))

    def chunk(points: Tensor) -> tuple[Tensor, Tensor]:
        return centre.expand(len(points), -1), radius.expand(len(points), -1)

    return _judged(chunk, given)


def _direct_box(direct: Ball) -> Box:
    low, high = direct.lower.amin(1), direct.upper.amax(1)
    return sum_box(Box(low[0], high[0]), Box(low[1], high[1]))


def _judged(chunk: Callable[[Tensor], tuple[Tensor, Tensor]], given: Points) -> Totals:
    """`chunk` gives points' logits and their error."""
    right, losses = 0, []
    for points, label in _chunks(given.points, given.labels):
        logits, error = chunk(points)
        wider = error + given.spare * logits.abs().amax(1, keepdim=True)
        right += int(margin_correct(logits, wider, label).sum())
        losses.append(sum_up(loss_up(logits, error, label), 0))
    return Totals(right, float(sum_up(torch.stack(losses), 0)))


def _chunks(points_N2: Tensor, label_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(label_N), CHUNK):
        yield points_N2[start : start + CHUNK], label_N[start : start + CHUNK]

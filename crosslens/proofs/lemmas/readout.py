"""From normalised rows to losses, for a whole vocabulary or near a reference row.

Logits are z = W_Uᵀ n. What all answers share, m = mean of the columns u_v, changes no loss, so
u_v − m stands for u_v throughout; `Readout.U_DV` holds it, rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslens.proofs.lemmas.stream import Rows
from crosslens.proofs.rounding import (
    SLACK,
    TINY,
    UNIT,
    exact,
    gamma,
    log_up,
    matmul,
    norm_up,
    product_up,
    subtract,
    up,
)

CHUNK = 1024
"""Rows taken at a time."""


@dataclass(frozen=True)
class Readout:
    """Centred columns of the unembedding."""

    U_DV: Tensor
    off: Tensor
    """At least ‖(u_v − m) − U_v‖ for every v."""
    size_V: Tensor
    """At least ‖u_v − m‖."""

    @property
    def largest(self) -> Tensor:
        return self.size_V.max()


@dataclass(frozen=True)
class Directions:
    """U = Q R + P for some directions Q, a hint: R is worked out in full, P by its norms."""

    Q_DR: Tensor
    R_RV: Tensor
    rest_V: Tensor
    """At least ‖P_v‖."""
    across: Tensor
    """At least ‖Qᵀ P_v‖ for every v: next to nothing where Q is orthonormal."""


@dataclass(frozen=True)
class Regions:
    """Reference rows, one for each region, with their logits, and answers worked out exactly."""

    centre_CD: Tensor
    logits_CV: Tensor
    answers_CA: Tensor


@dataclass(frozen=True)
class Leading:
    """Of every row: at least log Σ_v e^{z_v}, and the two answers whose bound is largest."""

    total_U: Tensor
    top_U2: Tensor
    answer_U2: Tensor


def readout(W_U_DV: Float[Tensor, "D V"]) -> Readout:
    """Proof of `off`: the radius of the rounded differences, column by column."""
    W = W_U_DV.double()
    centred = subtract(exact(W), exact(W.mean(1, keepdim=True)))
    off = norm_up(centred.rad, 0).max()
    return Readout(centred.mid, off, up(norm_up(centred.mid, 0) + off))


def caps(read: Readout) -> Float[Tensor, " V"]:
    """At least the loss of any row, for each label y: √D ρ_y + log Σ_v e^{√D ρ_v}, ρ_v = ‖u_v − m‖.

    Proof. ‖n‖ ≤ √D, so z_v − z_y ≤ √D (ρ_v + ρ_y).
    """
    root = math.sqrt(len(read.U_DV)) * (1 + SLACK)
    reach = up(read.size_V * root)
    top = reach.max()
    terms = (reach - top).exp().sum() * (1 + 2 * gamma(len(reach) + 64))
    # The exponents are differences of at most `top`, rounded once.
    slack = up(top * (4 * UNIT))
    return up(up(reach + top) + up(log_up(up(terms)) + slack))


def directions(read: Readout, basis_DR: Float[Tensor, "D R"]) -> Directions:
    """R = fl(Qᵀ U) is a choice, so exact; P = U − Q R is what is left, a ball."""
    Q = basis_DR.double()
    R = Q.T @ read.U_DV
    left = subtract(exact(read.U_DV), matmul(exact(Q), exact(R)))
    across = norm_up(matmul(exact(Q.T), left).size, 0).max()
    return Directions(Q, R, norm_up(left.size, 0), across)


def regions(read: Readout, centre_CD: Tensor, answers_CA: Int[Tensor, "C A"]) -> Regions:
    """Reference rows are whatever they are: only the rows' distance from them counts."""
    return Regions(centre_CD, centre_CD @ read.U_DV, answers_CA)


def in_full(read: Readout, rows: Rows) -> Leading:
    """Every logit of every row."""
    slack = _own_slack(read, rows)
    return _joined(_leading(value @ read.U_DV, slack) for (value,) in _chunks(rows.value))


def near(read: Readout, rows: Rows, region_U: Tensor, apart: Regions, along: Directions) -> Leading:
    """Logits from each row's region: a first product along few directions, a radius for the rest,
    and the region's likely answers exactly.

    Theorem. For a reference row ŝ, δ = n − ŝ and any β,

        | n·u_v − (ŝ·U_v + β·R_v) | ≤ ‖δ − Qβ‖ ‖P_v‖ + slack.

    Proof. δ·U_v = (Qᵀδ)·R_v + δ·P_v, and δ·P_v = (δ − Qβ)·P_v + β·(QᵀP_v); Cauchy–Schwarz.
    It is used for the computed row ñ, and what ñ is off by is added as for logits in full. With
    β = fl(Qᵀδ̃), δ̃ = fl(ñ − ŝ) and ‖δ − δ̃‖ ≤ e = u ‖δ̃‖, the slack is
    ‖Q‖_F (e + γ_D ‖δ̃‖) max ‖R_v‖ for Qᵀδ − β, ‖β‖ max ‖QᵀP_v‖, the products' roundings
    γ_D ‖ŝ‖ max ‖U_v‖ + γ_R ‖β‖ max ‖R_v‖, and ‖n‖ ‖(u_v − m) − U_v‖. Answers that are worked out
    exactly replace this bound by theirs; which ones is a hint.
    """
    W_VD = read.U_DV.T.contiguous()
    own = _own_slack(read, rows)

    def chunk(value: Tensor, region: Tensor) -> Leading:
        delta = value - apart.centre_CD[region]
        beta = delta @ along.Q_DR
        spread, slack = _apart(delta, beta, along)
        sizes = norm_up(apart.centre_CD[region]).max() * gamma(value.shape[1] + 2)
        logits = _widened(apart.logits_CV[region] + beta @ along.R_RV, spread, along.rest_V)
        answers = apart.answers_CA[region]
        told = torch.einsum("bd,bad->ba", value, W_VD[answers])
        slack = up(up(slack + product_up(sizes, read.largest)) + own)
        slack = up(slack + _size(logits, spread, along.rest_V) * (8 * UNIT))
        return _leading(logits.scatter(1, answers, told), slack)

    return _joined(chunk(*part) for part in _chunks(rows.value, region_U))


def far(read: Readout, apart: Regions, region_U: Tensor, reach_U: Tensor) -> Leading:
    """Logits of rows known only to be within `reach` of their region's reference row.

    Proof. |z_v − ŝ·U_v| ≤ reach ‖u_v − m‖, but for the product's rounding.
    """
    norms = norm_up(apart.centre_CD).max()
    slack = up(product_up(norms, up(read.largest * gamma(len(read.U_DV) + 2) + read.off)))

    def chunk(region: Tensor, reach: Tensor) -> Leading:
        bound = _widened(apart.logits_CV[region], reach, read.size_V)
        return _leading(bound, up(slack + _size(bound, reach, read.size_V) * (8 * UNIT)))

    return _joined(chunk(*part) for part in _chunks(region_U, reach_U))


def labels_down(read: Readout, rows: Rows, label_N: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """At most z_y of each row."""
    told = torch.einsum("nd,nd->n", rows.value, read.U_DV.T[label_N])
    return told - up(_own_slack(read, rows) + up(told.abs().max() * (2 * UNIT)))


def labels_far_down(
    read: Readout, apart: Regions, region_N: Tensor, reach_N: Tensor, label_N: Tensor
) -> Float[Tensor, " N"]:
    """At most z_y of rows within `reach` of their region's reference row."""
    told = apart.logits_CV[region_N, label_N]
    norms = norm_up(apart.centre_CD).max()
    slack = product_up(norms, up(read.largest * gamma(len(read.U_DV) + 2) + read.off))
    spread = product_up(reach_N, read.size_V[label_N])
    return told - up(up(spread + slack) + up((told.abs() + spread) * (4 * UNIT)))


def losses_up(found: Leading, at_N: Tensor, own_N: Tensor) -> Float[Tensor, " N"]:
    """At least log Σ_v e^{z_v} − z_y, for rows `at` whose label's logit is at least `own`."""
    return up(found.total_U[at_N] - own_N)


def right(found: Leading, at_N: Tensor, own_N: Tensor, label_N: Tensor, spare: float) -> Tensor:
    """Where the label's logit exceeds every other one's bound, by `spare` of its size and more."""
    top, answer = found.top_U2[at_N], found.answer_U2[at_N]
    other = torch.where(answer[:, 0] == label_N, top[:, 1], top[:, 0])
    return own_N > up(other + spare * top.abs().amax(1))


def _own_slack(read: Readout, rows: Rows) -> Tensor:
    """What a logit that is worked out in full may be off by."""
    width = read.U_DV.shape[0]
    product = product_up(rows.largest, up(read.largest * gamma(width + 2) + read.off))
    return up(product + product_up(rows.eps, read.largest) + 4 * width * TINY)


def _apart(delta: Tensor, beta: Tensor, along: Directions) -> tuple[Tensor, Tensor]:
    """At least ‖δ − Qβ‖ of each row, and the part of the slack that the directions bring."""
    width, rank = along.Q_DR.shape
    sizes, frobenius = norm_up(delta), norm_up(along.Q_DR.flatten())
    off = up(sizes.max() * (2 * UNIT))
    steps = norm_up(beta)
    written = product_up(frobenius, steps.max())
    rest = norm_up(delta - beta @ along.Q_DR.T)
    rounding = up(up(written + sizes.max()) * gamma(rank + 4))
    spread = up(rest + up(off + rounding))
    columns = norm_up(along.R_RV, 0).max()
    turned = product_up(frobenius, up(off + sizes.max() * gamma(width + 2)))
    products = up(turned + steps.max() * gamma(rank + 2))
    slack = up(product_up(products, columns) + product_up(steps.max(), along.across))
    return spread, slack


def _widened(logits_BV: Tensor, spread_B: Tensor, radius_V: Tensor) -> Tensor:
    return torch.addcmul(logits_BV, spread_B[:, None], radius_V)


def _size(bound_BV: Tensor, spread_B: Tensor, radius_V: Tensor) -> Tensor:
    """About what the terms of `_widened` are in size: its sums round by less than eight units of
    that, also where they cancel."""
    return bound_BV.abs().max() + 2 * spread_B.max() * radius_V.max()


def _leading(bound_BV: Tensor, slack: Tensor) -> Leading:
    """From upper bounds of the logits, less a common slack that also takes in what the sums that
    made the bounds, and the differences below, are rounded by: a few units of the largest."""
    top, answer = bound_BV.topk(2)
    slack = up(slack + up(bound_BV.abs().max() * (16 * UNIT)))
    total = (bound_BV - top[:, :1]).exp().sum(1)
    total = total * (1 + 2 * gamma(bound_BV.shape[1] + 64)) + bound_BV.shape[1] * TINY
    return Leading(up(up(top[:, 0] + log_up(up(total))) + slack), up(top + slack), answer)


def _joined(parts: Iterator[Leading]) -> Leading:
    found = list(parts)
    return Leading(
        torch.cat([part.total_U for part in found]),
        torch.cat([part.top_U2 for part in found]),
        torch.cat([part.answer_U2 for part in found]),
    )


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, len(tensors[0]), CHUNK):
        yield tuple(tensor[start : start + CHUNK] for tensor in tensors)

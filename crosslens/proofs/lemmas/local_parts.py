"""What the latents and the biases bring to every neuron of one MLP, as balls.

The MLP and the norm before it are f(x) = W_outᵀ h(n(x)) + b_out with n(x) = r C x ∘ gain + shift,
r = 1/√(mean (C x)² + floor), C taking the mean off for LayerNorm. A neuron is h = φ(g), or u φ(g)
where it is gated. For x̂ = b + Σ a_i d_i, and r the scalar of x̂, everything before φ is linear:

    g = r (Σ a_i E_i + E_b) + fixed,     E = d ∘ gain W_gate,

so that latent i contributes r a_i E_i and the biases together r E_b + fixed; u likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crosslens.proofs.lemmas.neurons import SLOPE, Kind, gap_up, require
from crosslens.proofs.rounding import (
    SLACK,
    TINY,
    UNIT,
    Ball,
    add,
    down,
    exact,
    gamma,
    norm_down,
    norm_up,
    sqrt_up,
    subtract,
    up,
    widen,
)

NormKind = Literal["none", "rms", "layer"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One MLP and the norm before it, exact float64."""

    kind: Kind
    norm: NormKind
    floor: float
    """What the norm adds to the mean square."""
    gain_D: Tensor
    shift_D: Tensor
    gate_DN: Tensor
    """What φ takes; without a gate the only matrix that goes in."""
    value_DN: Tensor | None
    """What multiplies φ."""
    b_gate_N: Tensor
    b_value_N: Tensor | None
    out_ND: Tensor
    b_out_D: Tensor

    def __post_init__(self) -> None:
        require(self.kind)


@dataclass(frozen=True)
class Codes:
    """Active latents of each row [R, K], padded with strength 0."""

    index_RK: Tensor
    """int64."""
    strength_RK: Tensor

    def rows(self, at: slice | Tensor) -> Codes:
        """Some of the rows."""
        return Codes(self.index_RK[at], self.strength_RK[at])


@dataclass(frozen=True)
class Branch:
    """What latents bring to the argument of φ, or to the value, per unit of r a_i."""

    moving_FN: Ball
    """The decoder's bias is the last row."""
    fixed_N: Ball
    """Of the MLP's own bias and the norm's, which r does not multiply."""
    reach_N: Tensor
    """At least how far a neuron's argument moves when n(x) before the gain moves by 1."""


@dataclass(frozen=True)
class Inputs:
    """What reaches the neurons: the arguments of φ, and what multiplies it where gated. Either
    totals [R, N], or the contributions of K latents and, last, of the biases [R, K + 1, N]."""

    gate: Ball
    value: Ball | None


def product(a: Ball, b: Ball) -> Ball:
    """a @ b by one product, whatever the order of summation.

    |fl(x·y) − x·y| ≤ γ_n |x|·|y| + n TINY ≤ γ_n ‖x‖ ‖y‖ + n TINY by Cauchy–Schwarz, and radii
    likewise: ‖a‖ ‖rad b‖ + ‖rad a‖ (‖b‖ + ‖rad b‖). Wider than `rounding.matmul`, for a third.
    """
    n = a.mid.shape[-1]
    rows, columns = norm_up(a.mid)[..., None], norm_up(b.mid, -2)[..., None, :]
    row_rad, column_rad = norm_up(a.rad)[..., None], norm_up(b.rad, -2)[..., None, :]
    rad = rows * columns * gamma(n) + rows * column_rad + row_rad * (columns + column_rad)
    return Ball(a.mid @ b.mid, widen(rad, 8) + 4 * n * TINY)


def multiply(a: Ball, b: Ball) -> Ball:
    """a b, element by element."""
    mid = a.mid * b.mid
    rad = a.mid.abs() * b.rad + a.rad * b.size + mid.abs() * UNIT
    return Ball(mid, widen(rad, 6) + 4 * TINY)


def total(x: Ball, dim: int) -> Ball:
    """Σ x along `dim`, in any order."""
    n = x.mid.shape[dim]
    rad = (x.mid.abs() * gamma(n) + x.rad).sum(dim)
    return Ball(x.mid.sum(dim), widen(rad, n + 2) + TINY)


def centred(x: Ball, dim: int) -> Ball:
    """x without its mean along `dim`."""
    n, sums = x.mid.shape[dim], total(x, dim)
    mid = sums.mid / n
    rad = up(widen(sums.rad / n + mid.abs() * UNIT, 3) + TINY)
    return subtract(x, Ball(mid.unsqueeze(dim), rad.unsqueeze(dim)))


def phi(kind: Kind, z: Ball) -> Ball:
    """φ(z). φ = relu − h, where `gap_up` is at least h and exceeds it by a few units in the last
    place, times the argument's own error in the tail; φ is SLOPE-Lipschitz."""
    gap = gap_up(kind, z.mid)
    mid = z.mid.clamp_min(0) - gap
    size = z.mid.abs()
    relative = (256 * SLACK * (1 + size + size * size + size**3)).clamp_max(1)
    off = gap * relative + mid.abs() * UNIT + z.rad * SLOPE[kind]
    return Ball(mid, widen(off, 6) + (0.0 if kind == "relu" else 8 * TINY))


def neuron(kind: Kind, gate: Ball, value: Ball | None) -> Ball:
    """φ(g), or u φ(g)."""
    found = phi(kind, gate)
    return found if value is None else multiply(value, found)


def decoded(bias_D: Tensor, decoder_FD: Tensor, codes: Codes) -> Ball:
    """x̂ = b + Σ a_i d_i, row by row [R, D]."""
    rows_RKD, strength = decoder_FD[codes.index_RK], codes.strength_RK[:, None]
    sums, sizes = (strength @ rows_RKD)[:, 0], (strength.abs() @ rows_RKD.abs())[:, 0]
    n = codes.index_RK.shape[1]
    inner = Ball(sums, widen(sizes * gamma(n), n + 2) + 4 * n * TINY)
    return add(inner, exact(bias_D))


def scalar(block: Block, x: Ball) -> Ball:
    """r of each row: between 1/√ of the largest and of the smallest mean square; 1 without norm."""
    if block.norm == "none":
        return exact(torch.ones_like(x.mid[:, 0]))
    x = centred(x, -1) if block.norm == "layer" else x
    width = x.mid.shape[-1]
    most, least = norm_up(x.size), norm_down((x.mid.abs() - x.rad).clamp_min(0) * (1 - SLACK))
    high = up(up(up(most * most) / width) + block.floor)
    low = down(down(down(least * least) / width) + block.floor).clamp_min(0)
    top = up(1 / down(low.sqrt() * (1 - SLACK)).clamp_min(0))
    bottom = down(1 / sqrt_up(high))
    mid = (top + bottom) / 2
    return Ball(mid, up(torch.maximum(up(top - mid), up(mid - bottom))))


def folded(block: Block, W_DN: Tensor) -> Ball:
    """The map from C-less rows to neurons: the norm's gain and centring go into the matrix."""
    if block.norm == "none":
        return exact(W_DN)
    gained = multiply(exact(block.gain_D[:, None]), exact(W_DN))
    return centred(gained, 0) if block.norm == "layer" else gained


def branch(block: Block, W_DN: Tensor, b_N: Tensor, rows_FD: Tensor) -> Branch:
    """What the rows (latents, and last the decoder's bias) bring through one matrix."""
    through = folded(block, W_DN)
    shifted = product(exact(block.shift_D[None]), exact(W_DN))
    fixed = add(Ball(shifted.mid[0], shifted.rad[0]), exact(b_N))
    return Branch(product(exact(rows_FD), through), fixed, norm_up(through.size, 0))


def contributions(into: Branch, codes: Codes, scalar_R: Ball) -> Ball:
    """Of each latent and, last, of the biases [R, K + 1, N]."""
    index, strength = codes.index_RK, codes.strength_RK
    bias = torch.full_like(index[:, :1], len(into.moving_FN.mid) - 1)
    index = torch.cat([index, bias], 1)
    strength = torch.cat([strength, torch.ones_like(strength[:, :1])], 1)
    factor = multiply(exact(strength), Ball(scalar_R.mid[:, None], scalar_R.rad[:, None]))
    moving = Ball(into.moving_FN.mid[index], into.moving_FN.rad[index])
    found = multiply(Ball(factor.mid[..., None], factor.rad[..., None]), moving)
    last = add(Ball(found.mid[:, -1], found.rad[:, -1]), into.fixed_N)
    mid = torch.cat([found.mid[:, :-1], last.mid[:, None]], 1)
    return Ball(mid, torch.cat([found.rad[:, :-1], last.rad[:, None]], 1))


def totals(into: Branch, codes: Codes, scalar_R: Ball) -> Ball:
    """r (Σ a_i E_i + E_b) + fixed [R, N], by two products of each row's strengths."""
    moving, n = into.moving_FN, codes.index_RK.shape[1]
    strength = codes.strength_RK[:, None]
    sums = (strength @ moving.mid[codes.index_RK])[:, 0]
    loose = moving.mid.abs() * gamma(n) + moving.rad
    off = (strength.abs() @ loose[codes.index_RK])[:, 0]
    inner = Ball(sums, widen(off, n + 4) + 4 * n * TINY)
    inner = add(inner, Ball(moving.mid[-1], moving.rad[-1]))
    scaled = multiply(Ball(scalar_R.mid[:, None], scalar_R.rad[:, None]), inner)
    return add(scaled, into.fixed_N)


def output(block: Block, x: Ball) -> Ball:
    """f(x), row by row: brute force with its rounding."""
    r = scalar(block, x)
    rows = centred(x, -1) if block.norm == "layer" else x
    if block.norm != "none":
        rows = multiply(Ball(r.mid[:, None], r.rad[:, None]), multiply(rows, exact(block.gain_D)))
    rows = add(rows, exact(block.shift_D))
    gate = add(product(rows, exact(block.gate_DN)), exact(block.b_gate_N))
    value = None
    if block.value_DN is not None and block.b_value_N is not None:
        value = add(product(rows, exact(block.value_DN)), exact(block.b_value_N))
    written = product(neuron(block.kind, gate, value), exact(block.out_ND))
    return add(written, exact(block.b_out_D))

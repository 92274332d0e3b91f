"""Float64 arithmetic that never claims more than is true.

Every number here stands for a real number. A `Ball` says how far off it may be; functions whose
name ends in `up` (`down`) return a float that is at least (at most) the real value of what they
compute from their arguments, taken as exact.

Assumed: the processor rounds each +, −, ×, ÷ and √ to nearest (u = 2^-53) and keeps subnormal
numbers, a matrix product sums its products in any order, fused or not, and exp, log, erf, tanh err
by at most 4 units in the last place. `require_ieee` tests what can be tested of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.errors import CrosslensError

UNIT = 2.0**-53
TINY = 2.0**-1022
"""At least what a product that underflows loses, even where it is flushed to zero."""
SLACK = 2.0**-50
"""4 units in the last place, relative."""


def gamma(n: int) -> float:
    """γ_n = n u / (1 − n u), rounded up: what n roundings in a row can do, relatively.

    Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1.
    """
    return n * UNIT / (1 - n * UNIT) * (1 + 2.0**-50)


def up(x: Tensor) -> Tensor:
    """At least the real result of the one operation that gave `x`."""
    return torch.nextafter(x, torch.full_like(x, math.inf))


def down(x: Tensor) -> Tensor:
    """At most the real result of the one operation that gave `x`."""
    return torch.nextafter(x, torch.full_like(x, -math.inf))


@dataclass(frozen=True)
class Ball:
    """Reals within `rad` of `mid`; float64 tensors of one shape, rad ≥ 0."""

    mid: Tensor
    rad: Tensor

    @property
    def upper(self) -> Tensor:
        return up(self.mid + self.rad)

    @property
    def lower(self) -> Tensor:
        return down(self.mid - self.rad)

    @property
    def size(self) -> Tensor:
        """At least |x|."""
        return up(self.mid.abs() + self.rad)


def exact(x: Tensor) -> Ball:
    """`x` itself; any dtype that float64 holds exactly."""
    mid = x.double()
    return Ball(mid, torch.zeros_like(mid))


def add(a: Ball, b: Ball) -> Ball:
    """a + b. |fl(x + y) − (x + y)| ≤ u |fl(x + y)|, and nothing underflows in a sum."""
    mid = a.mid + b.mid
    return Ball(mid, up(up(a.rad + b.rad) + up(mid.abs() * UNIT)))


def subtract(a: Ball, b: Ball) -> Ball:
    """a − b."""
    return add(a, Ball(-b.mid, b.rad))


def matmul(a: Ball, b: Ball) -> Ball:
    """a @ b, whatever the order of summation.

    |fl(x·y) − x·y| ≤ γ_n |x|·|y| + n TINY (Higham, 3.5), and the radii of a and b add
    |a|·rad b + rad a·(|b| + rad b). The right side is itself computed in floats: three products of
    non-negative terms, each at most (1 + γ) off, which `widen` covers. Costs three products.
    """
    n = a.mid.shape[-1]
    mid = a.mid @ b.mid
    spread = up(up(b.mid.abs() * gamma(n)) + b.rad)
    rad = a.mid.abs() @ spread + a.rad @ b.size
    return Ball(mid, widen(rad, n + 1) + 4 * n * TINY)


def widen(x: Tensor, ops: int) -> Tensor:
    """At least the real value, where `x` ≥ 0 came of non-negative terms by at most `ops` roundings
    each (sums, products and quotients that do not underflow)."""
    return up(x * (1 + 2 * gamma(ops + 1)))


def sum_up(x: Tensor, dim: int = -1) -> Tensor:
    """At least Σ x, for x ≥ 0."""
    return widen(x.sum(dim), x.shape[dim])


def norm_up(x: Tensor, dim: int = -1) -> Tensor:
    """At least ‖x‖₂, and 0 where x is 0."""
    n = x.shape[dim]
    square = widen((x * x).sum(dim), n + 1) + 2 * n * TINY
    return torch.where(x.abs().amax(dim) == 0, 0.0, sqrt_up(square))


def ball_norm_up(x: Ball, dim: int = -1) -> Tensor:
    """At least ‖x‖₂ for every x in the ball."""
    return norm_up(x.size, dim)


def norm_down(x: Tensor, dim: int = -1) -> Tensor:
    """At most ‖x‖₂."""
    n = x.shape[dim]
    square = (x * x).sum(dim) * (1 - 2 * gamma(n + 3)) - 2 * n * TINY
    return down(square.clamp_min(0).sqrt() * (1 - SLACK)).clamp_min(0)


def dot_up(x: Tensor, y: Tensor) -> Tensor:
    """At least Σ x y along the last axis, for x, y ≥ 0."""
    n = x.shape[-1]
    return widen((x * y).sum(-1), n + 1) + 2 * n * TINY


def product_up(x: Tensor, y: Tensor) -> Tensor:
    """At least x y, element by element; 0 where either is 0."""
    return torch.where((x == 0) | (y == 0), 0.0, up(up(x * y) + TINY))


def sqrt_up(x: Tensor) -> Tensor:
    """At least √x."""
    return up(x.sqrt() * (1 + SLACK))


def exp_up(x: Tensor) -> Tensor:
    """At least e^x."""
    return up(x.exp() * (1 + SLACK) + TINY)


def exp_down(x: Tensor) -> Tensor:
    """At most e^x."""
    return down(x.exp() * (1 - SLACK) - TINY).clamp_min(0)


def log_up(x: Tensor) -> Tensor:
    """At least log x, for x > 0."""
    value = x.log()
    return up(value + up(value.abs() * SLACK))


def tanh_up(x: Tensor) -> Tensor:
    """At least tanh x, for x ≥ 0; at most 1."""
    return up(x.tanh() * (1 + SLACK) + TINY).clamp_max(1)


def spectral_up(x: Float[Tensor, "n m"], squarings: int = 4) -> Tensor:
    """At least the largest singular value of x.

    With G = x xᵀ, ‖x‖₂^(2q) = ‖G^q‖₂ ≤ ‖G^q‖_F for q = 2^squarings; the excess is at most
    n^(1/4q). Each square is divided by a power of two, which is exact, so that nothing overflows.
    """
    if not bool(x.any()):
        return torch.zeros((), dtype=torch.float64)
    first = _exponent(x)
    wide = (x if x.shape[0] <= x.shape[1] else x.T).double()
    scaled = Ball(wide * 2.0**-first, (wide != 0).double() * 2.0**-1074)
    power, exponent = matmul(scaled, Ball(scaled.mid.T, scaled.rad.T)), 0.0
    for _ in range(squarings):
        shift = _exponent(power.mid)
        power = Ball(power.mid * 2.0**-shift, up(power.rad * 2.0**-shift + TINY))
        exponent = 2 * (exponent + shift)
        power = matmul(power, power)
    frobenius = norm_up(power.size.flatten())
    shift = _exponent(frobenius)
    # log2 errs by 4 ulp, like the other functions, the sum and the quotient by one each: less
    # than 2^-40 in all, for exponents below 2^10.
    logarithm = math.log2(float(frobenius) * 2.0**-shift) + shift + exponent
    power_of_two = logarithm / 2 ** (squarings + 1)
    value = torch.exp2(torch.tensor(power_of_two, dtype=torch.float64)) * (1 + 2.0**-40)
    return up(up(value) * 2.0**first)


def _exponent(x: Tensor) -> int:
    """k with 2^k near the largest |x|; 0 where all are 0."""
    largest = float(x.abs().max())
    return math.frexp(largest)[1] if 0 < largest < math.inf else 0


def exact_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(s, e) with s = fl(a + b) and s + e = a + b exactly: Knuth's TwoSum."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def require_ieee() -> None:
    """Raise CrosslensError where float64 here is not what the lemmas assume."""
    one, least = torch.ones(8, dtype=torch.float64), torch.full((8,), TINY, dtype=torch.float64)
    kept = bool(((least / 4) * 4 == least).all())
    nearest = bool(((one + UNIT) == 1).all()) and bool(((one + 3 * UNIT) == 1 + 4 * UNIT).all())
    if not (kept and nearest):
        raise CrosslensError(
            "Float64 on this machine does not round to nearest or drops subnormal numbers "
            "(torch.set_flush_denormal?): no bound computed here would be sound."
        )

"""What a proof costs: floating-point operations and bits.

Matrix products are counted as PyTorch's FlopCounterMode counts them, 2 n m k each, and a product of
balls is three. Everything else counts one for each number that a sum, product, comparison,
exponential or outward rounding yields; parts that do not grow with the data, beside the products,
are counted at `TABLE` a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

FLOAT_BITS = 64
TABLE = 16


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Flops in matrix products and elsewhere, and the bits a proof's data takes."""

    matmul: int = 0
    elementwise: int = 0
    bits: int = 0

    @property
    def flops(self) -> int:
        return self.matmul + self.elementwise

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            matmul=self.matmul + other.matmul,
            elementwise=self.elementwise + other.elementwise,
            bits=self.bits + other.bits,
        )


def product(*sizes: int) -> Cost:
    """One matrix product [n, k] @ [k, m]."""
    return Cost(matmul=2 * math.prod(sizes))


def balls(n: int, k: int, m: int) -> Cost:
    """One product of balls."""
    return Cost(matmul=6 * n * k * m, elementwise=TABLE * n * m)


def total(*costs: Cost) -> Cost:
    return sum(costs, Cost())


def max_of_k(tier: str, size: Mapping[str, int]) -> Cost:
    """What `lemmas.max_of_k` costs; sizes V, K, D, H. Codes are one-hot, so they take no bits."""
    V, K, D = size["V"], size["K"], size["D"]
    decoder = Cost(bits=K * V * D * FLOAT_BITS)
    match tier:
        case "brute force":
            return _max_of_k_forward(size)
        case "box":
            steps = Cost(elementwise=sum(4 * (m + 1) * (K + 1) * V for m in range(V)))
        case "codes":
            steps = Cost(elementwise=_scanned(V, K))
        case _:
            width = V - 1 if tier == "pairs" else 1
            steps = Cost(elementwise=sum(_class(m, V, K, width) for m in range(V)))
    return total(_max_of_k_tables(size), decoder, steps)


def _max_of_k_tables(size: Mapping[str, int]) -> Cost:
    V, K, D, H = size["V"], size["K"], size["D"], size["H"]
    F = K * V
    scores = total(balls(V, D, H), balls(F, D, H), balls(V, H, F))
    moved = total(balls(F, D, H), balls(F, H, D), balls(V, D, H), balls(V, H, D))
    logits = total(balls(V, D, V), balls(D, H, D), balls(D, D, V), balls(F, D, V))
    return total(scores, moved, logits, Cost(elementwise=8 * F * D))


def _class(m: int, V: int, K: int, width: int) -> int:
    """All sequences whose largest token is m, `width` other answers."""
    n = m + 1
    gaps = 4 * n * (1 + K) * V + 8 * n * K * n
    weights = 8 * n * K * n * width + n * (K - 1) * m * width
    sums = 0
    for free in range(K):
        placings, queries = math.comb(K - 1, free), 1 if free == K - 1 else n
        sums += placings * queries * width * (m if free else 1) * (K - 1 + 2)
    return gaps + weights + sums


def _scanned(V: int, K: int) -> int:
    """All sequences one by one: the last place's sum, and the largest of the others."""
    sequences = math.prod([V] * K)
    return (2 * V + 8) * sequences + TABLE * V * K * V * V


def _max_of_k_forward(size: Mapping[str, int]) -> Cost:
    """The model as it is run, on every sequence."""
    V, K, D, H = size["V"], size["K"], size["D"], size["H"]
    attention = total(product(1, D, H), product(2 * K, D, H), product(2 * K, 1, H))
    each = total(attention, product(1, H, D), product(1, D, V))
    elementwise = K * D + 5 * K + D + V
    return Cost(matmul=each.matmul * V**K, elementwise=elementwise * V**K)


def modular_addition(tier: str, size: Mapping[str, int]) -> Cost:
    """What `lemmas.modular_addition` costs; sizes P, D, N (neurons), M (points), R (rank or 0)."""
    P, N, M, R = size["P"], size["N"], size["M"], size["R"]
    if tier == "brute force":
        D = size["D"]
        each = total(product(1, D, N), product(1, N, D), product(1, D, P))
        return Cost(matmul=M * each.matmul, elementwise=M * (2 * D + 2 * N + 2 * P))
    judged = Cost(elementwise=M * P * 20)
    decoder = Cost(bits=2 * P * size["D"] * FLOAT_BITS)
    base = total(_modular_tables(size), decoder, judged)
    match tier:
        case "codes":
            return base + _read(P, N, M, 0)
        case "factors":
            return base + _read(P, N, M, R) + Cost(bits=R * (N + P) * FLOAT_BITS)
        case "additive":
            each_point = Cost(elementwise=M * (15 * N + 2 * P))
            return total(base, product(3 * P, N, P), each_point)
        case "pairs":
            table = Cost(matmul=2 * (3 * P) ** 2 * N, elementwise=4 * (3 * P) ** 2)
            images = Cost(elementwise=TABLE * 3 * P * N)
            each_point = Cost(elementwise=M * (9 * 8 + 2 * P))
            return total(base, product(3 * P, N, P), table, images, each_point)
        case _:
            return total(base, balls(1, N, P))


def _modular_tables(size: Mapping[str, int]) -> Cost:
    P, D, N = size["P"], size["D"], size["N"]
    into = total(balls(2 * P, D, N), balls(2 * P, D, P), balls(N, D, P))
    return into + Cost(elementwise=8 * 2 * P * D)


def _read(P: int, N: int, M: int, R: int) -> Cost:
    """Neurons to logits at every point, by G or by its factors."""
    neurons = Cost(elementwise=M * 6 * N)
    if not R:
        return product(M, N, P) + neurons
    hint = balls(N, R, P) + balls(N, R, P)
    return total(product(M, N, R), product(M, R, P), hint, neurons)

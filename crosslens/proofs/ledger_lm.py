"""What the proofs about a small language model cost; counted as in `ledger`.

Sizes: V D L H T N (neurons) S (sequences), P (sites) F C (regions) K A (answers) R (directions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from crosslens.proofs.ledger import FLOAT_BITS, TABLE, Cost, balls, product, total


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How many things a tier has to look at."""

    nodes: int
    """Distinct contexts that activations are worked out for."""
    tokens: int = 0
    """Distinct tokens among them."""
    judged: int = 0
    """Distinct contexts whose logits are bounded."""
    told: int = 0
    """Positions whose label is looked up."""


def brute_force(size: Mapping[str, int]) -> Cost:
    """The model as it is run: every position of every sequence, all scores, all logits."""
    V, D, L, H, T, N, S = (size[letter] for letter in "VDLHTNS")
    rows = S * T
    layer = total(
        product(4 * rows, D, D), product(2 * rows, T, D), product(rows, D, N), product(rows, N, D)
    )
    each = L * (12 * D + 5 * H * T + N) + 5 * D + 5 * V
    matmul = L * layer.matmul + product(rows, D, V).matmul
    return Cost(matmul=matmul, elementwise=rows * each)


def caps(size: Mapping[str, int]) -> Cost:
    """Every label's loss at worst, and the centred readout."""
    V, D = size["V"], size["D"]
    return Cost(elementwise=8 * D * V + 16 * V + 2 * size["S"] * size["T"])


def body(size: Mapping[str, int], found: Counted) -> Cost:
    """All activations of the nodes, once for each token in front of the first attention, and their
    distance from what the regions' codes decode to."""
    D, L, H, T, N = (size[letter] for letter in "DLHTN")
    first, later = product(3 * found.tokens, D, D), product(3 * found.nodes, D, D)
    layer = total(
        product(2 * found.nodes, T, D),
        product(found.nodes, D, D),
        product(found.nodes, D, N),
        product(found.nodes, N, D),
    )
    weights = L * (4 * D * D + 2 * D * N) * 4
    rows = found.nodes * (L * (40 * D + 16 * H * T + 6 * N) + 10 * D)
    matmul = first.matmul + (L - 1) * later.matmul + L * layer.matmul
    prefixes = Cost(elementwise=TABLE * size["S"] * T)
    distances = Cost(elementwise=4 * size["P"] * found.nodes * D)
    decoding = total(*[decoded(size)] * size["P"])
    own = Cost(matmul=matmul, elementwise=weights + rows)
    return total(own, prefixes, distances, decoding)


def decoded(size: Mapping[str, int]) -> Cost:
    """Every region's code at one site."""
    return product(size["C"], size["K"], size["D"]) + Cost(elementwise=4 * size["C"] * size["D"])


def in_full(size: Mapping[str, int], found: Counted) -> Cost:
    """All logits of each node that is judged, one more for each label."""
    V, D = size["V"], size["D"]
    rows = Cost(elementwise=found.judged * (7 * V + 4 * D) + found.told * 8)
    return total(product(found.judged, D, V), product(found.told, D, 1), rows)


def near(size: Mapping[str, int], found: Counted) -> Cost:
    """Logits by regions and directions, the likely answers exactly."""
    V, D, C, A, R = (size[letter] for letter in "VDCAR")
    table = total(product(R, D, V), balls(D, R, V), balls(R, D, V), product(C, D, V))
    each = total(product(1, D, R), product(1, R, V), product(1, R, D), product(1, A, D))
    rows = found.judged * (11 * V + 24 * D + 2 * A) + found.told * 8
    matmul = found.judged * each.matmul
    reference = total(decoded(size), Cost(elementwise=6 * C * D + 4 * D * V))
    own = Cost(matmul=matmul, elementwise=rows)
    return total(table, reference, own, product(found.told, D, 1))


def recursed(size: Mapping[str, int], tier: str, found: Counted) -> Cost:
    """The regions through all layers, every node's error after them, logits from the regions'."""
    V, D, L, H, T, N, C = (size[letter] for letter in "VDLHTNC")
    regions = total(
        product(3 * C, D, D),
        product(2 * found.nodes, T, D),
        product(found.nodes, D, D),
        product(C, D, N),
        product(C, N, D),
        Cost(elementwise=C * (30 * D + 8 * N)),
        Cost(elementwise=found.nodes * (32 * H * T + 20 * N + 40 * D)),
        _spectral(N, D),
        *[decoded(size)] * 4,
    )
    surrogate = Cost() if tier == "codes" else _surrogate(size, pairs=tier == "pairs")
    layers = total(*[regions + surrogate] * L)
    prefixes = Cost(elementwise=TABLE * size["S"] * T + 4 * found.nodes * D)
    read = total(product(C, D, V), *[decoded(size)] * 2)
    rows = Cost(elementwise=found.judged * (10 * V + 6 * D) + found.told * 12)
    return total(layers, prefixes, read, rows)


def _surrogate(size: Mapping[str, int], *, pairs: bool) -> Cost:
    """Features' own images and what they miss together."""
    F, N, D, C, K = size["F"] + 1, size["N"], size["D"], size["C"], size["K"] + 1
    images = total(product(F, D, N), decoded(size), Cost(elementwise=C * K * N * 8))
    if not pairs:
        return total(images, _spectral(N, D), Cost(elementwise=C * K * N * 8 + C * N * 12))
    table = Cost(matmul=2 * F * F * N, elementwise=4 * F * F + TABLE * F * N)
    return total(images, table, Cost(elementwise=8 * C * K * K))


def _spectral(N: int, D: int) -> Cost:
    """`rounding.spectral_up` of an N × D matrix."""
    small, large = min(N, D), max(N, D)
    return total(balls(small, large, small), *[balls(small, small, small)] * 4)


def bits(size: Mapping[str, int], tiers: frozenset[str], groups: int) -> int:
    """Of the features, the regions' codes, each position's region and group, the likely answers
    and the directions, as far as the tiers look at them. Numbers among n take log2 n bits."""
    V, D, T, S, P, F, C, K = (size[letter] for letter in "VDTSPFCK")
    found = S * T * _among(groups) if groups > 1 else 0
    if tiers == {"box"}:
        return found
    found += P * (F + 1) * D * FLOAT_BITS + C * K * (_among(F) + FLOAT_BITS) + S * T * _among(C)
    if "regions" in tiers:
        found += C * size["A"] * _among(V) + D * size["R"] * FLOAT_BITS
    return found


def _among(n: int) -> int:
    return max(1, math.ceil(math.log2(n)))

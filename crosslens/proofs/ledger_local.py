"""What layer-local proofs cost: sizes R rows, K latents active at most, F latents in all, D, N."""

from __future__ import annotations

import math
from collections.abc import Mapping

from crosslens.proofs.ledger import FLOAT_BITS, TABLE, Cost, balls, product, total


def times(cost: Cost, count: int) -> Cost:
    """That cost so many times."""
    return Cost(
        matmul=cost.matmul * count, elementwise=cost.elementwise * count, bits=cost.bits * count
    )


def fixed_cost(tiers: set[str], size: Mapping[str, int], gated: bool) -> Cost:
    """What does not grow with the rows: effective weights, ‖W_out‖₂, pairs, the decoder's bits."""
    F, D, N = size["F"], size["D"], size["N"]
    branches = 1 + gated
    short, long = sorted((N, D))
    into = total(product(1, D, N), product(F + 1, D, N), Cost(elementwise=TABLE * (F + D) * N))
    spectral = total(balls(short, long, short), times(balls(short, short, short), 4))
    cost = total(times(into, branches), spectral, Cost(bits=(F + 1) * D * FLOAT_BITS))
    if "additive/pairs" in tiers:
        table = product(F + 2, N, F + 2)
        cost += total(table, Cost(elementwise=TABLE * (F + 2) ** 2))
    if any(tier.startswith("linear") for tier in tiers):
        cost += Cost(bits=3 * N * FLOAT_BITS)
    return cost


def row_cost(tier: str, size: Mapping[str, int], gated: bool) -> Cost:
    """What each row costs, its code's bits among it; rounding outward counts like any operation."""
    F, D, N, K = size["F"], size["D"], size["N"], size["K"]
    surrogate, method = tier.split("/")
    if method == "cap":
        return Cost()
    code = Cost(bits=K * (math.ceil(math.log2(F + 1)) + FLOAT_BITS))
    decode = total(times(product(1, K, D), 2), code, Cost(elementwise=24 * D))
    if surrogate == "coder":
        return decode
    if method == "pairs":
        return decode + Cost(elementwise=9 * (K + 2) ** 2)
    branches = 1 + gated
    if surrogate in ("linear", "transition"):
        into = total(times(product(1, K, N), 2 * branches), Cost(elementwise=24 * branches * N))
    else:
        into = Cost(elementwise=14 * branches * (K + 1) * N)
    each = K + 1 if surrogate in ("additive", "given bias") and method != "sizes" else 2
    neurons = Cost(elementwise=24 * each * N)
    out = product(1, N, D) if method == "exact" else Cost(elementwise=6 * N)
    return total(decode, into, neurons, out)


def brute_cost(size: Mapping[str, int], gated: bool) -> Cost:
    """Running the MLP and its norm on every row, as it is run, without radii."""
    D, N = size["D"], size["N"]
    each = total(times(product(1, D, N), 1 + gated), product(1, N, D))
    return times(each + Cost(elementwise=5 * D + 6 * N), size["R"])

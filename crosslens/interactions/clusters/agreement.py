"""How far two partitions of the same things agree."""

from __future__ import annotations

import numpy as np

from crosslens.interactions.pairs.table import Floats, Ints


def adjusted_rand(first_V: Ints, second_V: Ints) -> float:
    """Hubert & Arabie's adjusted Rand index (1985): how many pairs of things both partitions put
    together, on a scale where 1 is the same partition and 0 what labels in random order give.

    (Σ C(n_ab, 2) − e) / (½(Σ C(n_a, 2) + Σ C(n_b, 2)) − e), e = Σ C(n_a, 2) Σ C(n_b, 2) / C(n, 2),
    n_ab the things in cluster a of the one and b of the other. 1 where both put all together, or
    all apart.

    Args:
        first_V, second_V: labels, from 0.
    """
    n_second = int(second_V.max(initial=0)) + 1
    joint = _pairs(np.bincount(first_V * n_second + second_V))
    first, second = (_pairs(np.bincount(label_V)) for label_V in (first_V, second_V))
    all_pairs = len(first_V) * (len(first_V) - 1) / 2
    expected = first * second / all_pairs if all_pairs else 0.0
    highest = (first + second) / 2
    return (joint - expected) / (highest - expected) if highest != expected else 1.0


def _pairs(count: Ints | Floats) -> float:
    return float((count * (count - 1)).sum()) / 2

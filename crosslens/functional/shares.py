"""Intervals of shares."""

from __future__ import annotations

from statistics import NormalDist


def wilson(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) interval of a share `count` / `total`; (0, 1) of nothing."""
    if not total:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, small = count / total, z * z / total
    middle = (share + small / 2) / (1 + small)
    reach = z / (1 + small) * (share * (1 - share) / total + small / (4 * total)) ** 0.5
    # Of none and of all an end is the share itself, which rounding must not put outside.
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))

"""Rank correlations within sites, and means of kinds of pairs, with intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from crosslens.diffing.intervals import Interval
from crosslens.diffing.resampling import LEAST, draws, interval

_NOTHING = 1e-18
"""What rounding leaves of ranks, all of which was taken off, multiplied up."""


def rank_correlation(
    x_C: Float64[Tensor, " c"],
    y_C: Float64[Tensor, " c"],
    stratum_C: Int64[Tensor, " c"],
    count_DC: Float[Tensor, "d c"],
    known_C: Float64[Tensor, " c"] | None = None,
) -> Float64[Tensor, " d"]:
    """Spearman's ρ (1904) of ranks taken within strata, on each line of `draws`.

    The rank of a pair is the share of its stratum's pairs below it, ties by half, less ½: then the
    mean of each stratum is 0, and strata of different units say nothing about one another. With one
    stratum it is the usual ρ, tied ranks averaged. NaN where ranks do not differ.

    Args:
        known_C: if given, the partial correlation: of what is left of both ranks when what is
            linear in the ranks of this is taken off.
    """
    count_DC = count_DC.double()

    def summed(a_DC: Tensor, b_DC: Tensor) -> Tensor:
        return (count_DC * a_DC * b_DC).sum(1, keepdim=True)

    u_DC, v_DC = (_ranks(values_C, stratum_C, count_DC) for values_C in (x_C, y_C))
    if known_C is not None:
        w_DC = _ranks(known_C, stratum_C, count_DC)
        square_D1 = summed(w_DC, w_DC)
        u_DC, v_DC = (a_DC - w_DC * (summed(a_DC, w_DC) / square_D1) for a_DC in (u_DC, v_DC))
    spread_D1 = summed(u_DC, u_DC) * summed(v_DC, v_DC)
    return (summed(u_DC, v_DC) / spread_D1.where(spread_D1 > _NOTHING, torch.nan).sqrt())[:, 0]


def _ranks(value_C: Tensor, stratum_C: Tensor, count_DC: Tensor) -> Tensor:
    same_CC = (stratum_C[:, None] == stratum_C).double()
    below_CC = (value_C[:, None] < value_C).double()
    level_CC = (value_C[:, None] == value_C).double()
    rank_DC = count_DC @ ((below_CC + level_CC / 2) * same_CC)
    return rank_DC / (count_DC @ same_CC).clamp_min(1) - 0.5


def correlated(
    x_C: NDArray[np.float64],
    y_C: NDArray[np.float64],
    stratum_C: NDArray[np.int64],
    beyond_C: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> Interval | None:
    """ρ within strata of the pairs of which both numbers are known, with a 95 % interval.

    The interval is a percentile bootstrap over pairs: the question is how well one would predict
    for other pairs, and what the text does to a pair's own effect is in its number already. Pairs
    that share a latent depend on one another, which it does not know of.

    Args:
        beyond_C: if given, the partial correlation, this taken off.

    None where fewer than 5 pairs are known, or their ranks do not differ.
    """
    last_C = x_C if beyond_C is None else beyond_C
    known_C = np.isfinite(x_C) & np.isfinite(y_C) & np.isfinite(last_C)
    if known_C.sum() < LEAST:
        return None
    x, y, stratum, last = (
        torch.from_numpy(each[known_C]) for each in (x_C, y_C, stratum_C, last_C)
    )
    taken_off = None if beyond_C is None else last
    found = interval(rank_correlation(x, y, stratum, draws(len(x), seed), taken_off))
    return found if math.isfinite(found.value) else None


def compared(
    value_C: NDArray[np.float64], kind_C: NDArray[Any], baseline: str, seed: int = 0
) -> dict[str, dict[str, object]]:
    """Of each kind of pair: how many, their mean and its ratio to that of the baseline's pairs,
    with percentile intervals over pairs drawn again within their kind; and their median.

    Intervals are None for fewer than 5 pairs.
    """
    known_C = np.isfinite(value_C)
    kinds = dict.fromkeys(kind_C[known_C].tolist())
    means = {
        kind: _means(value_C[known_C & (kind_C == kind)], seed + number)
        for number, kind in enumerate(kinds)
    }
    found: dict[str, dict[str, object]] = {}
    for kind, mean_D in means.items():
        value_c = value_C[known_C & (kind_C == kind)]
        found[kind] = {
            "pairs": len(value_c),
            "mean": float(mean_D[0]),
            "ci": _ends(mean_D),
            "median": float(np.median(value_c)),
        }
        if baseline in means and float(means[baseline][0]):
            short = min(len(mean_D), len(means[baseline]))
            ratio_D = mean_D[:short] / means[baseline][:short]
            found[kind] |= {"ratio": float(ratio_D[0]), "ratio_ci": _ends(ratio_D)}
    return found


def _means(value_c: NDArray[np.float64], seed: int) -> Tensor:
    """Of the pairs themselves, then of each draw of them; only the first where there are few."""
    value = torch.from_numpy(value_c)
    if len(value) < LEAST:
        return value.mean()[None]
    count_Dc = draws(len(value), seed).double()
    return count_Dc @ value / len(value)


def _ends(value_D: Tensor) -> list[float] | None:
    if len(value_D) == 1:
        return None
    found = interval(value_D)
    return [found.low, found.high]

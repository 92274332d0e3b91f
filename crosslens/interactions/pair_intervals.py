"""Means over tokens that come in documents, and 95 % intervals over the documents."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Student's t at 97.5 %, for 1, 2, … degrees of freedom.
_T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def student(freedom: Int64[Tensor, "*c"]) -> Float[Tensor, "*c"]:
    """How many standard errors a 95 % interval reaches to either side: Student's t, from 31 degrees
    of freedom on that of 30 (wider than right by 4 % at most)."""
    table = torch.tensor(_T975, dtype=torch.float64, device=freedom.device)
    return table[freedom.clamp(1, len(_T975)) - 1]


def mean_interval(
    total_CG: Float[Tensor, "c g"], count_CG: Int64[Tensor, "c g"]
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Σ total / Σ count, and a 95 % interval of it, leaving out one group of documents at a time.

    With θ the mean and θ_g that without group g, the variance is (G − 1)/G Σ_g (θ_g − θ)², G the
    number of groups in which there is anything (the jackknife of a ratio; Quenouille 1956, Tukey
    1958), and the interval t standard errors wide on G − 1 degrees of freedom. Tokens of a document
    depend on one another, which an interval over tokens would not know.

    Returns:
        Mean, low, high; low and high are NaN where fewer than two groups have anything, the mean
        too where none has.
    """
    count_CG = count_CG.to(total_CG.dtype)
    total_C, count_C = total_CG.sum(1), count_CG.sum(1)
    mean_C = total_C / count_C
    there_CG = count_CG > 0
    groups_C = there_CG.sum(1)
    without_CG = (total_C[:, None] - total_CG) / (count_C[:, None] - count_CG)
    square_CG = (without_CG - mean_C[:, None]).square().where(there_CG, 0.0)
    error_C = (square_CG.sum(1) * (groups_C - 1) / groups_C).sqrt()
    reach_C = (error_C * student(groups_C - 1)).where(groups_C > 1, torch.nan)
    return mean_C, mean_C - reach_C, mean_C + reach_C

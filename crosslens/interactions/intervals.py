"""Means over tokens that come in documents, and 95 % intervals over the documents."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from crosslens.diffing.intervals import students_t


def jackknife_reach(
    value_C: Float[Tensor, " c"], without_CG: Float[Tensor, "c g"], there_CG: Bool[Tensor, "c g"]
) -> Float[Tensor, " c"]:
    """How far a 95 % interval of a figure reaches to either side, from the figure without each
    group of documents.

    With θ the figure and θ_g that without group g, the variance is (G − 1)/G Σ_g (θ_g − θ)², G the
    number of groups in which there is anything (the jackknife of a ratio; Quenouille 1956, Tukey
    1958), and the interval t standard errors wide on G − 1 degrees of freedom. NaN where G < 2.
    """
    groups_C = there_CG.sum(-1)
    square_CG = (without_CG - value_C[:, None]).square().where(there_CG, 0.0)
    error_C = (square_CG.sum(-1) * (groups_C - 1) / groups_C).sqrt()
    t_C = students_t((groups_C - 1).double().cpu(), 0.95).to(error_C)
    return (error_C * t_C).where(groups_C > 1, torch.nan)


def mean_interval(
    total_CG: Float[Tensor, "c g"], count_CG: Int64[Tensor, "c g"]
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Σ total / Σ count, and a 95 % interval of it, leaving out one group of documents at a time.

    Tokens of a document depend on one another, which an interval over tokens would not know.

    Returns:
        Mean, low, high; low and high are NaN where fewer than two groups have anything, the mean
        too where none has.
    """
    count_CG = count_CG.to(total_CG.dtype)
    total_C, count_C = total_CG.sum(1), count_CG.sum(1)
    mean_C = total_C / count_C
    without_CG = (total_C[:, None] - total_CG) / (count_C[:, None] - count_CG)
    reach_C = jackknife_reach(mean_C, without_CG, count_CG > 0)
    return mean_C, mean_C - reach_C, mean_C + reach_C

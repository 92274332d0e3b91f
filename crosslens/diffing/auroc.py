"""How well a number tells two kinds of things apart: area under the ROC curve."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def auroc(
    positive_NL: Float[Tensor, "n l"], negative_ML: Float[Tensor, "m l"]
) -> Float[Tensor, " l"]:
    """P(positive > negative) + ½ P(positive = negative) of each column, in float64: the rank sum of
    the positives with tied ranks averaged, less its least value, over N·M (Mann & Whitney 1947).

    NaN where there are no positives or no negatives.
    """
    if not len(positive_NL) or not len(negative_ML):
        return torch.full((positive_NL.shape[1],), torch.nan, dtype=torch.float64)
    positive_LN = positive_NL.T.double().contiguous()
    sorted_LM = negative_ML.T.double().contiguous().sort(dim=-1).values
    below_LN = torch.searchsorted(sorted_LM, positive_LN)
    not_above_LN = torch.searchsorted(sorted_LM, positive_LN, right=True)
    return (below_LN + not_above_LN).double().mean(-1) / (2 * len(negative_ML))


def drawn_auroc(
    positive_NL: Float[Tensor, "n l"],
    negative_ML: Float[Tensor, "m l"],
    count_DN: Float[Tensor, "d n"],
    count_DM: Float[Tensor, "d m"],
) -> Float[Tensor, "d l"]:
    """The same on resamples, in each of which a thing occurs as often as `resampling.draws` says.

    The same counts for both sides keep things together that are measured twice.
    """
    pairs = len(positive_NL) * len(negative_ML)
    columns = zip(positive_NL.unbind(1), negative_ML.unbind(1), strict=True)
    found = [_wins(p_N, n_M, count_DN, count_DM) for p_N, n_M in columns]
    return torch.stack(found, 1) / pairs if found else count_DN.new_zeros(len(count_DN), 0)


def _wins(positive_N: Tensor, negative_M: Tensor, count_DN: Tensor, count_DM: Tensor) -> Tensor:
    """Pairs won by the positive, ties by half [D]. Exact in float32: halves below 2^23."""
    higher_NM = (positive_N[:, None] > negative_M).to(count_DN)
    equal_NM = (positive_N[:, None] == negative_M).to(count_DN)
    return (count_DN @ (higher_NM + equal_NM / 2) * count_DM).sum(1)

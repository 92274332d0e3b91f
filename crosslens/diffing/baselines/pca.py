"""Principal components of the activation differences."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from crosslens.diffing.baselines.baseline import Baseline, from_rows
from crosslens.diffing.baselines.lens import promoted
from crosslens.diffing.baselines.moments import Moments
from crosslens.lm import LanguageModel

COMPONENTS = 10


def principal_components(
    covariance_DD: Float64[Tensor, "d d"], n: int
) -> tuple[Float64[Tensor, " c"], Float[Tensor, "c d"]]:
    """The shares of the variance and the unit directions of the `n` largest, largest first.

    A direction's sign is that which makes its largest entry positive. Where nothing varies the
    shares are 0.
    """
    value_D, vector_DC = torch.linalg.eigh(covariance_DD)
    kept = slice(-min(n, len(value_D)), None)
    component_CD = vector_DC.T[kept].flip(0)
    largest_C1 = component_CD.gather(1, component_CD.abs().argmax(1, keepdim=True))
    total = value_D.clamp_min(0).sum()
    share_C = value_D[kept].flip(0).clamp_min(0) / (total if total > 0 else 1)
    return share_C, component_CD * largest_C1.sign()


def pca(found: Moments, model: LanguageModel, n: int = COMPONENTS) -> Baseline:
    """Its components are the first `n`: a row's strength is the square of its difference's
    coordinate, counted from the mean difference.

    Args:
        found: of one place.
        model: the changed one, whose logit lens is used.
    """
    share_C, component_CD = principal_components(found.covariance_DD, n)
    place, mean_D, basis_DC = found.place, found.mean_D.float(), component_CD.float().T

    def strengths(rows_RX: Tensor) -> Tensor:
        about_RD = place.difference(rows_RX) - mean_D.to(rows_RX.device)
        return (about_RD @ basis_DC.to(rows_RX.device)).square()

    figures = {
        "site": place.site,
        "tokens": found.count,
        "explained": float(share_C.sum()),
        "components": [
            {"share": share, "top_tokens": list(each.top), "bottom_tokens": list(each.bottom)}
            for share, each in zip(
                share_C.tolist(), promoted(component_CD, model, place.site), strict=True
            )
        ],
    }
    return Baseline(name="pca", strengths=from_rows(strengths), figures=figures)

"""How much of either model the coder explains, in both published conventions, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crosslens.diffing.groups import Groups
from crosslens.diffing.intervals import Interval, jackknife
from crosslens.diffing.pair import Pair
from crosslens.diffing.stream import Coded
from crosslens.errors import CrosslensError


class FidelitySums:
    """Sums over tokens, group by group; O(groups × columns) memory."""

    def __init__(self, pair: Pair, groups: Groups) -> None:
        self.groups = groups
        self.models = {
            name: _ModelSums(columns, groups.n)
            for name, columns in ((pair.a, pair.columns_a), (pair.b, pair.columns_b))
        }

    def add(self, chunk: Coded) -> None:
        """The tokens of one chunk."""
        error_RY = chunk.error_RY
        group_R = self.groups.of_rows(chunk).to(error_RY.device)
        for model in self.models.values():
            model.add(chunk.target_RY, error_RY, group_R)


class _ModelSums:
    def __init__(self, columns: Tensor, n: int) -> None:
        self.columns = columns
        device = columns.device
        self.sum_GX = torch.zeros(n, len(columns), dtype=torch.float64, device=device)
        self.terms_GS = torch.zeros(n, 5, dtype=torch.float64, device=device)
        """Tokens, Σ‖e‖², Σ‖x‖², Σ‖e‖²/‖x − x̄‖², and over how many tokens that last one is."""

    def add(self, target_RY: Tensor, error_RY: Tensor, group_R: Tensor) -> None:
        x_RX = target_RY[:, self.columns]
        error_R = error_RY[:, self.columns].square().sum(-1).double()
        about_R = (x_RX - x_RX.mean(0)).square().sum(-1).double()
        apart_R = about_R > 0
        ones_R = torch.ones_like(error_R)
        terms_RS = torch.stack(
            [
                ones_R,
                error_R,
                x_RX.square().sum(-1).double(),
                (error_R / about_R).where(apart_R, 0.0),
                ones_R * apart_R,
            ],
            -1,
        )
        self.terms_GS.index_add_(0, group_R, terms_RS)
        self.sum_GX.index_add_(0, group_R, x_RX.double())


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Of one model, all its sites side by side, in scaled units."""

    fvu: Interval
    """Σ‖x − x̂‖² / Σ‖x − x̄‖²: sums over all tokens, x̄ their mean (ratio of variances)."""
    explained_variance: Interval
    """Mean over tokens of 1 − ‖x − x̂‖² / ‖x − x̄‖², x̄ the mean of the chunk (mean of ratios, as
    Kissane et al. have it); not 1 − FVU: lower where small rows fit badly."""


def fidelity(sums: FidelitySums, level: float = 0.95) -> dict[str, Fidelity]:
    """Figures per model, with jackknife intervals over groups of tokens.

    Raises:
        CrosslensError: there were no tokens.
    """
    return {name: _fidelity(model, level) for name, model in sums.models.items()}


def _fidelity(sums: _ModelSums, level: float) -> Fidelity:
    terms_GS, sum_GX = sums.terms_GS.cpu(), sums.sum_GX.cpu()
    seen_G = terms_GS[:, 0] > 0
    if not seen_G.any():
        raise CrosslensError("There are no tokens to measure: the token policy keeps none.")
    whole = _figures(terms_GS.sum(0, keepdim=True), sum_GX.sum(0, keepdim=True))
    # Groups without tokens leave nothing out.
    without = _figures((terms_GS.sum(0) - terms_GS)[seen_G], (sum_GX.sum(0) - sum_GX)[seen_G])
    fvu, explained = (
        jackknife(float(value[0]), left_out, level)
        for value, left_out in zip(whole, without, strict=True)
    )
    return Fidelity(fvu=fvu, explained_variance=explained)


def _figures(terms_GS: Tensor, sum_GX: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """FVU and mean-of-ratios explained variance of each row of sums."""
    tokens_G, error_G, square_G, ratio_G, counted_G = terms_GS.T
    spread_G = square_G - sum_GX.square().sum(-1) / tokens_G
    return (error_G / spread_G).numpy(), (1 - ratio_G / counted_G).numpy()

"""Held-out figures of a trained scheme, and the baselines that give them meaning."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from crosslens.activations import Source
from crosslens.coder import Coder, all_rows
from crosslens.evaluation import reconstruction, splice
from reproduce.scheme_training import ROWS, Rows

PARTS = 8
"""The held-out text is also judged in so many parts, to say how far the FVU scatters."""


def judged(coder: Coder, rows: Rows, source: Source, splice_tokens: int) -> dict[str, Any]:
    """FVU with its standard error, L0, dead share, and the cross-entropy recovered."""
    heldout_RX = rows.heldout()
    whole = reconstruction(coder, heldout_RX.split(ROWS))
    parts = [
        reconstruction(coder, part.split(ROWS)).fvu for part in heldout_RX.chunk(PARTS) if len(part)
    ]
    spliced = splice(coder, source, whole.mean, splice_tokens)
    ce = {site: asdict(figures) for site, figures in spliced.items()}
    return {
        "heldout_rows": whole.tokens,
        "fvu": whole.fvu,
        "fvu_error": statistics.stdev(parts) / len(parts) ** 0.5,
        "l0": whole.l0,
        "dead": whole.dead,
        "ce_recovered": _mean([each["recovered_mean"] for each in ce.values()]),
        "ce_recovered_from_zero": _mean([each["recovered_zero"] for each in ce.values()]),
        "ce_lost": _mean([each["ce"] - each["ce_clean"] for each in ce.values()]),
        "fvu_by_site": {site: figures.fvu for site, figures in whole.sites.items()},
        "splice": ce,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def baseline(coder: Coder, rows: Rows, rank: int) -> dict[str, Any]:
    """What a linear method does with the same rows, in the same units.

    Where a coder writes what it reads: the `rank` leading principal components, as many numbers
    for a row as a code has active latents. Where it writes something else: least squares from all
    that is read to all that is written (which a cross-layer coder may not even do: it is not
    causal).
    """
    train, heldout = (
        all_rows(coder.wiring, each.float()) for each in (rows.sample(), rows.heldout())
    )
    x_train, x = (coder.scaled_read(each.x_BX, each.site_B).double() for each in (train, heldout))
    y_train, y = (coder.scaled_write(each.y_BY, each.site_B).double() for each in (train, heldout))
    if coder.wiring.read == coder.wiring.write:
        name, found = f"PCA, {rank} components", _pca(y_train, y, rank)
    else:
        name, found = "least squares", _least_squares((x_train, y_train), x)
    error, spread = (y - found).square().sum(), (y - y.mean(0)).square().sum()
    return {"name": name, "fvu": float(error / spread)}


def _pca(train_RY: Tensor, y_RY: Tensor, rank: int) -> Tensor:
    mean_Y = train_RY.mean(0)
    covariance_YY = (train_RY - mean_Y).T @ (train_RY - mean_Y)
    top_YK = torch.linalg.eigh(covariance_YY).eigenvectors[:, -rank:]
    return (y_RY - mean_Y) @ top_YK @ top_YK.T + mean_Y


def _least_squares(train: tuple[Tensor, Tensor], x_RX: Tensor) -> Tensor:
    x_train, y_train = train
    mean_X, mean_Y = x_train.mean(0), y_train.mean(0)
    inputs_RX = x_train - mean_X
    square_XX = inputs_RX.T @ inputs_RX
    ridge = 1e-4 * square_XX.diagonal().mean()
    square_XX.diagonal().add_(ridge)
    map_XY = torch.linalg.solve(square_XX, inputs_RX.T @ (y_train - mean_Y))
    return (x_RX - mean_X) @ map_XY + mean_Y

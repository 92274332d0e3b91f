"""Start a coder's biases from a sample of the data."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crosslens.coder.activations import JumpReLU
from crosslens.coder.coder import Coder
from crosslens.coder.rows import all_rows
from crosslens.errors import UsageError

BLOCK_BYTES = 64 * 2**20
"""Memory for the pre-activations of one block of latents."""


@torch.no_grad()
def center_biases(coder: Coder, mean_X: Tensor) -> None:
    """Start from the mean: b_dec is the mean of what is to be written, and b_enc takes the mean of
    what is read out of the pre-activations, −W_enc·x̄ (not where the coder centers itself).

    Otherwise the mean, which is large, decides which latents fire first: many never do again.

    Args:
        mean_X: mean of harvested rows, raw.
    """
    rows = all_rows(coder.wiring, mean_X[None])
    x_X = coder.scaled_read(rows.x_BX, rows.site_B).mean(0)
    y_Y = coder.scaled_write(rows.y_BY, rows.site_B).mean(0)
    _center_at(coder, x_X, y_Y)


@torch.no_grad()
def center_at_median(coder: Coder, sample_RX: Tensor) -> None:
    """As `center_biases`, with the geometric median of the rows, which outliers move less
    (Bricken et al. 2023; Gao et al. 2024).

    Args:
        sample_RX: harvested rows, raw.
    """
    rows = all_rows(coder.wiring, sample_RX)
    y_Y = geometric_median(coder.scaled_write(rows.y_BY, rows.site_B))
    if coder.wiring.read == coder.wiring.write and coder.site_code is None:
        x_X = y_Y
    else:
        x_X = geometric_median(coder.scaled_read(rows.x_BX, rows.site_B))
    _center_at(coder, x_X, y_Y)


def geometric_median(rows_RX: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to the rows [X], by Weiszfeld's iteration:
    c ← Σ x_r/‖x_r − c‖ / Σ 1/‖x_r − c‖, until a step changes the sum by less than `tolerance`."""
    center_X = rows_RX.mean(0)
    total = torch.inf
    for _ in range(steps):
        # A row at the centre itself would have infinite weight.
        far_R = (rows_RX - center_X).norm(dim=-1)
        if abs(total - float(far_R.sum())) <= tolerance * float(far_R.sum()):
            break
        total = float(far_R.sum())
        weight_R = 1 / far_R.clamp(min=1e-6 * max(total / len(far_R), 1e-30))
        center_X = weight_R @ rows_RX / weight_R.sum()
    return center_X


@torch.no_grad()
def set_firing_rate(coder: Coder, sample_RX: Tensor, rate: float) -> None:
    """b_enc = θ − quantile_{1−rate}(W_enc·x) per latent, so that it fires on `rate` of the rows
    (*Circuits Updates*, January 2025, where rate is 10,000/m). θ is 0 without thresholds.

    Exact on the sample: it cuts midway between the last value that shall fire and the next. Blocks
    of latents go one after another; there is never a matrix of rows × latents.

    Args:
        sample_RX: harvested rows, raw.

    Raises:
        UsageError: the rate is less than one row of the sample, or all of it.
    """
    rows = all_rows(coder.wiring, sample_RX)
    x_BX = coder.scaled_read(rows.x_BX, rows.site_B)
    fires = round(rate * len(x_BX))
    if not 0 < fires < len(x_BX):
        raise UsageError(
            f"coder.firing_rate ({rate}) is {rate * len(x_BX):.2g} of the {len(x_BX)} rows that it "
            "is set from, and must be at least one and not all. Raise --fit.calibration-tokens."
        )
    coder.b_enc.zero_()
    if isinstance(coder.activation, JumpReLU):
        coder.b_enc.copy_(coder.activation.thresholds(coder))
    if coder.center:
        x_BX = x_BX - coder.b_dec
    size = max(1, BLOCK_BYTES // (x_BX.element_size() * len(x_BX)))
    for group, span, W_LX in zip(
        coder.wiring.groups, coder.wiring.slices, coder.W_enc, strict=True
    ):
        mine_XB = x_BX[:, coder.wiring.read.columns(group.reads).to(x_BX.device)].T
        cuts = [_cut(block_LX @ mine_XB, fires) for block_LX in W_LX.split(size)]
        coder.b_enc[span] -= torch.cat(cuts)


def _cut(pre_LB: Tensor, fires: int) -> Tensor:
    """Per latent, the value that `fires` of the rows exceed."""
    largest_LK = pre_LB.topk(fires + 1).values
    return (largest_LK[:, -2] + largest_LK[:, -1]) / 2


def _center_at(coder: Coder, x_X: Tensor, y_Y: Tensor) -> None:
    """b_dec = y; and x, unless the coder subtracts b_dec itself, gives a pre-activation of 0."""
    coder.b_dec.copy_(y_Y)
    coder.b_enc.zero_()
    if not coder.center:
        coder.b_enc.copy_(-coder.preactivations(x_X[None]).float()[0])
    if coder.b_mag is not None:  # Gated: the path of magnitudes has a bias of its own
        coder.b_mag.copy_(coder.b_enc)


Bias = Literal["mean", "geometric_median", "zero"]
"""Where a coder's biases start."""

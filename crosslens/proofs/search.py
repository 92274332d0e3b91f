"""What the checker need not trust: hints found by looking at the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def low_rank(weights: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Factors `left` [N, R] and `right` [R, P] near W_out W_U, by the singular values.

    A model that adds modulo p writes its answer along a few pairs of waves, so that few suffice.
    Columns are first centred over the answers: what all logits share decides nothing. A constant
    row of `right` puts it back.
    """
    read = weights["W_out"].double() @ weights["W_U"].double()
    shared = read.mean(1, keepdim=True)
    left, size, right = torch.linalg.svd(read - shared, full_matrices=False)
    kept = slice(0, max(rank - 1, 0))
    ones = torch.ones(1, read.shape[1], dtype=torch.float64)
    return {
        "left": torch.cat([left[:, kept] * size[kept], shared], 1).contiguous(),
        "right": torch.cat([right[kept], ones]).contiguous(),
    }

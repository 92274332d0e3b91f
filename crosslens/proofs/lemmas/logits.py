"""From an error in the logits to accuracy and loss."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslens.proofs.rounding import exp_up, log_up, norm_up, product_up, sum_up, up


def margin_correct(
    logits: Float[Tensor, "n V"], error: Float[Tensor, "n V"], label: Int[Tensor, n]
) -> Tensor:
    """True only where every z within `error` of `logits` is largest at `label`, and only there.

    Proof. z_label ≥ fl↓(ẑ − r)_label > fl↑(ẑ + r)_v ≥ z_v for every other v. A NaN is not greater.
    """
    low, high = margin_ends(logits, error, label)
    return low > high.amax(-1)


def loss_up(
    logits: Float[Tensor, "n V"], error: Float[Tensor, "n V"], label: Int[Tensor, n]
) -> Float[Tensor, n]:
    """At least the cross-entropy in nats: log(1 + Σ_{v≠y} exp(ẑ_v + r_v − ẑ_y + r_y)).

    Proof. −log softmax(z)_y = log Σ_v exp(z_v − z_y), which grows with every z_v − z_y.
    """
    low, high = margin_ends(logits, error, label)
    others = sum_up(exp_up(up(high - low[:, None])))
    return log_up(up(1 + others))


def margin_ends(logits: Tensor, error: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """At most z_y, and at least z_v, where v = y stands at −∞."""
    at = label[:, None]
    low = torch.nextafter(
        (logits - error).gather(1, at)[:, 0], torch.tensor(-torch.inf, dtype=logits.dtype)
    )
    return low, up(logits + error).scatter(1, at, -torch.inf)


def loss_cap(widest: Float[Tensor, ""], vocabulary: int) -> Float[Tensor, ""]:
    """At least the loss of any input, where |z_v − z_w| ≤ widest for all v, w:
    log(1 + (V − 1) e^widest).

    Proof. Each of the V − 1 other terms of log Σ exp(z_v − z_y) is at most e^widest; the sum is
    factored, so that no exponential overflows: widest + log(e^−widest + V − 1).
    """
    rest = torch.tensor(float(vocabulary - 1), dtype=torch.float64)
    return up(widest + log_up(up(exp_up(-widest) + rest)))


def widest_up(W_U_DV: Float[Tensor, "D V"], largest_row: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """At least |z_v − z_w| for z = W_Uᵀ x, ‖x‖ ≤ largest_row: that times max ‖u_v − u_w‖.

    Rows of a normalised stream have norm at most √D, which makes a cap from weights alone.
    """
    columns = W_U_DV.double().T
    apart = max(norm_up(up((columns - one).abs())).max() for one in columns)
    return product_up(largest_row, apart)

"""What keeps a code sparse, before weights. Each is a mean over rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.functional.blocks import sum_rows
from crosslens.functional.code import Code, SparseCode, sum_by_latent, sum_entries


def l1_of_norms(code: Code, norm_L: Float[Tensor, " l"]) -> Float[Tensor, ""]:
    """mean_b Σ_l f_l n_l.

    With n_l = Σ_s ‖W_dec[l, s]‖ it is the penalty of crosscoders (Anthropic, October 2024); the
    sum over sites is what lets latents of one site or one model appear. With n_l the norm of the
    concatenation, that of cross-layer transcoders.
    """
    return sum_entries(lambda z, n: z * n, code, norm_L) / len(code)


def tanh_of_norms(
    code: Code,
    norm_L: Float[Tensor, " l"],
    weight_L: Float[Tensor, " l"],
    c: float,
) -> Float[Tensor, ""]:
    """mean_b Σ_l w_l tanh(c f_l n_l) (*Circuits Updates*, Anthropic, January 2025)."""
    total = sum_entries(lambda z, n, w: torch.tanh(z * n) * w, code, c * norm_L, weight_L)
    return total / len(code)


def tanh_frequency(code: Code, norm_L: Float[Tensor, " l"], c: float) -> Float[Tensor, " l"]:
    """p̂_l = mean_b tanh(c f_l n_l): about how often each latent fires."""
    return sum_by_latent(lambda z, n: torch.tanh(z * n), code, c * norm_L) / len(code)


def quadratic_frequency(frequency_L: Float[Tensor, " l"], scale: float) -> Float[Tensor, ""]:
    """Σ_l p_l (1 + p_l/s): like Σ p for rare latents, and quadratic beyond the scale s.

    OpenMOSS's *tanh-quadratic* loss where p is `tanh_frequency` (2509.17196, eq. 9; Llamascopium,
    `sparsity_loss_type="tanh-quad"`).
    """
    return (frequency_L * (1 + frequency_L / scale)).sum()


def preactivation_gap(
    pre_BL: Float[Tensor, "b l"],
    threshold_L: Float[Tensor, " l"],
    norm_L: Float[Tensor, " l"],
) -> Float[Tensor, ""]:
    """mean_b Σ_l ReLU(θ_l − pre_l) n_l, on pre-activations of all latents, so that those that
    never fire learn too (*Circuits Updates*, Anthropic, January 2025)."""
    total = sum_rows(
        lambda pre, theta, n: (torch.relu(theta - pre) @ n).sum(), pre_BL, threshold_L, norm_L
    )
    return total / len(pre_BL)


def power_of_norms(code: Code, norm_L: Float[Tensor, " l"], p: float) -> Float[Tensor, ""]:
    """mean_b Σ_l |f_l n_l|^p, 0 < p ≤ 1 (p-annealing; Karvonen et al. 2024, 2408.00113).

    The slope at 0 is infinite for p < 1; latents that do not fire get none.
    """

    def power(z: Tensor, norm: Tensor) -> Tensor:
        score = (z * norm).abs()
        active = score > 0
        return score.where(active, 1.0).pow(p).where(active, 0.0)

    return sum_entries(power, code, norm_L) / len(code)


def rectified_l1(
    pre: Float[Tensor, "b l"] | SparseCode, norm_L: Float[Tensor, " l"]
) -> Float[Tensor, ""]:
    """mean_b Σ_l ReLU(π_l) n_l of the gate's pre-activations (Rajamanoharan et al. 2024, Gated
    SAEs, eq. 8, whose decoders have norm 1)."""
    if isinstance(pre, SparseCode):
        pre = replace(pre, values_N=pre.pre_N)
    return sum_entries(lambda pi, n: torch.relu(pi) * n, pre, norm_L) / len(pre)

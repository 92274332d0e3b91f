"""What the parts of a row do to it by way of the norm's scalar."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.interactions.neurons.contributions import SiteChunk
from crosslens.kernels import products


def through_scalar(chunk: SiteChunk) -> Float[Tensor, " r"]:
    """Σ_i |ρ_i| per token, ρ_i = scalar² a_i ⟨x, d_i⟩ / D the share of latent i (of the biases, of
    the error) in the row's mean square: −∂ log scalar / ∂ log a_i."""
    one = chunk.effective
    if one.norm is None:
        return torch.zeros_like(chunk.scalar_R)
    along_E = products(chunk.lists, chunk.input_RD, one.decoder_LD) * chunk.value_E
    along_R = torch.zeros_like(chunk.scalar_R)
    along_R.index_add_(0, chunk.lists.items_N, along_E.abs())
    along_R += (chunk.input_RD @ one.bias_D).abs()
    along_R += (chunk.input_RD * chunk.missed_RD).sum(-1).abs()
    return along_R * chunk.scalar_R.square() / chunk.input_RD.shape[1]

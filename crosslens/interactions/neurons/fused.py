"""The sums of exact interactions by one kernel, which computes every latent's own part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crosslens.interactions.neurons.contributions import Branch, Effective, SiteChunk
from crosslens.interactions.neurons.scalar import through_scalar
from crosslens.kernels import neurons as kernel
from crosslens.kernels.pairs import takes


@dataclass(frozen=True, eq=False)
class Fused:
    """One site's neurons as the kernel is given them."""

    effective: Effective

    @property
    def takes(self) -> bool:
        """Whether there is a kernel for it."""
        return takes(self.effective.value.E_LN)

    @cached_property
    def _reach_L(self) -> Tensor:
        low_L, high_L = (self.effective.gate or self.effective.value).E_LN.aminmax(dim=1)
        return torch.maximum(-low_L, high_L)

    def sums(self, chunk: SiteChunk) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Over some tokens: `SiteInteraction`'s sums per neuron but for the weight, in float64; and
        per token the interaction and the mass, weighed."""
        asked = kernel.Asked(
            kind=self.effective.mlp.kind,
            lists=chunk.lists,
            weight_E=chunk.weight_E,
            reach_L=self._reach_L,
            scalar_R=chunk.scalar_R,
            through_R=through_scalar(chunk),
            w_N=self.effective.out_norm_N,
        )
        value, gate = (
            None if branch is None else _reaching(branch, chunk)
            for branch in (self.effective.value, self.effective.gate)
        )
        assert value is not None
        sums_SN, made_R, mass_R = kernel.interaction_sums(asked, value, gate)
        return dict(zip(kernel.SUMS, sums_SN, strict=True)), made_R, mass_R


def _reaching(branch: Branch, chunk: SiteChunk) -> kernel.Reaching:
    return kernel.Reaching(
        E_LN=branch.E_LN,
        moving_N=branch.moving_N,
        fixed_N=branch.fixed_N,
        error_RN=chunk.error(branch),
    )

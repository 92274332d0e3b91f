"""How large each latent's decoder is in either model, in each published convention, named apart.

In all of them 0 means that only `a` has the latent, 1 that only `b` has it, 1/2 that both do alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from crosslens.coder import Coder, dense_decoder
from crosslens.diffing.pair import Pair
from crosslens.errors import UsageError
from crosslens.lm import split_site


def relative_norm(a: Float[Tensor, "*n"], b: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """r = ‖d_b‖ / (‖d_a‖ + ‖d_b‖) of decoder norms (Kissane et al. 2024); NaN where both are 0."""
    return b / (a + b)


def norm_difference(a: Float[Tensor, "*n"], b: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Δ = ½(1 + (‖d_b‖ − ‖d_a‖) / max(‖d_a‖, ‖d_b‖)) of decoder norms (Minder et al. 2025,
    2504.02922); NaN where both are 0. Not r: r = .7 is Δ = .786, Δ = .9 is r = .833."""
    return (1 + (b - a) / torch.maximum(a, b)) / 2


def from_published_difference(dec_norm_diff: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Column `dec_norm_diff` of Minder et al.'s tables → Δ as their paper has it: the tables have
    it the other way round, 0 being chat-only. Its own inverse."""
    return 1 - dec_norm_diff


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Decoders of two models compared, latent by latent, in scaled units."""

    places: tuple[str, ...]
    """The sites compared, without their model."""
    a_L: Float64[Tensor, " l"]
    """‖d_a‖ over all sites of the model side by side."""
    b_L: Float64[Tensor, " l"]
    cosine_L: Float64[Tensor, " l"]
    """cos(d_a, d_b); NaN where the widths differ or one of them is 0."""
    a_LP: Float64[Tensor, "l p"]
    """The same, site by site."""
    b_LP: Float64[Tensor, "l p"]
    cosine_LP: Float64[Tensor, "l p"]

    @property
    def relative_norm_L(self) -> Tensor:
        """r of each latent."""
        return relative_norm(self.a_L, self.b_L)

    @property
    def norm_difference_L(self) -> Tensor:
        """Δ of each latent."""
        return norm_difference(self.a_L, self.b_L)

    @property
    def relative_norm_LP(self) -> Tensor:
        """r of each latent at each site."""
        return relative_norm(self.a_LP, self.b_LP)


def norms_of(pair: Pair) -> Norms:
    """Norms and cosines of all latents; looks at weights only."""
    a_LX, b_LY = pair.decoders()
    write = pair.coder.wiring.write
    layout_a, layout_b = write.pick(pair.sites_a), write.pick(pair.sites_b)
    parts_a = torch.split(a_LX, list(layout_a.widths), dim=-1)
    parts_b = torch.split(b_LY, list(layout_b.widths), dim=-1)
    cosines = [cosines_of_rows(a, b) for a, b in zip(parts_a, parts_b, strict=True)]
    whole_L = cosines_of_rows(a_LX, b_LY)
    return Norms(
        places=tuple(split_site(site)[1] for site in pair.sites_a),
        a_L=_norms(a_LX),
        b_L=_norms(b_LY),
        cosine_L=whole_L if pair.same_width else torch.full_like(whole_L, torch.nan),
        a_LP=torch.stack([_norms(part) for part in parts_a], -1),
        b_LP=torch.stack([_norms(part) for part in parts_b], -1),
        cosine_LP=torch.stack(cosines, -1),
    )


@dataclass(frozen=True, kw_only=True)
class NormShares:
    """Each model's share in each latent, for any number of models."""

    models: tuple[str, ...]
    norm_LM: Float64[Tensor, "l m"]

    @property
    def share_LM(self) -> Tensor:
        """RelDec_m = ‖d^m‖ / Σ_m ‖d^m‖ (2509.05291); of two models, 1 − r and r."""
        return self.norm_LM / self.norm_LM.sum(-1, keepdim=True)


def norm_shares(coder: Coder, models: Sequence[str] = ()) -> NormShares:
    """Decoder norms per model, over all sites of a model side by side, in scaled units.

    Args:
        models: which, in this order; all that the coder writes if none is named.

    Raises:
        UsageError: the coder does not write one of them.
    """
    write = coder.wiring.write
    owner = {site: split_site(site)[0] for site in write.sites}
    known = [name for name in dict.fromkeys(owner.values()) if name is not None]
    missing = [name for name in models if name not in known]
    if missing or not known:
        raise UsageError(
            f"The coder writes sites of {', '.join(known) or 'no named model'}; there are no "
            f"decoders of {', '.join(missing) or 'several models'} to compare."
        )
    names = tuple(models) or tuple(known)
    W_LY = dense_decoder(coder)
    sites = [[site for site in write.sites if owner[site] == name] for name in names]
    norms = [_norms(W_LY[:, write.columns(own).to(W_LY.device)]) for own in sites]
    return NormShares(models=names, norm_LM=torch.stack(norms, -1))


def cosines_of_rows(a_LX: Tensor, b_LY: Tensor) -> Tensor:
    """cos of each row of one matrix with the same row of another [L], float64 on the CPU; NaN
    where they differ in width or one is 0."""
    if a_LX.shape[1] != b_LY.shape[1]:
        return torch.full((len(a_LX),), torch.nan, dtype=torch.float64)
    dot_L = (a_LX * b_LY).sum(-1, dtype=torch.float64).cpu()
    return dot_L / (_norms(a_LX) * _norms(b_LY))


def _norms(W_LX: Tensor) -> Tensor:
    norm_L: Tensor = torch.linalg.vector_norm(W_LX, dim=-1, dtype=torch.float64).cpu()
    return norm_L

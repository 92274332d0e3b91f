"""The one sparse coder: rows in → sparse code → rows out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosslens.coder.activations import (
    Activation,
    check_calibrated,
    check_fits,
    initial_threshold,
)
from crosslens.coder.layout import Wiring


@dataclass(frozen=True)
class Pass:
    """All that one training step shows to the terms of the objective, in scaled units."""

    target_BY: Tensor
    recon_BY: Tensor
    pre_BL: Tensor
    z_BL: Tensor
    coder: Coder
    dead_L: Tensor | None = None
    """Latents that have not fired for long (bool)."""
    progress: float = 1.0
    """Share of the run that is done, in [0, 1]."""


class Coder(nn.Module):
    """z = σ(W_enc·(s_in ⊙ x) + b_enc),  x̂ = (W_decᵀ z + b_dec) ⊘ s_out.

    A row `x_BX` holds the raw activations of all sites read, side by side (`wiring.read`); `s` is
    one scale per site. A latent is a row of `W_enc` and of `W_dec`. There is one weight block per
    group of latents, so a latent that does not touch a site has no weight for it.

    Folding moves the scales into the weights: the same function, without the scales.
    """

    def __init__(self, wiring: Wiring, activation: Activation) -> None:
        super().__init__()
        check_fits(activation, wiring.n_latents)
        self.wiring = wiring
        self.activation = activation
        self.folded = False
        self.compute_dtype: torch.dtype | None = None
        """Format of the large products; None is that of the weights."""
        read, write, n_latents = wiring.read, wiring.write, wiring.n_latents
        self.W_enc = nn.ParameterList(
            torch.zeros(g.n_latents, read.pick(g.reads).width) for g in wiring.groups
        )
        self.W_dec = nn.ParameterList(
            torch.zeros(g.n_latents, write.pick(g.writes).width) for g in wiring.groups
        )
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(write.width))
        threshold = initial_threshold(activation, n_latents)
        self.threshold: Tensor | None
        if threshold is not None and threshold.dim() == 1:
            self.threshold = nn.Parameter(threshold)
        else:
            self.register_buffer("threshold", threshold)
        self.scale_read: Tensor
        self.scale_write: Tensor
        self.register_buffer("scale_read", torch.ones(len(read.sites)))
        self.register_buffer("scale_write", torch.ones(len(write.sites)))

    def encode(self, x_BX: Float[Tensor, "b x"]) -> Float[Tensor, "b l"]:
        """Raw activations → code, with the stored threshold in `eval` mode."""
        if not self.training:
            check_calibrated(self.activation, self.threshold)
        return self.activate(self.preactivations(self.scaled_read(x_BX)))

    def decode(self, z_BL: Float[Tensor, "b l"]) -> Float[Tensor, "b y"]:
        """Code → raw activations at the sites written."""
        return self.unscaled_write(self.decode_scaled(z_BL) + self.b_dec)

    def forward(self, x_BX: Float[Tensor, "b x"]) -> Float[Tensor, "b y"]:
        """Raw activations at the sites read → their reconstruction at the sites written."""
        return self.decode(self.encode(x_BX))

    def train_pass(
        self,
        x_BX: Float[Tensor, "b x"],
        y_BY: Float[Tensor, "b y"],
        dead_L: Tensor | None = None,
        progress: float = 1.0,
    ) -> Pass:
        """One pass over raw rows with all that the objective's terms may need."""
        pre_BL = self.preactivations(self.scaled_read(x_BX))
        z_BL = self.activate(pre_BL)
        recon_BY = self.decode_scaled(z_BL).float() + self.b_dec
        target_BY = y_BY.float() * self.wiring.write.spread(self.scale_write)
        return Pass(target_BY, recon_BY, pre_BL, z_BL, self, dead_L, progress)

    def preactivations(self, x_BX: Float[Tensor, "b x"]) -> Float[Tensor, "b l"]:
        """W_enc·x + b_enc of scaled rows."""
        x_BX = x_BX.to(self._product_dtype)
        parts = []
        for group, W_LX in zip(self.wiring.groups, self.W_enc, strict=True):
            read_BX = self._columns(x_BX, self.wiring.read.sites, group.reads)
            parts.append(read_BX @ W_LX.to(self._product_dtype).T)
        pre_BL = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return pre_BL + self.b_enc.to(pre_BL.dtype)

    def activate(self, pre_BL: Float[Tensor, "b l"]) -> Float[Tensor, "b l"]:
        """σ of pre-activations."""
        return self.activation(pre_BL, self.decoder_norms().detach().sum(-1), self)

    def decode_scaled(
        self, z_BL: Float[Tensor, "b l"], latents_L: Tensor | None = None
    ) -> Float[Tensor, "b y"]:
        """W_decᵀ z, scaled and without the bias.

        With `latents_L` (ascending numbers), the columns of `z_BL` are those latents only.
        """
        z_BL = z_BL.to(self._product_dtype)
        write = self.wiring.write
        out_BY = z_BL.new_zeros(()) if latents_L is None else z_BL.new_zeros(len(z_BL), write.width)
        for group, span, W_LY in zip(
            self.wiring.groups, self.wiring.slices, self.W_dec, strict=True
        ):
            if latents_L is None:
                mine_BL = z_BL[:, span]
            else:
                inside = (latents_L >= span.start) & (latents_L < span.stop)
                mine_BL, W_LY = z_BL[:, inside], W_LY[latents_L[inside] - span.start]
            part_BY = mine_BL @ W_LY.to(self._product_dtype)
            out_BY = out_BY + self._placed(part_BY, group.writes)
        return out_BY

    def decoder_norms(self) -> Float[Tensor, "l p"]:
        """‖W_dec[l, s]‖ per latent and site written, in scaled units (folded or not)."""
        write = self.wiring.write
        rows = []
        for group, W_LY in zip(self.wiring.groups, self.W_dec, strict=True):
            layout = write.pick(group.writes)
            found = dict(zip(layout.sites, W_LY.split(layout.widths, dim=-1), strict=True))
            silent_L = W_LY.new_zeros(group.n_latents)
            norms = [
                found[site].norm(dim=-1) if site in found else silent_L for site in write.sites
            ]
            rows.append(torch.stack(norms, -1))
        norm_LP = torch.cat(rows)
        return norm_LP * self.scale_write if self.folded else norm_LP

    def scaled_read(self, x_BX: Float[Tensor, "b x"]) -> Float[Tensor, "b x"]:
        """Rows in the units that the weights expect."""
        return self._times(x_BX, None if self.folded else self.wiring.read.spread(self.scale_read))

    def unscaled_write(self, y_BY: Float[Tensor, "b y"]) -> Float[Tensor, "b y"]:
        """What the decoder gives, back in the model's units."""
        write = self.wiring.write
        return self._times(y_BY, None if self.folded else 1 / write.spread(self.scale_write))

    @property
    def _product_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.b_dec.dtype

    @staticmethod
    def _times(rows: Tensor, factor: Tensor | None) -> Tensor:
        return rows.float() if factor is None else rows.float() * factor

    def _placed(self, part_BY: Tensor, sites: tuple[str, ...]) -> Tensor:
        """Columns of some sites at their places in a whole row, zero elsewhere."""
        write = self.wiring.write
        if sites == write.sites:
            return part_BY
        blank_BY = part_BY.new_zeros(part_BY.shape[0], write.width)
        return blank_BY.index_copy(-1, write.columns(sites).to(part_BY.device), part_BY)

    def _columns(self, x_BX: Tensor, sites: tuple[str, ...], wanted: tuple[str, ...]) -> Tensor:
        if wanted == sites:
            return x_BX
        return x_BX[:, self.wiring.read.columns(wanted).to(x_BX.device)]

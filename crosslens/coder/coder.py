"""The one sparse coder: rows in → sparse code → rows out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosslens.coder.activations import (
    KEPT,
    Activation,
    activation_parameters,
    check_calibrated,
    check_fits,
)
from crosslens.coder.layout import Group, Wiring
from crosslens.coder.rows import Rows
from crosslens.errors import UsageError


@dataclass(frozen=True)
class Pass:
    """All that one training step shows to the terms of the objective, in scaled units."""

    target_BY: Tensor
    recon_BY: Tensor
    pre_BL: Tensor
    z_BL: Tensor
    coder: Coder
    skipped_BY: Tensor | None = None
    """What the linear skip contributed to `recon_BY`, if there is one."""
    dead_L: Tensor | None = None
    """Latents that have not fired for long (bool)."""
    progress: float = 1.0
    """Share of the run that is done, in [0, 1]."""


class Coder(nn.Module):
    """z = σ(W_enc·(s_in ⊙ x) + b_enc),  x̂ = (W_decᵀ z + b_dec) ⊘ s_out.

    A row `x_BX` holds the raw activations of all sites read, side by side (`wiring.read`); `s` is
    one scale per site. A latent is a row of `W_enc` and of `W_dec`. There is one weight block per
    group of latents, so a latent that does not touch a site has no weight for it. A group may
    also have a linear skip, + W_skip·(s_in ⊙ x).

    With `center`, b_dec is subtracted from the scaled input first (Gao et al. 2024). Where rows
    are (token, site) pairs, a code of the site is added to the scaled input, and the scale is that
    of the row's site.

    Folding moves the scales into the weights: the same function, without the scales.
    """

    threshold: Tensor | None
    log_threshold: Tensor | None
    r_mag: Tensor | None
    b_mag: Tensor | None
    scale_read: Tensor
    scale_write: Tensor
    site_code: Tensor | None

    def __init__(self, wiring: Wiring, activation: Activation, *, center: bool = False) -> None:
        super().__init__()
        check_fits(activation, wiring.n_latents)
        if center and wiring.read != wiring.write:
            raise UsageError(
                "Centering subtracts the decoder bias from the input, so a coder that does it "
                "must write the sites that it reads."
            )
        self.wiring = wiring
        self.activation = activation
        self.center = center
        self.folded = False
        self.progress = 1.0
        """Share of the training that is done; annealed activations look at it."""
        self.compute_dtype: torch.dtype | None = None
        """Format of the large products; None is that of the weights."""
        self._add_weights()
        n_read, n_write = len(wiring.read.sites), len(wiring.write.sites)
        self.register_buffer("scale_read", torch.ones(wiring.n_codes or n_read))
        self.register_buffer("scale_write", torch.ones(wiring.n_codes or n_write))
        code_PD = sinusoids(wiring.n_codes, wiring.read.width) if wiring.n_codes else None
        if code_PD is not None and wiring.learnt_code:
            self.site_code = nn.Parameter(torch.zeros_like(code_PD))
        else:
            self.register_buffer("site_code", code_PD)

    def _add_weights(self) -> None:
        wiring = self.wiring
        widths = [
            (g, wiring.read.pick(g.reads).width, wiring.write.pick(g.writes).width)
            for g in wiring.groups
        ]
        self.W_enc = nn.ParameterList(torch.zeros(g.n_latents, x) for g, x, _ in widths)
        self.W_dec = nn.ParameterList(torch.zeros(g.n_latents, y // g.copies) for g, _, y in widths)
        skips = {str(i): torch.zeros(y, x) for i, (g, x, y) in enumerate(widths) if g.skip}
        self.W_skip = nn.ParameterDict(skips)
        self.b_enc = nn.Parameter(torch.zeros(wiring.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(wiring.write.width))
        kept = activation_parameters(self.activation, wiring.n_latents)
        for name in KEPT:
            value, learnt = kept.get(name, (None, False))
            if learnt:
                assert value is not None
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def encode(
        self, x_BX: Float[Tensor, "b x"], site_B: Tensor | None = None
    ) -> Float[Tensor, "b l"]:
        """Raw activations → code, with the stored threshold in `eval` mode.

        Args:
            site_B: which harvested site each row is of; only where rows are (token, site) pairs.
        """
        if not self.training:
            check_calibrated(self.activation, self.threshold)
        return self.activate(self.preactivations(self.scaled_read(x_BX, site_B)))

    def decode(
        self,
        z_BL: Float[Tensor, "b l"],
        x_BX: Float[Tensor, "b x"] | None = None,
        site_B: Tensor | None = None,
    ) -> Float[Tensor, "b y"]:
        """Code → raw activations at the sites written; a skip also needs what was read."""
        out_BY = self.decode_scaled(z_BL) + self.b_dec
        skipped_BY = self.skip(None if x_BX is None else self.scaled_read(x_BX, site_B))
        return self.unscaled_write(out_BY if skipped_BY is None else out_BY + skipped_BY, site_B)

    def forward(
        self, x_BX: Float[Tensor, "b x"], site_B: Tensor | None = None
    ) -> Float[Tensor, "b y"]:
        """Raw activations at the sites read → their reconstruction at the sites written."""
        return self.decode(self.encode(x_BX, site_B), x_BX, site_B)

    def train_pass(self, rows: Rows, dead_L: Tensor | None = None, progress: float = 1.0) -> Pass:
        """One pass over raw rows with all that the objective's terms may need."""
        self.progress = progress
        x_BX = self.scaled_read(rows.x_BX, rows.site_B)
        pre_BL = self.preactivations(x_BX)
        z_BL = self.activate(pre_BL)
        recon_BY = self.decode_scaled(z_BL).float() + self.b_dec
        skipped_BY = self.skip(x_BX)
        if skipped_BY is not None:
            recon_BY = recon_BY + skipped_BY.float()
        target_BY = self.scaled_write(rows.y_BY, rows.site_B)
        return Pass(target_BY, recon_BY, pre_BL, z_BL, self, skipped_BY, dead_L, progress)

    def preactivations(self, x_BX: Float[Tensor, "b x"]) -> Float[Tensor, "b l"]:
        """W_enc·x + b_enc of scaled rows."""
        if self.center:
            x_BX = x_BX - self.b_dec  # both scaled, or both raw when folded
        parts = [
            self._read(x_BX, group) @ W_LX.to(self._product_dtype).T
            for group, W_LX in zip(self.wiring.groups, self.W_enc, strict=True)
        ]
        pre_BL = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return pre_BL + self.b_enc.to(pre_BL.dtype)

    def activate(self, pre_BL: Float[Tensor, "b l"]) -> Float[Tensor, "b l"]:
        """σ of pre-activations."""
        return self.activation(pre_BL, self.decoder_norms().detach().sum(-1), self)

    def skip(self, x_BX: Float[Tensor, "b x"] | None) -> Tensor | None:
        """The linear skips' output [B, Y] for scaled rows; None where there is no skip."""
        if not len(self.W_skip):
            return None
        if x_BX is None:
            raise UsageError("This coder has a linear skip: decoding needs the rows it read, too.")
        parts = [
            self._placed(self._read(x_BX, group) @ W_YX.to(self._product_dtype).T, group.writes)
            for group, W_YX in self._skips()
        ]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def decode_scaled(
        self, z_BL: Float[Tensor, "b l"], latents_L: Tensor | None = None
    ) -> Float[Tensor, "b y"]:
        """W_decᵀ z, scaled, without bias and skip.

        With `latents_L` (ascending numbers), the columns of `z_BL` are those latents only.
        """
        groups = enumerate(zip(self.wiring.groups, self.wiring.slices, self.W_dec, strict=True))
        if latents_L is None:
            parts = [self.decode_run(z_BL[:, span], i) for i, (_, span, _) in groups]
        else:
            z_BL = z_BL.to(self._product_dtype)
            parts = []
            for _, (group, span, W_LY) in groups:
                inside = (latents_L >= span.start) & (latents_L < span.stop)
                mine_BL, W_LY = padded(z_BL[:, inside], W_LY, latents_L[inside] - span.start)
                part_BY = mine_BL @ W_LY.to(self._product_dtype)
                parts.append(self._placed(tiled(part_BY, group.copies), group.writes))
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def decode_run(
        self, z_BL: Float[Tensor, "b l"], group: int, start: int = 0, *, frozen: bool = False
    ) -> Float[Tensor, "b y"]:
        """W_decᵀ z, scaled, of consecutive latents of one group, from its `start`-th on: as many as
        `z_BL` has columns. No gradient reaches a `frozen` decoder."""
        spec = self.wiring.groups[group]
        W_LY = self.W_dec[group][start : start + z_BL.shape[-1]]
        if frozen:
            W_LY = W_LY.detach()
        part_BY = z_BL.to(self._product_dtype) @ W_LY.to(self._product_dtype)
        return self._placed(tiled(part_BY, spec.copies), spec.writes)

    def decoder_norms(self) -> Float[Tensor, "l p"]:
        """‖W_dec[l, s]‖ per latent and site written, in scaled units (folded or not)."""
        write = self.wiring.write
        rows = []
        for group, W_LY in zip(self.wiring.groups, self.W_dec, strict=True):
            layout = write.pick(group.writes)
            blocks = torch.split(tiled(W_LY, group.copies), list(layout.widths), dim=-1)
            found = dict(zip(layout.sites, blocks, strict=True))
            silent_L = W_LY.new_zeros(group.n_latents)
            norms = [
                found[site].norm(dim=-1) if site in found else silent_L for site in write.sites
            ]
            rows.append(torch.stack(norms, -1))
        norm_LP = torch.cat(rows)
        return norm_LP * self.scale_write if self.folded else norm_LP

    def scaled_read(
        self, x_BX: Float[Tensor, "b x"], site_B: Tensor | None = None
    ) -> Float[Tensor, "b x"]:
        """Rows in the units that the weights expect, with their site's code if they have one."""
        x_BX = x_BX.float()
        if not self.folded:
            x_BX = x_BX * self._scale(self.scale_read, site_B)
        return x_BX if self.site_code is None else x_BX + self.site_code[site_B]

    def scaled_write(
        self, y_BY: Float[Tensor, "b y"], site_B: Tensor | None = None
    ) -> Float[Tensor, "b y"]:
        """Raw rows at the sites written, in the decoder's units."""
        y_BY = y_BY.float()
        return y_BY if self.folded else y_BY * self._scale(self.scale_write, site_B, write=True)

    def unscaled_write(
        self, y_BY: Float[Tensor, "b y"], site_B: Tensor | None = None
    ) -> Float[Tensor, "b y"]:
        """What the decoder gives, back in the model's units."""
        y_BY = y_BY.float()
        return y_BY if self.folded else y_BY / self._scale(self.scale_write, site_B, write=True)

    def _scale(self, scale_P: Tensor, site_B: Tensor | None, write: bool = False) -> Tensor:
        """The factor of each column [X], or of each row [B, 1] where rows are of one site each."""
        if self.wiring.n_codes:
            if site_B is None:
                raise UsageError("This coder's rows are of one site each: say which (site_B).")
            return scale_P[site_B][:, None]
        return (self.wiring.write if write else self.wiring.read).spread(scale_P)

    @property
    def _product_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.b_dec.dtype

    def _skips(self) -> list[tuple[Group, Tensor]]:
        return [(self.wiring.groups[int(i)], W_YX) for i, W_YX in self.W_skip.items()]

    def _read(self, x_BX: Tensor, group: Group) -> Tensor:
        """The columns that a group reads, in the products' format."""
        read = self.wiring.read
        if group.reads != read.sites:
            x_BX = x_BX[:, read.columns(group.reads).to(x_BX.device)]
        return x_BX.to(self._product_dtype)

    def _placed(self, part_BY: Tensor, sites: tuple[str, ...]) -> Tensor:
        """Columns of some sites at their places in a whole row, zero elsewhere."""
        write = self.wiring.write
        if sites == write.sites:
            return part_BY
        blank_BY = part_BY.new_zeros(part_BY.shape[0], write.width)
        return blank_BY.index_copy(-1, write.columns(sites).to(part_BY.device), part_BY)


def tiled(value_BY: Tensor, copies: int) -> Tensor:
    """So many copies side by side; the tensor itself where there is one."""
    return value_BY if copies == 1 else value_BY.repeat(1, copies)


def padded(z_BL: Tensor, W_LY: Tensor, rows_L: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of z·W[rows], with zeros added up to the next power of two of rows.

    The number of dead latents changes from step to step, and a CPU's matrix library keeps some
    memory for each shape that it meets: without this, gigabytes in a few hundred steps.
    """
    n = len(rows_L)
    extra = (1 << (n - 1).bit_length()) - n if n else 0
    return nn.functional.pad(z_BL, (0, extra)), W_LY[nn.functional.pad(rows_L, (0, extra))]


def sinusoids(n: int, width: int) -> Tensor:
    """Position codes [n, width]: sin and cos of p / 10000^(i/width), i even (Vaswani et al. 2017;
    seed 003 uses them for layers)."""
    angle = torch.arange(n)[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]

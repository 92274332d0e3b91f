"""The one sparse coder: rows in → sparse code → rows out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosslens import functional as F
from crosslens.coder.activations import (
    KEPT,
    Activation,
    BatchTopK,
    activation_parameters,
    check_calibrated,
    check_fits,
)
from crosslens.coder.gathering import (
    Copies,
    RowGradients,
    decoded,
    decoded_columns,
    padded,
    product,
)
from crosslens.coder.layout import Group, Wiring
from crosslens.errors import UsageError


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
        self.sparse_below = 0.0
        """Training passes hold and multiply only the entries of codes that have a smaller share."""
        self.copies = Copies()
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

    def preactivations(self, x_BX: Float[Tensor, "b x"]) -> Float[Tensor, "b l"]:
        """W_enc·x + b_enc of scaled rows."""
        return self.multiplied(self.group_rows(x_BX))

    def group_rows(self, x_BX: Float[Tensor, "b x"]) -> tuple[Tensor, ...]:
        """What each group of latents reads of scaled rows, in the products' format."""
        if self.center:
            x_BX = x_BX - self.b_dec  # both scaled, or both raw when folded
        return tuple(self._read(x_BX, group) for group in self.wiring.groups)

    def multiplied(self, rows: Sequence[Tensor]) -> Float[Tensor, "b l"]:
        """W_enc·x + b_enc of what the groups read."""
        parts = [
            product(x_BX, W_LX, self.copies.of(W_LX, x_BX.dtype), turned=True)
            for x_BX, W_LX in zip(rows, self.W_enc, strict=True)
        ]
        pre_BL = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return pre_BL.add_(self.b_enc.to(pre_BL.dtype))

    def activate(self, pre_BL: Float[Tensor, "b l"]) -> Float[Tensor, "b l"]:
        """σ of pre-activations."""
        return self.activation(pre_BL, self.scores(), self)

    @torch.no_grad()
    def scores(self) -> Float[Tensor, " l"]:
        """What the activation weighs each latent by: its summed decoder norms, or nothing."""
        if isinstance(self.activation, BatchTopK):
            return self.decoder_norms().sum(-1)
        return torch.ones_like(self.b_enc)

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
        self,
        code: F.Code,
        latents_L: Tensor | None = None,
        gradients: RowGradients | None = None,
    ) -> Float[Tensor, "b y"]:
        """W_decᵀ z, scaled, without bias and skip.

        Args:
            latents_L: if given (ascending numbers), the columns of `code`, a tensor, are those
                latents only.
            gradients: where the backward pass leaves the decoder's, if not in `.grad`. A sparse
                code without it gives the decoder none.
        """
        if latents_L is None:
            runs = F.split_columns(code, [group.n_latents for group in self.wiring.groups])
            parts = [self.decode_run(run, i, gradients=gradients) for i, run in enumerate(runs)]
        else:
            assert isinstance(code, Tensor)
            parts = self._decoded_columns(code.to(self._product_dtype), latents_L, gradients)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def _decoded_columns(
        self, z_BL: Tensor, latents_L: Tensor, gradients: RowGradients | None
    ) -> list[Tensor]:
        parts = []
        for group, span, W_LY in zip(
            self.wiring.groups, self.wiring.slices, self.W_dec, strict=True
        ):
            inside = (latents_L >= span.start) & (latents_L < span.stop)
            rows_L = latents_L[inside] - span.start
            if gradients is None:
                mine_BL, W_LY = padded(z_BL[:, inside], W_LY, rows_L)
                part_BY = mine_BL @ W_LY.to(self._product_dtype)
            else:
                copy_LY = self.copies.of(W_LY, self._product_dtype)
                part_BY = decoded_columns(z_BL[:, inside], rows_L, W_LY, copy_LY, gradients)
            parts.append(self._placed(tiled(part_BY, group.copies), group.writes))
        return parts

    def decode_run(
        self,
        run: F.Code,
        group: int,
        start: int = 0,
        *,
        frozen: bool = False,
        gradients: RowGradients | None = None,
    ) -> Float[Tensor, "b y"]:
        """W_decᵀ z, scaled, of consecutive latents of one group, from its `start`-th on: as many as
        `run` has. No gradient reaches a `frozen` decoder."""
        spec, weights_LY = self.wiring.groups[group], self.W_dec[group]
        if isinstance(run, F.SparseCode):
            copy_LY = self.copies.of(weights_LY, self._product_dtype)
            to = None if frozen else gradients
            part_BY = decoded(run.renumbered(start), weights_LY, copy_LY, to)
        else:
            at = slice(start, start + run.shape[-1])
            W_LY = weights_LY.detach() if frozen else weights_LY
            copy_LY = self.copies.of(weights_LY, self._product_dtype)
            part_BY = product(run.to(copy_LY.dtype), W_LY[at], copy_LY[at], turned=False)
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


def sinusoids(n: int, width: int) -> Tensor:
    """Position codes [n, width]: sin and cos of p / 10000^(i/width), i even (Vaswani et al. 2017;
    seed 003 uses them for layers)."""
    angle = torch.arange(n)[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]

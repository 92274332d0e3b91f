"""Fill a new coder's weight matrices. Each way is its own configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.coder.coder import Coder
from crosslens.coder.layout import Group
from crosslens.coder.rows import Rows, all_rows
from crosslens.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Transpose:
    """Gaussian decoder directions of one norm at every site, W_enc = W_decᵀ (Anthropic, April
    2024)."""

    decoder_norm: float = 0.1
    """Norm of each latent's decoder at each site."""
    unit_gain: bool = False
    """Then scale the encoder so that random unit rows are reconstructed at norm 1 (Gao et al.)."""

    def __post_init__(self) -> None:
        _check_norm(self.decoder_norm)

    def __call__(self, coder: Coder, sample_RX: Tensor, generator: torch.Generator) -> None:
        """Fill `coder`; the rows of `sample_RX` are not looked at."""
        transpose_init(coder, self.decoder_norm, generator)
        if self.unit_gain:
            unit_gain(coder, generator)


@dataclass(frozen=True, kw_only=True)
class DataPoint:
    """Rows of the data, blended with noise: p·(x − μ) + (1 − p)·noise, W_dec = W_encᵀ (Anthropic,
    October 2025).

    Both are brought to norm 1 at each site first, which the page does not say: it makes p a share.
    Where a group writes other sites than it reads, its decoder comes from what the same row writes.
    """

    p: float = 0.8
    """Share of the data; published: 0.8 for an SAE, 0.4 for a weakly causal crosscoder."""
    decoder_norm: float = 0.1
    """Norm of each latent's decoder, and encoder, at each site."""

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise UsageError(f"coder.init.p is a share in [0, 1], found {self.p}.")
        _check_norm(self.decoder_norm)

    def __call__(self, coder: Coder, sample_RX: Tensor, generator: torch.Generator) -> None:
        """Fill `coder` from harvested rows `sample_RX`, raw; each serves once before any twice."""
        data_point_init(coder, sample_RX, self.p, self.decoder_norm, generator)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Entries drawn evenly from ±bound (Anthropic, January 2025; for wirings that write other
    sites than they read, March 2025)."""

    def __call__(self, coder: Coder, sample_RX: Tensor, generator: torch.Generator) -> None:
        """Fill `coder`; the rows of `sample_RX` are not looked at."""
        uniform_init(coder, generator)


InitConfig = Transpose | DataPoint | Uniform


@torch.no_grad()
def transpose_init(coder: Coder, decoder_norm: float, generator: torch.Generator) -> None:
    """Gaussian decoder directions, each (latent, site) block at `decoder_norm`; W_enc = W_decᵀ
    where a group reads and writes the same sites; biases 0.

    Anthropic, *Circuits Updates* April 2024 (one site) and crosscoders, October 2024. Groups that
    read other sites than they write get independent encoder directions of the same norm; a linear
    skip starts at 0.
    """
    _check_norm(decoder_norm)
    for group, W_enc, W_dec in zip(coder.wiring.groups, coder.W_enc, coder.W_dec, strict=True):
        _fill_directions(W_dec, stored_widths(coder, group), decoder_norm, generator)
        if group.reads == group.writes:
            W_enc.copy_(W_dec.repeat(1, group.copies))
        else:
            read = coder.wiring.read.pick(group.reads)
            _fill_directions(W_enc, read.widths, decoder_norm, generator)
    _zero_rest(coder)


@torch.no_grad()
def data_point_init(
    coder: Coder, sample_RX: Tensor, p: float, norm: float, generator: torch.Generator
) -> None:
    """Encoder rows p·(x − μ) + (1 − p)·noise with both parts, and the result, normalised per site;
    W_dec = W_encᵀ, or from y where other sites are written. Biases 0.

    Blending parts of one norm is our choice: the published formula [2nd hand] gives no scales, and
    Kaiming noise (OSU's saev, SohrabTa's crosscode) beside rows of norm √n would vanish.
    """
    rows = _scaled(coder, all_rows(coder.wiring, sample_RX))
    order_R = torch.randperm(len(rows.x_BX), generator=generator)
    repeats = -(-coder.wiring.n_latents // len(order_R))
    drawn_L = order_R.repeat(repeats)[: coder.wiring.n_latents]
    mean = Rows(rows.x_BX.mean(0), rows.y_BY.mean(0))
    for i, (group, span) in enumerate(zip(coder.wiring.groups, coder.wiring.slices, strict=True)):
        read, write = coder.wiring.read, coder.wiring.write
        mine = drawn_L[span]
        x_LX = (rows.x_BX[mine] - mean.x_BX)[:, read.columns(group.reads)]
        coder.W_enc[i].copy_(_blended(x_LX, read.pick(group.reads).widths, p, norm, generator))
        widths = stored_widths(coder, group)
        if group.reads == group.writes:
            whole_LY: Tensor = coder.W_enc[i]
        else:
            whole_LY = (rows.y_BY[mine] - mean.y_BY)[:, write.columns(group.writes)]
            whole_LY = _blended(whole_LY, write.pick(group.writes).widths, p, norm, generator)
        # What copies share is the mean over them.
        stored_LY = whole_LY.view(len(mine), group.copies, -1).mean(1)
        coder.W_dec[i].copy_(_normed(stored_LY, widths, norm))
    _zero_rest(coder)


@torch.no_grad()
def uniform_init(coder: Coder, generator: torch.Generator) -> None:
    """W_dec ~ U(±1/√n), W_enc = (n/m)·W_decᵀ (*Circuits Updates*, January 2025, with its erratum);
    or W_enc ~ U(±1/√m), W_dec ~ U(±1/√(L·d)) where other sites are written than read (cross-layer
    transcoders, *Circuit Tracing*, March 2025, as four implementations have it). Biases 0.

    n is the width of a whole row and m the number of latents; for the second, m is that of a
    group, and L·d the width of all that the coder writes.
    """
    wiring = coder.wiring
    reconstructs = all(group.reads == group.writes for group in wiring.groups)
    n, m = wiring.write.width, wiring.n_latents
    for group, W_enc, W_dec in zip(wiring.groups, coder.W_enc, coder.W_dec, strict=True):
        W_dec.copy_(_uniform(W_dec, n**-0.5, generator))
        if reconstructs:
            W_enc.copy_(n / m * W_dec.repeat(1, group.copies))
        else:
            W_enc.copy_(_uniform(W_enc, group.n_latents**-0.5, generator))
    _zero_rest(coder)


@torch.no_grad()
def unit_gain(coder: Coder, generator: torch.Generator) -> None:
    """Scale the encoder so that random rows of norm 1 come out at norm 1 on average, as the code of
    Gao et al. 2024 does. To be called while biases are 0."""
    wiring = coder.wiring
    if any(group.reads != group.writes for group in wiring.groups):
        raise UsageError("coder.init.unit_gain is for coders that write the sites that they read.")
    x_BX = torch.randn(256, wiring.read.width, generator=generator)
    x_BX /= x_BX.norm(dim=-1, keepdim=True)
    was_training = coder.training
    threshold = None if coder.threshold is None else coder.threshold.clone()
    code_BL = coder.train().activate(coder.preactivations(x_BX))
    recon_BY = coder.decode_scaled(code_BL)
    coder.train(was_training)
    if threshold is not None and coder.threshold is not None:
        coder.threshold.copy_(threshold)  # a running threshold must not learn from noise
    gain = recon_BY.norm(dim=-1).mean()
    if gain == 0:
        raise UsageError(
            "coder.init.unit_gain found that random rows make no latent fire; leave it off."
        )
    for W_enc in coder.W_enc:
        W_enc.div_(gain)


@torch.no_grad()
def share_start(coder: Coder, share: float) -> None:
    """Give that share of the latents of each group that writes two models the weights of the first
    model for the second, too: encoder and decoder, so that W_enc = W_decᵀ survives.

    Seed 004 shares decoders only. Latents whose decoder is stored once are as they were.

    Raises:
        UsageError: no group writes two models at sites of the same widths.
    """
    found = False
    for group, W_enc, W_dec in zip(coder.wiring.groups, coder.W_enc, coder.W_dec, strict=True):
        first = round(share * group.n_latents)
        if group.copies == 1 and _halves_match(coder, group.writes):
            found = True
            half = W_dec.shape[1] // 2
            W_dec[:first, half:] = W_dec[:first, :half]
            if _halves_match(coder, group.reads):
                half = W_enc.shape[1] // 2
                W_enc[:first, half:] = W_enc[:first, :half]
    if not found:
        raise UsageError(
            "coder.shared_start is for latents that write both models at sites of the same widths; "
            "this wiring has none."
        )


@torch.no_grad()
def zero_decoders(coder: Coder) -> None:
    """No latent writes anything: with a skip, the coder starts as a linear map, and the latents
    learn what it leaves (Dunefsky et al. 2024; Paulo et al. 2025)."""
    for weight in (*coder.W_dec, *coder.W_skip.values()):
        weight.zero_()


def stored_widths(coder: Coder, group: Group) -> tuple[int, ...]:
    """Widths of the sites that a group's decoder is stored for: one copy's."""
    write = coder.wiring.write.pick(group.writes)
    return write.widths[: len(write.widths) // group.copies]


def _check_norm(norm: float) -> None:
    if norm <= 0:
        raise UsageError(f"coder.init.decoder_norm must be positive, found {norm}.")


def _scaled(coder: Coder, rows: Rows) -> Rows:
    return Rows(
        coder.scaled_read(rows.x_BX, rows.site_B), coder.scaled_write(rows.y_BY, rows.site_B)
    )


def _fill_directions(
    weight_LY: Tensor, widths: tuple[int, ...], norm: float, generator: torch.Generator
) -> None:
    drawn_LY = torch.randn(weight_LY.shape, generator=generator)
    weight_LY.copy_(_normed(drawn_LY, widths, norm))


def _normed(rows_LX: Tensor, widths: tuple[int, ...], norm: float) -> Tensor:
    """Rows with each site's block at `norm`."""
    blocks = torch.split(rows_LX, list(widths), dim=-1)
    tiny = torch.finfo(rows_LX.dtype).tiny
    return torch.cat([norm * b / b.norm(dim=-1, keepdim=True).clamp(min=tiny) for b in blocks], -1)


def _blended(
    x_LX: Tensor, widths: tuple[int, ...], p: float, norm: float, generator: torch.Generator
) -> Tensor:
    noise_LX = torch.randn(x_LX.shape, generator=generator)
    blend_LX = p * _normed(x_LX, widths, 1.0) + (1 - p) * _normed(noise_LX, widths, 1.0)
    return _normed(blend_LX, widths, norm)


def _uniform(like: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(like.shape, generator=generator) - 1) * bound


def _halves_match(coder: Coder, sites: tuple[str, ...]) -> bool:
    """Whether `sites` are those of two models, of the same widths in the same order."""
    harvest, half = coder.wiring.harvest, len(sites) // 2
    if len(sites) != 2 * half or not set(sites) <= set(harvest.sites):
        return False
    picked = harvest.pick(sites)
    models = [site.rpartition("/")[0] for site in picked.sites]
    two = len(set(models[:half])) == len(set(models[half:])) == 1 and models[0] != models[-1]
    return two and picked.widths[:half] == picked.widths[half:]


def _zero_rest(coder: Coder) -> None:
    for weight in (*coder.W_skip.values(), coder.b_enc, coder.b_dec):
        weight.zero_()

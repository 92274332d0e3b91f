"""What a training does to weights besides stepping them: unit decoders, and fresh dead latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from crosslens.coder import Coder, Pass, Rows
from crosslens.coder.activations import activation_parameters
from crosslens.training.checkpoint import TrainState

ENCODER_SHARE = 0.2
"""Norm of a resampled encoder row, as a share of the mean over live ones (Bricken et al. 2023)."""


@torch.no_grad()
def renormalise_decoder(coder: Coder) -> None:
    """Bring each latent's decoder, over all sites it writes, to norm 1 (in scaled units)."""
    for norm_L, W_LY in _decoders(coder):
        W_LY.div_(norm_L[:, None])


@torch.no_grad()
def project_decoder_gradient(coder: Coder) -> None:
    """Take out of the decoder's gradient what would only change a latent's norm."""
    for _, W_LY in _decoders(coder):
        if W_LY.grad is not None:
            along_L = (W_LY.grad * W_LY).sum(-1) / W_LY.square().sum(-1).clamp(min=_tiny(W_LY))
            W_LY.grad.addcmul_(W_LY, along_L[:, None], value=-1)


@contextmanager
def as_saved(state: TrainState, unit_norm: bool) -> Iterator[Coder]:
    """Inside, the coder as it is saved and judged: averaged weights if there are such, decoders at
    norm 1 if they are held there; after, exactly what training goes on with."""
    coder = state.coder
    with state.optimizer.averaged():
        kept = [W_LY.detach().clone() for W_LY in coder.W_dec] if unit_norm else []
        if unit_norm:
            renormalise_decoder(coder)
        try:
            yield coder
        finally:
            with torch.no_grad():
                for W_LY, value in zip(coder.W_dec, kept, strict=False):
                    W_LY.copy_(value)


@torch.no_grad()
def resample(
    state: TrainState, rows: Rows, shown: Pass, dead_L: Tensor, generator: torch.Generator
) -> int:
    """Give dead latents a row of the batch to stand for, and forget their moments.

    Bricken et al. 2023 (appendix on resampling), for any wiring and with no ghost gradients: rows
    are drawn without replacement, the likelier the larger the square of their squared error. A
    latent's decoder becomes what the row writes beside the mean, at the mean norm of live
    decoders; its encoder what the row reads beside the mean, at a fifth of the mean live norm,
    with a bias that takes the mean out; a learnt threshold starts over.

    Returns:
        how many latents were given a row: as many as are dead, or as there are rows.
    """
    coder = state.coder
    x_BX = coder.scaled_read(rows.x_BX, rows.site_B)
    dead = dead_L.nonzero().squeeze(-1)[: len(x_BX)]
    if not len(dead):
        return 0
    drawn = _badly_reconstructed(shown, len(dead), generator)
    x_MX, y_MY = x_BX[drawn], shown.target_BY[drawn]
    middle = x_BX.mean(0), shown.target_BY.mean(0)
    for i, span in enumerate(coder.wiring.slices):
        mine = (dead >= span.start) & (dead < span.stop)
        if mine.any():
            live = (~dead_L[span]).nonzero().squeeze(-1)
            given = Rows(x_MX[mine], y_MY[mine])
            _refill(coder, i, dead[mine] - span.start, live, given, middle)
            for parameter in (coder.W_enc[i], coder.W_dec[i]):
                state.optimizer.forget(parameter, dead[mine] - span.start)
    _restart_others(state, dead)
    state.idle_L[dead] = 0
    return len(dead)


def _badly_reconstructed(shown: Pass, n: int, generator: torch.Generator) -> Tensor:
    error_B = (shown.target_BY - shown.recon_BY).square().sum(-1)
    chance_B = (error_B / error_B.max().clamp(min=_tiny(error_B))).square().clamp(min=1e-12)
    drawn = torch.multinomial(chance_B.double().cpu(), n, generator=generator)
    return drawn.to(error_B.device)


def _refill(
    coder: Coder, place: int, latents: Tensor, live: Tensor, given: Rows, middle: tuple[Tensor, ...]
) -> None:
    """New weights for some latents of one group (numbered within it), a row for each."""
    group, wiring = coder.wiring.groups[place], coder.wiring
    x_X, y_Y = middle
    reads, writes = wiring.read.columns(group.reads), wiring.write.columns(group.writes)
    W_enc, W_dec = coder.W_enc[place], coder.W_dec[place]
    live = live if len(live) else torch.arange(len(W_enc), device=latents.device)
    x_MX = _unit((given.x_BX - x_X)[:, reads]) * W_enc[live].norm(dim=-1).mean() * ENCODER_SHARE
    y_MY = (given.y_BY - y_Y)[:, writes].view(len(latents), group.copies, -1).mean(1)
    W_enc[latents] = x_MX
    W_dec[latents] = _unit(y_MY) * W_dec[live].norm(dim=-1).mean()
    taken_X = x_X - coder.b_dec if coder.center else x_X
    coder.b_enc[latents + wiring.slices[place].start] = -(x_MX @ taken_X[reads])


def _restart_others(state: TrainState, dead: Tensor) -> None:
    """Learnt thresholds and gates of the latents at their first values; no moments of the rest."""
    coder = state.coder
    state.optimizer.forget(coder.b_enc, dead)
    kept = activation_parameters(coder.activation, coder.wiring.n_latents)
    for name in (name for name, (_, learnt) in kept.items() if learnt):
        parameter: nn.Parameter = getattr(coder, name)
        # Gated: as at the start, both paths have the mean taken out.
        first_L = coder.b_enc if name == "b_mag" else kept[name][0].to(parameter.device)
        parameter[dead] = first_L[dead]
        state.optimizer.forget(parameter, dead)


def _decoders(coder: Coder) -> Iterator[tuple[Tensor, nn.Parameter]]:
    """Norm of each latent over all sites it writes [L], and the decoder as it is stored."""
    for group, W_LY in zip(coder.wiring.groups, coder.W_dec, strict=True):
        yield (W_LY.norm(dim=-1) * group.copies**0.5).clamp(min=_tiny(W_LY)), W_LY


def _unit(rows: Tensor) -> Tensor:
    norm: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / norm.clamp(min=_tiny(rows))


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny

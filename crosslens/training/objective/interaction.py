"""A term on how strongly latents interact at the MLPs that read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crosslens import functional as F
from crosslens.coder import (
    AbsTopK,
    Activation,
    Difference,
    LayerConditioned,
    Pass,
    RowGradients,
    TopK,
    Wiring,
    WiringConfig,
)
from crosslens.errors import UsageError
from crosslens.functional.gathers import Lists, starts_of
from crosslens.functional.interaction_penalty import (
    Active,
    Neurons,
    dominance_gap,
    interaction_share,
)
from crosslens.training.objective.term import check_weight
from crosslens.training.readers import Reader, read_sites
from crosslens.training.schedule import Span

Form = Literal["exact", "paper"]

FORMS: dict[Form, Callable[[Active, Neurons], Tensor]] = {
    "exact": interaction_share,
    "paper": dominance_gap,
}


@dataclass(frozen=True, eq=False)
class Beside:
    """What a term may need that is neither its own setting nor in the pass."""

    readers: tuple[Reader, ...]
    generator: torch.Generator
    """From the run's seed and the step alone, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """How much of what latents do at the neurons of an MLP they do together and not one by one,
    on some tokens of the batch, mean over sites.

    It moves the encoder and the decoder's rows, in its exact form the decoder's bias too: with the
    bias held, the reconstruction moves into it what the latents give up, and the term rises.
    """

    weight: float = 0.0
    ramp: Span = 0.1
    """Share of the run, or length, over which the weight rises linearly from 0."""
    form: Form = "exact"
    """`exact`: the interaction as a share of what latents do at the neurons, weighed by ‖w_out‖, in
    [0, 1]; smaller norms do not lower it. `paper`: all contributions but the largest of each
    neuron (2606.09940), which smaller norms do lower."""
    sites: tuple[str, ...] = ()
    """Sites written (or globs) whose MLP counts; none: all that an MLP reads. Of several models the
    model must be named, `chat/resid_mid.5`."""
    share: float = 0.1
    """Share of a step's tokens that are looked at, drawn anew each time."""
    neurons: float = 0.25
    """Share of an MLP's neurons that are looked at in a step: one, drawn anew, of the blocks into
    which they are divided for good. The term is the mean over blocks."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.interaction")
        for name in ("share", "neurons"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(
                    f"objective.interaction.{name} is in (0, 1], found {getattr(self, name)}."
                )

    @property
    def n_blocks(self) -> int:
        """Into how many blocks an MLP's neurons are divided."""
        return round(1 / self.neurons)

    def __call__(self, step: Pass, beside: Beside | None = None) -> Tensor:
        """Raises UsageError where the models' MLPs were not given to the training loop."""
        if beside is None or not beside.readers:
            raise UsageError(
                "objective.interaction needs the models' MLPs, and this training was not given "
                "any: pass `readers_of(…)` to `fit`."
            )
        n_rows = len(step.code)
        n_tokens = max(1, round(self.share * n_rows))
        rows_T = torch.randperm(n_rows, generator=beside.generator)[:n_tokens]
        entries = _entries(step.code, rows_T.to(step.target_BY.device))
        found = []
        for reader in beside.readers:
            block = int(torch.randint(len(reader.blocks), (), generator=beside.generator))
            neurons = reader.blocks[block]
            found.append(FORMS[self.form](_active(step, reader, neurons, entries), neurons))
        return torch.stack(found).mean()

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        if isinstance(wiring, Difference | LayerConditioned):
            raise UsageError(
                "objective.interaction needs rows that hold what an MLP reads at all sites of a "
                f"token, and those of the wiring {type(wiring).__name__} do not."
            )
        if isinstance(activation, AbsTopK) or (isinstance(activation, TopK) and activation.signed):
            raise UsageError(
                "objective.interaction takes strengths to be 0 or more, and this activation lets "
                "negative ones through. Set objective.interaction.weight to 0, or take an "
                "activation that rectifies."
            )

    def check_wiring(self, wiring: Wiring) -> None:
        read_sites(wiring, self.sites)


@dataclass(frozen=True, eq=False)
class _Entries:
    """Of some rows of the batch, the entries of their code."""

    rows_T: Tensor
    token_E: Tensor
    """Which of these rows, ascending."""
    latent_E: Tensor
    value_E: Tensor


def _entries(code: F.Code, rows_T: Tensor) -> _Entries:
    if isinstance(code, Tensor):
        z_TL = F.upcast(code[rows_T])
        token_E, latent_E = z_TL.nonzero(as_tuple=True)
        return _Entries(rows_T, token_E, latent_E, z_TL[token_E, latent_E])
    lists = code.lists
    counts_T = lists.counts_I[rows_T]
    token_E = torch.arange(len(rows_T), device=rows_T.device).repeat_interleave(counts_T)
    before_T = lists.starts_I[rows_T] - starts_of(counts_T)[:-1]
    at_E = torch.arange(len(token_E), device=rows_T.device) + before_T[token_E]
    at_E, token_E = _active_only(code.values_N.detach()[at_E], at_E, token_E)
    return _Entries(rows_T, token_E, code.latents_N[at_E], code.values_N[at_E])


def _active_only(value_E: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """A sparse code may hold entries that are 0 but have a gradient."""
    return tuple(other[value_E != 0] for other in others)


def _active(step: Pass, reader: Reader, neurons: Neurons, entries: _Entries) -> Active:
    """What some neurons of the MLP see of the entries."""
    coder, write = step.coder, step.coder.wiring.write
    at, scale = write.slice(reader.site), coder.scale_write[write.index(reader.site)]
    with torch.no_grad():
        x_TD = coder.unscaled_write(step.target_BY[entries.rows_T])[:, at]
        r_T = x_TD.new_ones(len(x_TD)) if reader.norm is None else reader.norm.scalar(x_TD)
    bias_D = (coder.b_dec[at] / scale).to(neurons.through_DW.dtype)
    writes_E = _writing(coder.wiring, reader.site).to(r_T.device)[entries.latent_E]
    token_E = entries.token_E[writes_E]
    latent_U, place_E = torch.unique(entries.latent_E[writes_E], return_inverse=True)
    starts_I = starts_of(torch.bincount(token_E, minlength=len(r_T)))
    return Active(
        decoder_UD=_decoder_rows(step, reader.site, latent_U) / scale,
        lists=Lists(starts_I, place_E.int()),
        strength_E=entries.value_E[writes_E] * r_T[token_E],
        always_TW=r_T[:, None] * F.upcast(bias_D @ neurons.through_DW) + neurons.fixed_W,
    )


def _writing(wiring: Wiring, site: str) -> Tensor:
    """Which latents write the site [L]."""
    parts = [torch.full((g.n_latents,), site in g.writes) for g in wiring.groups]
    return torch.cat(parts)


def _decoder_rows(step: Pass, site: str, latent_U: Tensor) -> Tensor:
    """The rows [U, D] at a site of latents (ascending) that write it, in scaled units."""
    wiring, parts = step.coder.wiring, []
    for group, span, W_LY in zip(wiring.groups, wiring.slices, step.coder.W_dec, strict=True):
        if site in group.writes:
            columns = wiring.write.pick(group.writes).slice(site)
            tied = columns.start // W_LY.shape[1] * W_LY.shape[1]
            columns = slice(columns.start - tied, columns.stop - tied)
            inside_U = (latent_U >= span.start) & (latent_U < span.stop)
            mine_U = latent_U[inside_U] - span.start
            if step.gradients is None:
                parts.append(W_LY.index_select(0, mine_U)[:, columns])
            else:
                dtype = step.coder.compute_dtype or W_LY.dtype
                known = mine_U, columns, step.gradients, dtype
                parts.append(_Rows.apply(W_LY, known))  # type: ignore[no-untyped-call]
    return torch.cat(parts)


_Taking = tuple[Tensor, slice, RowGradients, torch.dtype]
"""Which rows and columns, where their gradient goes, and in which format."""


class _Rows(torch.autograd.Function):
    """Some columns of some rows of a decoder, whose gradient goes where a sparse pass leaves it."""

    @staticmethod
    def forward(ctx: Any, W_LY: nn.Parameter, known: _Taking) -> Tensor:
        ctx.known = W_LY, known
        latent_U, columns, _, _ = known
        return W_LY.detach()[latent_U][:, columns]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        W_LY, (latent_U, columns, gradients, dtype) = ctx.known
        pull_UY = W_LY.new_zeros(len(latent_U), W_LY.shape[1], dtype=dtype)
        pull_UY[:, columns] = grads[0]
        gradients.add_rows(W_LY, latent_U, pull_UY)
        return None, None

"""Short trials of what a training will do, where its speed is not known otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from crosslens.activations import Source
from crosslens.activations.filling import fill
from crosslens.coder import Coder, Layout, Pass, RowGradients, Wiring, transpose_init
from crosslens.coder.gathering import Known
from crosslens.device import resolve_device, resolve_dtype
from crosslens.functional.code import Code, SparseCode
from crosslens.functional.gathers import Lists
from crosslens.kernels import row_squares
from crosslens.kernels.measuring import seconds
from crosslens.text import Blocks
from crosslens.training.config import TrainConfig
from crosslens.training.fit import Hooks, fit
from crosslens.training.objective import Beside, Interaction
from crosslens.training.optimizers import unscheduled
from crosslens.training.readers import Reader
from crosslens.training.start import first_state
from crosslens.training.train import Models


def new_coder(config: TrainConfig, layout: Layout) -> Coder:
    """The configuration's coder, with no weights yet."""
    wiring = config.wiring(layout, config.coder.latents)
    return Coder(wiring, config.coder.activation, center=config.coder.center)


def harvest_rate(config: TrainConfig, models: Models, layout: Layout) -> float:
    """Positions harvested in a second: the faster of two chunks of random tokens, after one to warm
    up."""
    length = config.text.block
    per_chunk = max(1, config.fit.harvest_tokens // length)
    vocabulary = min(len(model.tokenizer) for model in models.values())
    tokens_NT = torch.randint(vocabulary, (3 * per_chunk, length), dtype=torch.int32)
    blocks = Blocks(tokens_NT, torch.zeros_like(tokens_NT), ("probe",), None, 0, ())
    source = Source(models, layout, blocks, config.policy, blocks_per_chunk=per_chunk)
    rows_NX = torch.empty(source.rows_per_chunk, layout.width, dtype=torch.bfloat16)
    slot_R = torch.arange(len(rows_NX))
    taken = []
    for index in range(source.n_chunks):
        began = time.perf_counter()
        fill(source, index, slot_R, rows_NX)
        taken.append(time.perf_counter() - began)
    return per_chunk * length / min(taken[1:])


class _Noise:
    """Batches of random rows, all alike."""

    def __init__(self, batch: int, layout: Layout) -> None:
        self.rows_BX = torch.randn(batch, layout.width).bfloat16()
        self.began: list[float] = []

    def next(self, check: Callable[[], None]) -> torch.Tensor:
        self.began.append(time.perf_counter())
        return self.rows_BX

    def state(self) -> dict[str, torch.Tensor]:
        return {}


def step_seconds(config: TrainConfig, layout: Layout, steps: int) -> float:
    """Seconds of one step on random rows, from `steps` of them after two to warm up. No latent is
    dead in so short a time: AuxK is idle; and `objective.interaction` is left out, which
    `interaction_seconds` tells of."""
    coder = new_coder(config, layout)
    transpose_init(coder, 0.1, torch.Generator().manual_seed(0))  # the start costs no step more
    coder.to(resolve_device(config.fit.device))
    last = steps + 2
    probe = replace(
        config,
        fit=replace(
            config.fit, steps=last, log_every=last, checkpoint_every=last, resample_every=0
        ),
        optimizer=unscheduled(config.optimizer),
        objective=replace(config.objective_in_shares(), interaction=Interaction()),
    )
    noise, state = _Noise(config.fit.batch, layout), first_state(coder, probe)
    fit(probe, state, noise, Hooks(lambda _: None, lambda _: None, lambda _: {}))
    return (noise.began[-1] - noise.began[1]) / steps


def interaction_seconds(
    config: TrainConfig, wiring: Wiring, readers: tuple[Reader, ...], active: int, sparse: bool
) -> float:
    """Seconds that `objective.interaction` adds to a step: its value and gradients on random codes.

    All latents are active equally often, so that as many different ones as can be are on the
    sampled tokens; of a coder in which some seldom are it takes less.

    Args:
        readers: the MLPs that it looks at.
        active: entries of a row that are not 0.
        sparse: whether steps hold such entries only.
    """
    device = resolve_device(config.fit.device)
    coder = Coder(wiring, config.coder.activation)
    coder.compute_dtype = resolve_dtype(config.fit.dtype)
    for weights in coder.to(device).W_dec:
        weights.detach().fill_(0.01)  # memory that nothing was written to is read faster
    known = Known(torch.empty(0, device=device), coder.b_enc, (), RowGradients())
    draw = torch.Generator().manual_seed(0)
    rows_BY = torch.randn(config.fit.batch, wiring.write.width, device=device)
    code = _random_code(config, coder, active, sparse)

    def once() -> None:
        gathered = replace(known, gradients=RowGradients()) if sparse else None
        step = Pass(rows_BY, rows_BY, rows_BY[:, :0], code, coder, known=gathered)
        torch.autograd.backward(config.objective.interaction(step, Beside(readers, draw)))
        if gathered is not None:
            for gradient in gathered.gradients.by_latent().values():
                row_squares(gradient)

    return seconds(once, device)


def _random_code(config: TrainConfig, coder: Coder, active: int, sparse: bool) -> Code:
    """With a gradient to its values."""
    n_rows, n_latents = config.fit.batch, coder.wiring.n_latents
    device, dtype = coder.b_dec.device, coder.compute_dtype
    index_BK = torch.randint(n_latents, (n_rows, active), device=device).sort(-1).values
    if not sparse:
        z_BL = torch.zeros(n_rows, n_latents, device=device, dtype=dtype)
        return z_BL.scatter_(1, index_BK, 1.0).requires_grad_()
    lists = Lists(torch.arange(n_rows + 1, device=device) * active, index_BK.flatten().int())
    values_N = torch.ones(len(lists.index_N), device=device, requires_grad=True)
    return SparseCode(lists, values_N, values_N, n_latents)

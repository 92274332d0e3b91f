"""Measure the parts of a training step, each through the function that training calls."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from mmap import ACCESS_COPY, mmap

import torch
from torch import Tensor
from torch.optim.adam import adam

from crosslens import kernels
from crosslens.functional.adam import AdamRows, AdamStep, RowGradient
from crosslens.functional.blocks import BLOCK
from crosslens.functional.gathers import Lists, starts_of
from crosslens.kernels.calibration import (
    LENGTHS,
    Calibration,
    Measured,
    Rates,
    Size,
    machine_facts,
)

SIZES = (
    Size(rows=512, read=256, written=256, latents=2048),
    Size(rows=2048, read=768, written=768, latents=16_384),
    Size(rows=2048, read=2880, written=2880, latents=4096),
    Size(rows=2048, read=2880, written=2880, latents=16_384),
)
FORMATS = (torch.bfloat16, torch.float32)
FEW, MANY = 16, 64
"""Entries per row of the codes that are measured: what grows with them, and what does not."""
ENOUGH = 4096
"""Latents whose products and steps are timed: more take longer, but at the same rate."""
LOOKED_AT = 1 << 24
"""Pre-activations among which the largest are sought."""
LARGE = 1 << 23
"""Numbers of what is too large for any cache."""
CALLS = 1000
BUDGET = 0.1
"""Seconds that a part is repeated for."""
STEP = AdamStep(lr=1e-9, beta1=0.9, beta2=0.999, eps=1e-8, step=1)

Heard = Callable[[int, int], None]


def measure(
    device: torch.device,
    heard: Heard = lambda done, total: None,
    sizes: tuple[Size, ...] = SIZES,
) -> Calibration:
    """The rates of this machine on `device`, for all sizes and `FORMATS`.

    Args:
        heard: is told of (cases done, cases in all).
    """
    began, found = time.perf_counter(), list[Measured]()
    cases = [(size, dtype) for size in sizes for dtype in FORMATS]
    for size, dtype in cases:
        heard(len(found), len(cases))
        rates = rates_of(size, dtype, device)
        found.append(Measured(dtype=str(dtype).removeprefix("torch."), size=size, rates=rates))
    heard(len(found), len(cases))
    seconds = time.perf_counter() - began
    return Calibration(facts=machine_facts(device), measured=tuple(found), seconds=seconds)


@torch.no_grad()
def rates_of(size: Size, dtype: torch.dtype, device: torch.device) -> Rates:
    """What is measured at one shape in one format."""
    rows_BX = torch.full((size.rows, size.written), 0.01, dtype=dtype, device=device)
    weights_LX = torch.full((size.latents, size.written), 0.01, dtype=dtype, device=device)
    return Rates(
        sums=_sums_by_latent(rows_BX, min(size.latents, ENOUGH)),
        **_products(rows_BX, weights_LX[:ENOUGH]),
        **_gathers(rows_BX, weights_LX),
        **_steps(rows_BX, min(size.latents, ENOUGH)),
        **_selection(size, rows_BX),
        **_passes(device),
    )


def _products(rows_BX: Tensor, weights_LX: Tensor) -> dict[str, float]:
    flop = 2 * len(rows_BX) * weights_LX.numel()
    code_BL = torch.full((len(rows_BX), len(weights_LX)), 0.01).to(rows_BX)
    return {
        "encode": flop / seconds(lambda: rows_BX @ weights_LX.T, rows_BX.device),
        "decode": flop / seconds(lambda: code_BL @ weights_LX, rows_BX.device),
        "weights": flop / seconds(lambda: code_BL.T @ rows_BX, rows_BX.device),
    }


def _gathers(rows_BX: Tensor, weights_LX: Tensor) -> dict[str, float]:
    device = rows_BX.device
    code = _random_lists(len(rows_BX), len(weights_LX), MANY, device)
    value_N, pull_BX = torch.ones(len(code.index_N), device=device), rows_BX.float()
    gathered = len(value_N) * rows_BX.shape[1] * rows_BX.dtype.itemsize

    def sums() -> Tensor:
        return kernels.bag_sum(code, value_N, weights_LX)

    def products() -> Tensor:
        return kernels.products(code, pull_BX, weights_LX)

    return {
        "bag_rows": gathered / seconds(sums, device),
        "products": gathered / seconds(products, device),
        "sort": len(value_N) / seconds(lambda: code.turned(len(weights_LX)), device),
    }


def _sums_by_latent(rows_BX: Tensor, n_latents: int) -> tuple[float, ...]:
    taken = []
    for n in LENGTHS:
        gradient = _random_gradient(rows_BX, n_latents, n)
        taken.append(seconds(functools.partial(kernels.row_squares, gradient), rows_BX.device))
    return tuple(n_latents * rows_BX.shape[1] / each for each in taken)


def _steps(rows_BX: Tensor, n_latents: int) -> dict[str, float]:
    """Of rows, without what summing their gradients takes, and of a dense gradient."""
    device = rows_BX.device
    weights_LX = torch.zeros(n_latents, rows_BX.shape[1], device=device)
    mean_LX, square_LX = torch.zeros_like(weights_LX), torch.zeros_like(weights_LX)
    copy_LX = None if rows_BX.dtype == torch.float32 else torch.zeros_like(weights_LX).to(rows_BX)
    gradient = _random_gradient(rows_BX, n_latents, LENGTHS[1])
    rows = AdamRows(weights_LX, mean_LX, square_LX, None, copy_LX)
    whole = seconds(lambda: kernels.adam_rows(gradient, rows, STEP), device)
    summing = seconds(lambda: kernels.row_squares(gradient), device)
    grad_LX = torch.full(weights_LX.shape, 0.01).to(rows_BX)
    site_LX = weights_LX[:, : weights_LX.shape[1] // 2]  # norms are taken site by site
    n = weights_LX.numel()
    return {
        # Where summing takes nearly all of it, noise must not make the step free.
        "adam_rows": n / max(whole - summing, 0.1 * whole),
        "adam": n / seconds(lambda: _dense_step(grad_LX, rows), device),
        "norms": site_LX.numel() / seconds(lambda: site_LX.norm(dim=-1), device),
    }


def _dense_step(grad_LX: Tensor, rows: AdamRows) -> None:
    """What a dense gradient goes through: its conversion, its norm, Adam, the new copy."""
    wide_LX = grad_LX.float() if rows.copy_LX is not None else grad_LX.clone()
    wide_LX.mul_(1 / torch.linalg.vector_norm(wide_LX).clamp(min=1.0))
    assert rows.mean_LX is not None
    adam(
        [rows.weights_LX],
        [wide_LX],
        [rows.mean_LX],
        [rows.square_LX],
        [],
        [torch.tensor(0.0, device=grad_LX.device)],
        fused=True,
        amsgrad=False,
        beta1=STEP.beta1,
        beta2=STEP.beta2,
        lr=STEP.lr,
        weight_decay=0.0,
        eps=STEP.eps,
        maximize=False,
    )
    if rows.copy_LX is not None:
        rows.copy_LX.copy_(rows.weights_LX)


def _selection(size: Size, rows_BX: Tensor) -> dict[str, float]:
    """What an entry that is looked at costs, and one that is taken."""
    draw = torch.Generator().manual_seed(0)
    n_rows = max(16, min(size.rows, LOOKED_AT // size.latents))
    pre_BL = torch.randn(n_rows, size.latents, generator=draw).to(rows_BX)
    norm_L = torch.ones(size.latents, device=rows_BX.device)
    taken = []
    for n in (FEW, MANY):
        select = functools.partial(kernels.largest_of_batch, pre_BL, norm_L, n_rows * n)
        taken.append(seconds(select, rows_BX.device))
    fixed, added = _line(*taken)
    return {"look": pre_BL.numel() / fixed, "take": n_rows / added}


def _passes(device: torch.device) -> dict[str, float]:
    large, block = (torch.full((n,), 0.01, device=device) for n in (LARGE, BLOCK))
    known, tiny = torch.ones_like(large), torch.ones(1, device=device)

    def fresh() -> None:
        on_cpu = device.type == "cpu"  # others keep all that they are given
        private = mmap(-1, large.nbytes, access=ACCESS_COPY) if on_cpu else None
        new = known if private is None else torch.frombuffer(private, dtype=large.dtype)
        torch.mul(large, 2.0, out=new)

    def calls() -> None:
        for _ in range(CALLS):
            tiny.add(1.0)

    return {
        "write": large.nbytes / seconds(lambda: torch.mul(large, 2.0, out=known), device),
        "fresh": large.nbytes / seconds(fresh, device),
        "block": BLOCK / seconds(lambda: block * 2.0, device),
        "calls": CALLS / seconds(calls, device),
    }


def _line(few: float, many: float) -> tuple[float, float]:
    """Seconds at no entry per row, and for each entry more; each at least a tenth of the share that
    it would have alone, since both are differences of noisy figures."""
    added = max((many - few) / (MANY - FEW), 0.1 * few / FEW)
    return max(few - FEW * added, 0.1 * few), added


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, after one to warm up."""
    taken: list[float] = []
    _wait(work, device)
    while len(taken) < 2 or sum(taken) < BUDGET:
        began = time.perf_counter()
        _wait(work, device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _wait(work: Callable[[], object], device: torch.device) -> None:
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _random_lists(n_rows: int, n_latents: int, entries: int, device: torch.device) -> Lists:
    """So many latents for each row."""
    draw = torch.Generator().manual_seed(0)
    index_BK = torch.randint(n_latents, (n_rows, entries), generator=draw, dtype=torch.int32)
    starts_B = torch.arange(n_rows + 1, device=device) * entries
    return Lists(starts_B, index_BK.sort(-1).values.flatten().to(device))


def _random_gradient(rows_BX: Tensor, n_latents: int, length: int) -> RowGradient:
    """Lists of so many rows in the mean, as random as those of a batch."""
    draw = torch.Generator().manual_seed(0)
    pairs = (n_latents * length,)
    counts_L = torch.bincount(torch.randint(n_latents, pairs, generator=draw), minlength=n_latents)
    index_N = torch.randint(len(rows_BX), pairs, generator=draw, dtype=torch.int32)
    lists = Lists(starts_of(counts_L).to(rows_BX.device), index_N.to(rows_BX.device))
    return RowGradient(lists, torch.ones(pairs, device=rows_BX.device), rows_BX)

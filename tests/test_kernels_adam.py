"""Steps of Adam on gathered gradients: each form of the kernels against `torch.optim.Adam`."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import pytest
import torch

from crosslens import kernels
from crosslens.functional import adam as reference
from crosslens.functional.adam import AdamRows, AdamStep, RowGradient
from crosslens.functional.gathers import Lists
from tests.kernel_forms import COMPILED, FORMS, form_of, lists_of, seeded

N_ROWS, N_TABLE = 11, 7
WITH_MEAN, LAZY = 0.9, 0.0


def gradient_at(step: int, width: int, dtype: torch.dtype) -> RowGradient:
    """Of each step others: rows get pairs only now and then, row 3 never, row 4 always."""
    counts = torch.randint(-2, 4, (N_ROWS,), generator=seeded(step)).clamp(min=0) * 3
    counts[3], counts[4] = 0, 17
    lists = lists_of(counts.tolist(), N_TABLE, seed=step)
    weight = torch.randn(len(lists.index_N), generator=seeded(step + 100))
    return RowGradient(lists, weight, torch.randn(N_TABLE, width, generator=seeded(step)).to(dtype))


def dense(gradient: RowGradient, weights: torch.Tensor, how: AdamStep) -> torch.Tensor:
    """The gradient in float64, from its definition."""
    width = gradient.table_TX.shape[1]
    grad = torch.zeros(N_ROWS, width, dtype=torch.float64)
    for pair, row in enumerate(gradient.lists.items_N.tolist()):
        index = int(gradient.lists.index_N[pair])
        grad[row] += gradient.weight_N[pair].double() * gradient.table_TX[index].double()
    if how.projected:
        unit = torch.nn.functional.normalize(weights, dim=-1)
        grad = grad - (grad * unit).sum(-1, keepdim=True) * unit
    return grad * float(how.scale)


def new_rows(width: int, beta1: float, copy: torch.dtype | None = None) -> AdamRows:
    weights = torch.randn(N_ROWS, width, generator=seeded(9))
    weights[5] = 0  # has no direction to project on
    zeros = torch.zeros(N_ROWS, width)
    if beta1:
        mean, seen = zeros.clone(), None
    else:
        mean, seen = None, torch.zeros(N_ROWS, dtype=torch.int32)
    return AdamRows(weights, mean, zeros, seen, None if copy is None else weights.to(copy))


def how_of(step: int, beta1: float, **options) -> AdamStep:
    return AdamStep(lr=3e-3, beta1=beta1, beta2=0.97, eps=1e-8, step=step, **options)


OPTIONS = {
    "plain": {},
    "projected": {"projected": True},
    "clipped": {"scale": 0.03},
    "both": {"projected": True, "scale": 0.03},
}
FORMS_AND_FORMATS = [
    pytest.param(*form.values, dtype, marks=form.marks)
    if hasattr(form, "values")
    else (form, dtype)
    for form in FORMS
    for dtype in (torch.float32, torch.bfloat16)
    if (form, dtype) != ("stock", torch.bfloat16)  # rounds the sums: tested below
]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("beta1", [WITH_MEAN, LAZY])
@pytest.mark.parametrize(("name", "dtype"), FORMS_AND_FORMATS, ids=str)
def test_steps_are_those_of_torch(name, dtype, beta1, options):
    if name == "triton" and len(options) == 1:
        return  # a second each in its interpreter
    width, n_steps = 19, 5
    rows = new_rows(width, beta1, copy=dtype)
    right = torch.nn.Parameter(rows.weights_LX.double())
    adam = torch.optim.Adam([right], lr=3e-3, betas=(beta1, 0.97), eps=1e-8)
    for step in range(1, n_steps + 1):
        gradient, how = gradient_at(step, width, dtype), how_of(step, beta1, **options)
        right.grad = dense(gradient, right.detach(), how)
        adam.step()
        form_of(name).adam_rows(gradient, rows, how)
        assert torch.allclose(rows.weights_LX.double(), right.detach(), rtol=0, atol=2e-6), step
    state, square = adam.state[right], rows.square_LX.double()
    if rows.mean_LX is not None:
        assert torch.allclose(rows.mean_LX.double(), state["exp_avg"], rtol=1e-4, atol=1e-6)
    if rows.seen_L is not None:
        assert rows.seen_L[3] == 0
        assert rows.seen_L[4] == n_steps
        assert len(rows.seen_L.unique()) > 2  # some rows were touched before the last step only
        square = square * 0.97 ** (n_steps - rows.seen_L)[:, None].double()
    assert torch.allclose(square, state["exp_avg_sq"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("beta1", [WITH_MEAN, LAZY])
@pytest.mark.parametrize("name", FORMS)
def test_long_unseen_rows_catch_up(name, beta1):
    """One gradient, then none for a thousand steps, then one."""
    rows = new_rows(6, beta1)
    right = torch.nn.Parameter(rows.weights_LX.double())
    adam = torch.optim.Adam([right], lr=3e-3, betas=(beta1, 0.999), eps=1e-8)
    table = torch.randn(N_TABLE, 6, generator=seeded(1))
    one = RowGradient(lists_of([1] * N_ROWS, N_TABLE), torch.ones(N_ROWS), table)
    none = RowGradient(lists_of([0] * N_ROWS, N_TABLE), torch.ones(0), table)
    n_steps = 20 if beta1 else 1000  # with a mean, each step is a dense one
    for step in range(1, n_steps + 1):
        gradient = one if step in (1, n_steps) else none
        how = replace(how_of(step, beta1), beta2=0.999)
        right.grad = dense(gradient, right.detach(), how)
        adam.step()
        if beta1 or gradient is one:
            form_of(name).adam_rows(gradient, rows, how)
    assert torch.allclose(rows.weights_LX.double(), right.detach(), rtol=0, atol=2e-6)
    assert torch.allclose(rows.square_LX.double(), adam.state[right]["exp_avg_sq"], rtol=2e-5)


@pytest.mark.parametrize("beta1", [WITH_MEAN, LAZY])
def test_torch_ops_step_by_bfloat16_sums(beta1):
    """Each row's sum is exact in bfloat16 here, as it is of one pair of weight 2."""
    gradient = gradient_at(1, 19, torch.bfloat16)
    index = torch.arange(N_ROWS, dtype=torch.int32) % N_TABLE
    lists = Lists(torch.arange(N_ROWS + 1), index)
    gradient = RowGradient(lists, torch.full((N_ROWS,), 2.0), gradient.table_TX)
    found, right = new_rows(19, beta1), new_rows(19, beta1)
    form_of("stock").adam_rows(gradient, found, how_of(1, beta1, projected=True))
    reference.adam_rows(gradient, right, how_of(1, beta1, projected=True))
    assert torch.allclose(found.weights_LX, right.weights_LX, rtol=0, atol=1e-6)
    assert torch.allclose(found.square_LX, right.square_LX, rtol=1e-5)


@pytest.mark.parametrize("beta1", [WITH_MEAN, LAZY])
@pytest.mark.parametrize("width", [1, 600])
@pytest.mark.parametrize("name", FORMS)
def test_any_width_is_the_references_step(name, width, beta1):
    gradient = gradient_at(2, width, torch.float32)
    found, right = new_rows(width, beta1), new_rows(width, beta1)
    for rows, form in ((found, form_of(name)), (right, reference)):
        rows.square_LX.add_(0.5)
        form.adam_rows(gradient, rows, how_of(7, beta1, projected=width > 1))
    for a, b in zip(vars(found).values(), vars(right).values(), strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def halved(rows: AdamRows) -> AdamRows:
    mean = None if rows.mean_LX is None else rows.mean_LX.bfloat16()
    return replace(rows, mean_LX=mean, square_LX=rows.square_LX.bfloat16())


@pytest.mark.parametrize("beta1", [WITH_MEAN, LAZY])
@pytest.mark.parametrize("width", [1, 600])
@pytest.mark.parametrize("name", FORMS)
def test_moments_in_bfloat16_are_the_references(name, width, beta1):
    """A sum in another order is off by a rounding, which draws the other neighbour only seldom."""
    found, right = halved(new_rows(width, beta1)), halved(new_rows(width, beta1))
    for step in (2, 3):
        gradient, how = gradient_at(step, width, torch.float32), how_of(step, beta1, scale=0.7)
        form_of(name).adam_rows(gradient, found, how)
        reference.adam_rows(gradient, right, how)
    assert torch.allclose(found.weights_LX, right.weights_LX, rtol=1e-5, atol=1e-5)
    for a, b in ((found.mean_LX, right.mean_LX), (found.square_LX, right.square_LX)):
        if a is not None and b is not None:
            apart = (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()
            assert int(apart.max()) <= 1
            assert float((apart == 0).double().mean()) > 0.98
            assert a.count_nonzero() > 0


@pytest.mark.parametrize("name", [*FORMS[:2], "reference"])
def test_a_moment_in_bfloat16_decays_though_each_step_is_below_its_precision(name):
    """.999 ^ 600 = .549; to the nearest, it would stay at 1."""
    form = reference if name == "reference" else form_of(name)
    none = RowGradient(lists_of([0] * 20, 1), torch.ones(0), torch.zeros(1, 50))
    ones = [torch.ones(20, 50).bfloat16() for _ in range(2)]
    rows = AdamRows(torch.zeros(20, 50), *ones, None)
    for step in range(1, 601):
        form.adam_rows(none, rows, replace(how_of(step, 0.999), beta2=0.999))
    assert rows.mean_LX is not None
    for moment in (rows.mean_LX.double(), rows.square_LX.double()):
        # Each step's error is at most 2⁻⁸ of the moment: of 1,000 independent walks of 600 steps.
        assert float(moment.mean()) == pytest.approx(0.999**600, abs=0.006)
        assert float(moment.std()) > 0.005
    apart = rows.mean_LX.double() - rows.square_LX.double()
    assert (
        abs(float(torch.corrcoef(torch.stack([apart[:10].flatten(), apart[10:].flatten()]))[0, 1]))
        < 0.2
    )


def drawn(value: float, row: int, column: int, step: int, width: int, bits: int) -> float:
    """`rounded` of one number, in Python's own integers."""
    word = (1 << 32) - 1
    known = struct.unpack("<I", struct.pack("<f", value))[0]
    if (known >> 23) & 0xFF == 0xFF:
        return value
    it = (row * width + column + step * 0x9E3779B9) & word
    it = ((it ^ it >> 16) * 0x7FEB352D) & word
    it = ((it ^ it >> 15) * 0x846CA68B) & word
    it ^= it >> 16
    up = (known + (it >> bits & 0xFFFF)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", up))[0]


def test_rounding_is_its_definition():
    value = torch.randn(7, 13, generator=seeded(3)) * 10.0 ** torch.arange(-6, 7)
    value[0, :4] = torch.tensor([0.0, math.inf, -math.inf, 1.5])
    row = torch.tensor([0, 3, 100, 70_000, 3_000_000_000, 5, 6])
    for step, bits in ((1, 0), (70_000, 16)):
        found = reference.rounded(value, row, step, bits)
        right = [
            [drawn(float(value[i, j]), int(row[i]), j, step, 13, bits) for j in range(13)]
            for i in range(7)
        ]
        assert torch.equal(found.double(), torch.tensor(right).double())
    assert reference.rounded(torch.full((1, 1), math.nan), torch.zeros(1).long(), 1).isnan().all()


def test_rounding_keeps_the_mean():
    value = torch.tensor([[1.0 + 2**-9, -3.0 - 2**-8, 0.1, 1e-20]])
    drawn = torch.stack(
        [reference.rounded(value, torch.tensor([4]), step)[0].double() for step in range(4000)]
    )
    near = value[0].double().abs() * 2**-7  # from one bfloat16 to the next, at most
    assert ((drawn - value[0]).abs() < near).all()
    assert ((drawn.mean(0) - value[0]).abs() < 3.5 * near / 2 / 4000**0.5).all()


@pytest.mark.parametrize("name", FORMS)
def test_a_factor_may_be_a_tensor(name):
    gradient, results = gradient_at(2, 9, torch.float32), []
    for scale in (0.25, torch.tensor(0.25)):
        rows = new_rows(9, WITH_MEAN)
        form_of(name).adam_rows(gradient, rows, how_of(1, WITH_MEAN, scale=scale))
        results.append(rows)
    assert torch.equal(results[0].weights_LX, results[1].weights_LX)
    assert torch.equal(results[0].mean_LX, results[1].mean_LX)
    assert not torch.equal(results[0].mean_LX, torch.zeros(N_ROWS, 9))


@pytest.mark.parametrize("name", FORMS)
def test_without_pairs_a_lazy_step_does_nothing(name):
    for lists in (lists_of([0] * N_ROWS, N_TABLE), gradient_at(1, 5, torch.float32).lists):
        rows, before = new_rows(5, LAZY, torch.float32), new_rows(5, LAZY, torch.float32)
        still = lists.counts_I == 0
        weight = torch.ones(len(lists.index_N))
        gradient = RowGradient(lists, weight, torch.randn(N_TABLE, 5, generator=seeded()))
        form_of(name).adam_rows(gradient, rows, how_of(3, LAZY))
        assert torch.equal(rows.weights_LX[still], before.weights_LX[still])
        assert torch.equal(rows.square_LX[still], before.square_LX[still])
        assert torch.equal(rows.seen_L == 3, ~still)


@pytest.mark.parametrize("name", FORMS[:2])
def test_the_copy_is_the_weights_to_the_bit(name):
    """Any weights: without gradient and moments they stay, and so what is tested is rounding."""
    bits = torch.randint(-(2**31), 2**31, (40, 50), generator=seeded(), dtype=torch.int64)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3F807FFF, 0x7F7FFFFF, 0x00018000])
    odd = torch.tensor([0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7F80FFFF, 0, 0x80000000])
    bits.view(-1)[:12] = torch.cat([ties, odd])
    bits.view(-1)[12:24] = torch.cat([ties, odd]) | 0x80000000
    weights = bits.to(torch.int32).view(torch.float32)
    zeros = [torch.zeros(40, 50) for _ in range(2)]
    rows = AdamRows(weights.clone(), *zeros, None, torch.ones(40, 50).bfloat16())
    gradient = RowGradient(lists_of([0] * 40, 1), torch.ones(0), torch.zeros(1, 50).bfloat16())
    form_of(name).adam_rows(gradient, rows, how_of(1, WITH_MEAN))
    right, number = weights.bfloat16(), ~weights.isnan()
    assert rows.copy_LX is not None
    assert 12 < int(number.sum()) < number.numel()
    assert torch.equal(rows.copy_LX.isnan(), ~number)
    assert torch.equal(rows.copy_LX.view(torch.int16)[number], right.view(torch.int16)[number])


@pytest.mark.parametrize("beta1", [WITH_MEAN, LAZY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_the_copy_follows_the_weights(name, dtype, beta1):
    if (name, dtype) == ("native", torch.float16):
        return
    rows, gradient = new_rows(19, beta1, dtype), gradient_at(1, 19, dtype)
    old, unseen = rows.copy_LX.clone(), gradient.lists.counts_I == 0
    form_of(name).adam_rows(gradient, rows, how_of(1, beta1))
    right = rows.weights_LX.to(dtype)
    if beta1 == LAZY:
        right[unseen] = old[unseen]
    assert not torch.equal(rows.copy_LX, old)
    if name == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        # The interpreter cuts off where a GPU rounds; see test_kernels_triton.py.
        apart = rows.copy_LX.view(torch.int16).int() - right.view(torch.int16).int()
        assert set(apart.unique().tolist()) == {-1, 0}
    else:
        assert torch.equal(rows.copy_LX, right)


@pytest.mark.parametrize("name", COMPILED[:1])
def test_threads_do_not_change_a_bit(name):
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            gradient, rows = (
                gradient_at(1, 131, torch.bfloat16),
                new_rows(131, LAZY, torch.bfloat16),
            )
            form_of(name).adam_rows(gradient, rows, how_of(1, LAZY, projected=True))
            squares = form_of(name).row_squares(gradient, rows.weights_LX)
            found.append((squares, *(t for t in vars(rows).values() if t is not None)))
    finally:
        torch.set_num_threads(before)
    assert len(found[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- lengths of gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 600])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(("name", "dtype"), FORMS_AND_FORMATS, ids=str)
def test_squares_are_those_of_the_dense_gradient(name, dtype, projected, width):
    gradient, weights = gradient_at(2, width, dtype), new_rows(width, LAZY).weights_LX
    right = dense(gradient, weights.double(), how_of(1, LAZY, projected=projected)).square().sum(-1)
    found = form_of(name).row_squares(gradient, weights if projected else None)
    assert found.dtype == torch.float32
    longest = dense(gradient, weights.double(), how_of(1, LAZY)).square().sum(-1).max()
    assert torch.allclose(found.double(), right, rtol=1e-5, atol=1e-6 * float(longest))


@pytest.mark.parametrize("name", FORMS)
def test_weights_to_project_on_need_not_be_contiguous_floats(name):
    gradient = gradient_at(2, 9, torch.float32)
    wide = torch.randn(9, 2 * N_ROWS, generator=seeded(3))
    for weights in (wide.T[::2], wide.T[::2].bfloat16()):
        right = dense(gradient, weights.double(), how_of(1, LAZY, projected=True)).square().sum(-1)
        found = form_of(name).row_squares(gradient, weights)
        assert torch.allclose(found.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_no_rows_have_no_squares(name):
    empty = RowGradient(lists_of([], N_TABLE), torch.ones(0), torch.ones(N_TABLE, 3))
    assert form_of(name).row_squares(empty).shape == (0,)


@pytest.mark.parametrize("name", FORMS)
def test_a_gradient_that_is_no_number_is_seen(name):
    gradient = gradient_at(2, 9, torch.float32)
    gradient.weight_N[0] = torch.nan
    row = int(gradient.lists.items_N[0])
    squares = form_of(name).row_squares(gradient)
    assert squares.isnan().nonzero().tolist() == [[row]]
    rows = new_rows(9, LAZY)
    form_of(name).adam_rows(gradient, rows, how_of(1, LAZY))
    assert rows.weights_LX.isnan().all(-1).nonzero().tolist() == [[row]]


# --- what no compiled form takes ------------------------------------------------------------------


def test_moments_that_go_with_no_kernel_are_left_to_torch():
    """beta1 = 0 without the steps that rows were seen, and weights in float64."""
    gradient, how = gradient_at(1, 5, torch.float32), how_of(1, LAZY)
    rows, right = new_rows(5, LAZY), new_rows(5, LAZY)
    rows = replace(rows, seen_L=None)
    kernels.adam_rows(gradient, rows, how)
    reference.adam_rows(gradient, right, how)
    assert torch.allclose(rows.weights_LX, right.weights_LX, rtol=0, atol=1e-6)

    wide = AdamRows(rows.weights_LX.double(), None, rows.square_LX.double(), right.seen_L)
    alike = replace(wide, weights_LX=wide.weights_LX.clone(), square_LX=wide.square_LX.clone())
    kernels.adam_rows(gradient, replace(wide, seen_L=right.seen_L.clone()), how_of(2, LAZY))
    reference.adam_rows(gradient, alike, how_of(2, LAZY))
    assert torch.equal(wide.weights_LX, alike.weights_LX)

"""What is chosen from pre-activations: each form of the kernels against the reference and loops."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crosslens import kernels
from crosslens.functional import gathers
from crosslens.functional.gathers import Lists
from tests.kernel_forms import COMPILED, FORMS, form_of, same_lists, seeded

NAN, INF = math.nan, math.inf
FORMATS = [torch.float32, torch.bfloat16]


def random(b: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, n, generator=seeded(seed))


CASES = {
    "random": random(2, 70),
    "width 1": random(4, 1),
    "no rows": random(0, 9),
    "tied": random(2, 70).round(),
    "all tied": torch.full((1, 9), 1.5),
    "all negative": -random(1, 20).abs() - 1,
    "all zero": torch.zeros(1, 9),
    "zeros of both signs": torch.tensor([[-0.0, 0.0, -0.0, -1.0, 0.0, 1.0, -0.0]]),
    "all active": random(1, 20).abs() + 1,
    "none a number": torch.full((1, 5), NAN),
    "some no numbers": torch.tensor([[1.0, NAN, 5.0, -NAN, -2.0, 0.0, 4.0], [3.0] * 6 + [-NAN]]),
    "infinite": torch.tensor([[1.0, INF, -INF, 2.0, INF, -3.0, 0.0], [-INF] * 7]),
    "turned": random(9, 2).T,
    "every second": random(6, 14)[::2, ::2],
}
LARGEST = [{}, {"positive": True}, {"absolute": True}, {"absolute": True, "positive": True}]


FEWER = {torch.float32: [{"positive": True}], torch.bfloat16: [{"absolute": True}, {}]}


def values(pre: torch.Tensor, lists: Lists, row: int, absolute: bool) -> list[float]:
    """Of what was chosen from a row, sorted; what is no number, as more than infinite."""
    start, end = lists.starts_I[row], lists.starts_I[row + 1]
    found = pre[row, lists.index_N[start:end].long()].float()
    found = found.abs() if absolute else found
    return sorted((v == v, v) if v == v else (False, 0.0) for v in found.tolist())


def by_row(lists: Lists) -> list[list[int]]:
    return [part.tolist() for part in lists.index_N.split(lists.counts_I.tolist())]


def ascending(lists: Lists) -> bool:
    """Places of each row in order, none twice."""
    same_item = lists.items_N[1:] == lists.items_N[:-1]
    return bool((lists.index_N.diff() > 0)[same_item].all())


def as_good(pre: torch.Tensor, a: Lists, b: Lists, absolute: bool) -> bool:
    """The same numbers chosen from each row, whichever of equal ones."""
    rows = range(len(pre))
    return torch.equal(a.starts_I, b.starts_I) and all(
        values(pre, a, row, absolute) == values(pre, b, row, absolute) for row in rows
    )


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMS)
def test_the_largest_are_the_references(name, case, dtype):
    pre = CASES[case].to(dtype)
    for k, options in product({1, min(3, pre.shape[1]), pre.shape[1]}, LARGEST):
        if name == "triton" and (k != 3 or options not in FEWER[dtype]):
            continue  # a second each in its interpreter
        found = form_of(name).largest(pre, k, **options)
        right = gathers.largest(pre.double(), k, **options)
        assert found.index_N.dtype == torch.int32
        assert found.starts_I.dtype == torch.int64
        assert ascending(found)
        assert as_good(pre, found, right, "absolute" in options), (options, k)
        assert name == "stock" or same_lists(found, right), (options, k)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMS)
def test_those_above_are_the_references(name, case, dtype):
    pre = CASES[case].to(dtype)
    n = pre.shape[1]
    odd = torch.tensor([0.0, -0.0, INF, -INF, 1.0, -1.0, 1e-30]).repeat(n // 7 + 1)[:n]
    for bar in (torch.zeros(n), torch.randn(2 * n, generator=seeded(5))[::2], odd):
        found = form_of(name).above(pre, bar)
        assert found.index_N.dtype == torch.int32
        assert same_lists(found, gathers.above(pre.double(), bar.double()))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("width", [8192, 8193, 16384 + 67])
@pytest.mark.parametrize("name", COMPILED[:1])
def test_wide_rows_of_few_levels(name, width, dtype):
    """Counts that overflow 16 bits, and ties in every part of the row."""
    pre = torch.randint(-2, 3, (2, width), generator=seeded()).to(dtype)
    pre[1] = 1
    for k in (1, 64, width // 2, width):
        found = form_of(name).largest(pre, k)
        assert same_lists(found, gathers.largest(pre, k)), k
    assert same_lists(form_of(name).above(pre, pre[0].float()), gathers.above(pre, pre[0].float()))


@pytest.mark.parametrize("name", COMPILED[1:])
def test_rows_of_several_spans(name):
    pre = torch.randint(-2, 3, (1, 2 * 2048 + 67), generator=seeded()).float()
    for k in (1, 3000):
        assert same_lists(form_of(name).largest(pre, k), gathers.largest(pre, k)), k
    bar = torch.zeros(pre.shape[1])
    assert same_lists(form_of(name).above(pre, bar), gathers.above(pre, bar))


@pytest.mark.parametrize("name", COMPILED[:1])
def test_threads_choose_the_same(name):
    pre, before, found = random(40, 70).round(), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            kernels_of = form_of(name)
            found.append((kernels_of.largest(pre, 9), kernels_of.above(pre, torch.zeros(70))))
    finally:
        torch.set_num_threads(before)
    assert all(same_lists(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", COMPILED[1:])
def test_float16_is_chosen_from_too(name):
    pre = torch.cat([random(2, 9), torch.tensor([[6e-8, -6e-8], [INF, NAN]])], dim=1).half()
    for options in LARGEST:
        found, right = form_of(name).largest(pre, 4, **options), gathers.largest(pre, 4, **options)
        assert same_lists(found, right), options
    assert same_lists(form_of(name).above(pre, pre[0].float()), gathers.above(pre, pre[0]))


def loop_largest(row: list[float], k: int, absolute: bool, positive: bool) -> list[int]:
    def score(i: int) -> float:
        return INF if row[i] != row[i] else abs(row[i]) if absolute else row[i]

    order = sorted(range(len(row)), key=lambda i: (row[i] == row[i], -score(i), i))[:k]
    return sorted(i for i in order if not positive or score(i) > 0)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_loop(case):
    pre = CASES[case]
    bar = torch.randn(pre.shape[1], generator=seeded(5))
    for options in LARGEST:
        flags = [name in options for name in ("absolute", "positive")]
        k = min(3, pre.shape[1])
        right = [loop_largest(row, k, *flags) for row in pre.tolist()]
        found = gathers.largest(pre, k, **options)
        assert by_row(found) == right
    right = [[i for i, v in enumerate(row) if not v <= bar[i]] for row in pre.tolist()]
    assert by_row(gathers.above(pre, bar)) == right


# --- of a whole batch -----------------------------------------------------------------------------


def check_batch(pre: torch.Tensor, norm: torch.Tensor, n: int) -> None:
    """The choice is one of n best, to rounding; and so is the smallest score."""
    found, smallest = kernels.largest_of_batch(pre, norm, n)
    assert ascending(found)
    assert found.n_items == len(pre)
    score = pre.float().relu() * norm
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[found.items_N, found.index_N.long()] = True
    assert len(found.index_N) == min(n, int((~(score <= 0)).sum()))
    assert not (score[mask] <= 0).any()
    ranked = score.nan_to_num(nan=INF, posinf=INF)
    inside, outside = ranked[mask], ranked[~mask]
    if len(inside) and len(outside):
        assert inside.min() >= outside.max() * (1 - 1e-6)
    numbers = score[mask & (score < INF)]
    if len(numbers):
        assert smallest == numbers.min()
    assert bool(smallest == 0) == (not len(numbers))


@pytest.fixture(params=FORMS[:2])
def _form(request, monkeypatch):
    """The form that `kernels` takes for all calls."""
    monkeypatch.setattr(kernels, "chosen", lambda *_, **__: form_of(request.param))


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_choice_from_a_batch_is_one_of_best(case, dtype):
    pre = CASES[case].to(dtype)
    norm = torch.rand(pre.shape[1], generator=seeded(6)) + 0.5
    for n in sorted({0, 1, 4, pre.numel() // 2, pre.numel(), pre.numel() + 3}):
        check_batch(pre, norm, n)


@pytest.mark.usefixtures("_form")
def test_latents_without_norm_are_not_chosen():
    pre, norm = random(5, 12).abs() + 1, torch.rand(12, generator=seeded(6)) + 0.5
    norm[[0, 3, 11]] = 0
    for n in (1, 20, 45, 60):
        check_batch(pre, norm, n)
    check_batch(pre, torch.zeros(12), 7)


def test_few_passes_find_enough(monkeypatch):
    """However far off the guess is: here all scores are equal, and none is above it."""
    passes = []
    monkeypatch.setattr(
        kernels, "above", lambda pre, bar: passes.append(1) or gathers.above(pre, bar)
    )
    check_batch(torch.ones(40, 8), torch.ones(8), 320)
    assert len(passes) <= 4


@pytest.mark.parametrize("misleading", [0.0, 1.0, 1e6, INF, NAN])
def test_a_sample_that_misleads_does_no_harm(misleading):
    """Only rows that the guess looks at, or only others, have what is to be chosen."""
    pre = random(4 * kernels.SAMPLE, 8)
    step = min(kernels.SAMPLE, len(pre) // kernels.SAMPLE)
    assert step > 1
    pre[::step] = misleading
    for n in (1, 8, 100, 300, pre.numel()):
        check_batch(pre, torch.ones(8), n)


def test_the_reference_of_a_batch_is_the_loop():
    pre, norm = random(4, 6), random(1, 6, seed=1)[0].abs() + 0.1
    for n in (1, 5, 24, 30):
        found, smallest = gathers.largest_of_batch(pre, norm, n)
        scored = [
            (v * float(norm[i]), b, i)
            for b, row in enumerate(pre.tolist())
            for i, v in enumerate(row)
            if v > 0
        ]
        kept = sorted(scored, reverse=True)[:n]
        assert list(zip(found.items_N.tolist(), found.index_N.tolist(), strict=True)) == sorted(
            (b, i) for _, b, i in kept
        )
        assert float(smallest) == pytest.approx(kept[-1][0])


# --- whatever the numbers -------------------------------------------------------------------------

ODD = st.sampled_from([0.0, -0.0, 1.0, -1.0, NAN, -NAN, INF, -INF, 1e-40, -1e-40, 3.4e38])
NUMBERS = st.one_of(ODD, st.floats(width=32), st.integers(-3, 3).map(float))
ROWS = st.integers(1, 70).flatmap(
    lambda n: st.lists(st.lists(NUMBERS, min_size=n, max_size=n), min_size=1, max_size=3)
)
NATIVE = pytest.mark.parametrize("name", COMPILED[:1])


@NATIVE
@settings(max_examples=100, deadline=None)
@given(rows=ROWS, k=st.integers(1, 80), dtype=st.sampled_from(FORMATS), data=st.data())
def test_any_rows_give_the_references_choice(name, rows, k, dtype, data):
    pre = torch.tensor(rows).to(dtype)
    options = data.draw(st.sampled_from(LARGEST))
    found = form_of(name).largest(pre, k, **options)
    assert same_lists(found, gathers.largest(pre, k, **options))
    stock = form_of("stock").largest(pre, min(k, pre.shape[1]), **options)
    assert as_good(pre, stock, found, "absolute" in options)
    bar = torch.tensor(data.draw(st.lists(NUMBERS, min_size=pre.shape[1], max_size=pre.shape[1])))
    right = gathers.above(pre, bar)
    assert same_lists(form_of(name).above(pre, bar), right)
    assert same_lists(form_of("stock").above(pre, bar), right)


USUAL = st.one_of(st.just(0.0), st.integers(-3, 3).map(float), st.floats(-100, 100, width=16))


@settings(max_examples=70, deadline=None)
@given(
    rows=st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(USUAL, min_size=n, max_size=n), min_size=1, max_size=40)
    ),
    n=st.integers(0, 400),
    data=st.data(),
)
@example(rows=[[1.0]], n=0, data=None)
def test_any_batch_gives_one_of_best(rows, n, data):
    pre = torch.tensor(rows)
    norms = [0.0, 0.5, 1.0, 3.0]
    norm = torch.ones(pre.shape[1])
    if data is not None:
        norm = torch.tensor([data.draw(st.sampled_from(norms)) for _ in norm])
    check_batch(pre, norm, n)

"""Sums and products over lists: each form of the kernels against float64, that against loops."""

from __future__ import annotations

import pytest
import torch

from crosslens.functional import gathers
from crosslens.functional.gathers import Lists
from tests.kernel_forms import COMPILED, FORMS, form_of, lists_of, seeded

N_TABLE = 23
MIXED = [3, 0, 8, 1, 0, 0, 17, 9, 4, 0]
LENGTHS = {
    "mixed": MIXED,
    "one has all": [0, 0, 40, 0],
    "no pairs": [0, 0, 0],
    "no items": [],
}
FORMATS = [torch.float32, torch.bfloat16]


def close(found: torch.Tensor, right: torch.Tensor, size: torch.Tensor, part: float) -> bool:
    """Within a part of the sum of the sizes of what was added, as rounding leaves it."""
    return found.shape == right.shape and bool(
        ((found.double() - right).abs() <= part * size + 1e-30).all()
    )


def rounding(name: str, dtype: torch.dtype) -> float:
    """Torch's bags weigh and return bfloat16 rows in bfloat16; all else adds in float32."""
    return 2.0**-7 if name == "stock" and dtype != torch.float32 else 2e-6


def check_bag_sum(name: str, lists: Lists, weight: torch.Tensor, table: torch.Tensor) -> None:
    found = form_of(name).bag_sum(lists, weight, table)
    assert found.dtype == torch.float32
    right = gathers.bag_sum(lists, weight.double(), table.double())
    size = gathers.bag_sum(lists, weight.double().abs(), table.double().abs())
    assert close(found, right, size, rounding(name, table.dtype))


def check_products(name: str, lists: Lists, rows: torch.Tensor, table: torch.Tensor) -> None:
    found = form_of(name).products(lists, rows, table)
    assert found.dtype == torch.float32
    right = gathers.products(lists, rows.double(), table.double())
    size = gathers.products(lists, rows.double().abs(), table.double().abs())
    assert close(found, right, size, 2e-6)


@pytest.mark.parametrize("width", [1, 131])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", FORMS)
def test_sums_and_products_are_those_in_float64(name, lengths, dtype, width):
    lists = lists_of(lengths, N_TABLE)
    table = torch.randn(N_TABLE, width, generator=seeded(1)).to(dtype)
    weight = torch.randn(len(lists.index_N), generator=seeded(2))
    check_bag_sum(name, lists, weight, table)
    check_products(name, lists, torch.randn(len(lengths), width, generator=seeded(3)), table)


@pytest.mark.parametrize("name", FORMS)
def test_more_columns_than_a_block(name):
    lists = lists_of([9, 0, 5], N_TABLE)
    table = torch.randn(N_TABLE, 1100, generator=seeded(1))
    check_bag_sum(name, lists, torch.randn(14, generator=seeded(2)), table)
    check_products(name, lists, torch.randn(3, 1100, generator=seeded(3)), table)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_nothing_need_be_contiguous(name, dtype):
    wide = torch.randn(14, 2 * N_TABLE, generator=seeded(1)).to(dtype)
    table = wide.T[::2]
    dense = lists_of(MIXED, N_TABLE)
    index = torch.stack([dense.index_N, dense.index_N + 1], dim=1)[:, 0]
    starts = torch.stack([dense.starts_I, dense.starts_I + 1], dim=1)[:, 0]
    lists = Lists(starts, index)
    weight = torch.randn(len(index), 3, generator=seeded(2))[:, 1]
    rows = torch.randn(14, lists.n_items, generator=seeded(3)).T
    assert not any(t.is_contiguous() for t in (table, index, starts, weight, rows))
    check_bag_sum(name, lists, weight, table)
    check_products(name, lists, rows, table)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_with_those_that_have_it(name, odd, dtype):
    table = torch.ones(N_TABLE, 5, dtype=dtype)
    table[0, 3] = odd
    index = torch.tensor([1, 2, 3, 0, 4, 5], dtype=torch.int32)
    lists = Lists(torch.tensor([0, 3, 3, 5, 6]), index)
    sums = form_of(name).bag_sum(lists, torch.ones(6), table)
    right = torch.tensor([[3.0] * 5, [0.0] * 5, [2.0] * 3 + [odd, 2.0], [1.0] * 5])
    assert torch.equal(sums.nan_to_num(nan=-7), right.nan_to_num(nan=-7))
    pulls = form_of(name).products(lists, torch.ones(4, 5), table)
    right = torch.tensor([5.0, 5.0, 5.0, odd, 5.0, 5.0])
    assert torch.equal(pulls.nan_to_num(nan=-7), right.nan_to_num(nan=-7))


def test_rows_of_products_may_be_short_floats():
    lists, table = lists_of([3, 2], N_TABLE), torch.randn(N_TABLE, 9, generator=seeded())
    rows = torch.randn(2, 9, generator=seeded(1)).bfloat16()
    for name in ("native", "stock"):
        check_products(name, lists, rows, table)


def test_torch_adds_float64_in_float64():
    lists, table = (
        lists_of([3, 0, 2], N_TABLE),
        torch.randn(N_TABLE, 9, generator=seeded()).double(),
    )
    weight = torch.randn(5, generator=seeded(1)).double()
    found = form_of("stock").bag_sum(lists, weight, table)
    assert torch.allclose(found, gathers.bag_sum(lists, weight, table), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", COMPILED[:1])
def test_threads_do_not_change_a_bit(name):
    lists = lists_of(MIXED * 20, N_TABLE)
    table = torch.randn(N_TABLE, 131, generator=seeded(1)).bfloat16()
    weight = torch.randn(len(lists.index_N), generator=seeded(2))
    rows = torch.randn(lists.n_items, 131, generator=seeded(3))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            kernels = form_of(name)
            found.append(
                (kernels.bag_sum(lists, weight, table), kernels.products(lists, rows, table))
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_reference_is_the_loop():
    lists = lists_of(MIXED, N_TABLE)
    table = torch.randn(N_TABLE, 4, generator=seeded(1)).double()
    weight = torch.randn(len(lists.index_N), generator=seeded(2)).double()
    rows = torch.randn(lists.n_items, 4, generator=seeded(3)).double()
    sums, pulls = torch.zeros(lists.n_items, 4).double(), []
    for item, (start, end) in enumerate(zip(lists.starts_I[:-1], lists.starts_I[1:], strict=True)):
        for pair in range(int(start), int(end)):
            row = table[int(lists.index_N[pair])]
            sums[item] += weight[pair] * row
            pulls.append(sum(a * b for a, b in zip(rows[item].tolist(), row.tolist(), strict=True)))
    assert torch.allclose(gathers.bag_sum(lists, weight, table), sums)
    assert gathers.products(lists, rows, table).tolist() == pytest.approx(pulls)


def test_pairs_turned_are_the_same_pairs():
    lists = lists_of(MIXED, N_TABLE)
    turned, order = lists.turned(N_TABLE)
    assert turned.n_items == N_TABLE
    pairs = list(zip(lists.items_N.tolist(), lists.index_N.tolist(), strict=True))
    back = list(zip(turned.index_N.tolist(), turned.items_N.tolist(), strict=True))
    assert back == [pairs[i] for i in order.tolist()]
    assert sorted(pairs, key=lambda pair: pair[1]) == back  # ascending items: sorted() is stable

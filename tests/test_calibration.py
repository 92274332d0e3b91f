"""What is measured of a machine, how it is kept, and the share at which steps become sparse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crosslens.allocator import KEPT, keep_freed_memory
from crosslens.kernels import calibration, cost, measuring
from crosslens.kernels.calibration import LENGTHS, Calibration, Measured, Rates, Size
from crosslens.kernels.choice import ASSUMED, break_even

CPU = torch.device("cpu")
SIZE = Size(rows=100, read=20, written=30, latents=1000)
RATES = Rates(
    encode=1e9,
    decode=2e9,
    weights=4e9,
    bag_rows=1e8,
    products=2e8,
    # 2 ns for a number, and 1 ns for each row that is added to it.
    sums=tuple(1 / (2e-9 + 1e-9 * n) for n in LENGTHS),
    look=1e8,
    take=1e7,
    sort=2e7,
    adam_rows=1e8,
    adam=5e7,
    norms=1e9,
    write=1e10,
    fresh=1e9,
    block=1e9,
    calls=1e6,
)
SLOWER_GATHERS = ("bag_rows", "products", "look", "take", "sort", "adam_rows")
SLOWER_PRODUCTS = ("encode", "decode", "weights", "adam", "write", "block")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CROSSLENS_CACHE", str(tmp_path))
    return tmp_path


def table(**of_dtype: Rates) -> Calibration:
    """The same size for each format, on this machine."""
    measured = tuple(Measured(dtype=d, size=SIZE, rates=r) for d, r in of_dtype.items())
    return Calibration(facts=calibration.machine_facts(CPU), measured=measured, seconds=1.5)


# ── the share ──


def test_both_forms_by_hand():
    whole = cost.with_whole_code(RATES, SIZE, torch.bfloat16, effort=10.0)
    # 100 × 1000 places, 2 operations each for every one of the numbers read or written.
    assert whole == pytest.approx(
        {
            "selection": 6.5 * 2e5 / 1e10 + 10 * 1e5 / 1e9,
            "decoder": 2e5 * 30 / 2e9,
            "code's gradient": 2e5 * 30 / 1e9,
            "weights' gradient": 2e5 * 50 / 4e9,
            "optimizer": 50_000 / 5e7,
        }
    )
    some = cost.with_entries(RATES, SIZE, torch.bfloat16, 8)  # 800 pairs
    assert some == pytest.approx(
        {
            "selection": 1e5 / 1e8 + 800 / 1e7,
            "decoder": 800 * 30 * 2 / 1e8,
            "code's gradient": 800 * 30 * 2 / 2e8,
            "weights' gradient": 2 * (800 / 2e7 + 50_000 * 2e-9 + 800 * 50 * 1e-9),
            "optimizer": 50_000 / 1e8,
        }
    )


def test_the_break_even_share_by_hand():
    whole = sum(cost.with_whole_code(RATES, SIZE, torch.float32).values())
    fixed = 1e5 / 1e8 + 2 * 50_000 * 2e-9 + 50_000 / 1e8
    # What an entry in every row adds: 100 pairs, taken, gathered twice, sorted and summed twice.
    each = 100 * (1 / 1e7 + 30 * 4 / 1e8 + 30 * 4 / 2e8 + 2 * (1 / 2e7 + 50 * 1e-9))
    share = (whole - fixed) / each / 1000
    assert 0.001 < share < 0.5
    assert cost.balance(RATES, SIZE, torch.float32) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("rate", [*SLOWER_GATHERS, *SLOWER_PRODUCTS])
def test_the_share_moves_with_each_rate(rate: str):
    before = cost.balance(RATES, SIZE, torch.bfloat16)
    after = cost.balance(replace(RATES, **{rate: getattr(RATES, rate) / 2}), SIZE, torch.bfloat16)
    assert after < before if rate in SLOWER_GATHERS else after > before


def test_the_share_stays_in_its_bounds():
    slow = replace(RATES, adam_rows=1.0)
    assert cost.balance(slow, SIZE, torch.float32) == 0
    fast = replace(RATES, decode=1.0)
    assert cost.balance(fast, SIZE, torch.float32) == pytest.approx(1)


def test_sums_lie_on_the_lines_between_what_was_measured():
    bent = replace(RATES, sums=(1.0, 0.5, 0.1, 0.05))  # 1, 2, 10 and 20 s at 1, 4, 16, 64 rows
    for length, seconds in ((1, 1), (2.5, 1.5), (4, 2), (10, 6), (16, 10), (40, 15), (112, 30)):
        assert bent.sum_seconds(10, 3, 10 * length) == pytest.approx(30 * seconds)
    assert bent.sum_seconds(10, 3, 0) == pytest.approx(30 * 2 / 3)


def test_large_results_are_written_to_new_memory():
    assert RATES.pass_seconds(KEPT) == pytest.approx(KEPT / 1e10)
    assert RATES.pass_seconds(KEPT + 1) == pytest.approx(KEPT / 1e9)


# ── what is kept ──


def test_without_a_calibration_the_share_is_assumed(own_cache: Path):
    found = calibration.find(CPU)
    assert (found.calibration, found.reason) == (None, "never measured")
    assert break_even(torch.bfloat16, CPU) == ASSUMED["cpu", torch.bfloat16]
    assert 0 < break_even(torch.float64, CPU) < 1


def test_a_calibration_is_found_again():
    table_here = table(bfloat16=RATES, float32=replace(RATES, encode=1e8))
    path = calibration.save(table_here)
    found = calibration.find(CPU)
    assert found.calibration == table_here
    assert (found.reason, found.path) == ("", path)
    expected = cost.balance(RATES, SIZE, torch.bfloat16)
    assert break_even(torch.bfloat16, CPU, SIZE) == expected
    assert break_even(torch.float32, CPU, SIZE) > expected
    assert break_even(torch.float64, CPU, SIZE) < 0.1, "of this nothing was measured"


def test_a_new_calibration_replaces_the_old():
    calibration.save(table(bfloat16=RATES))
    assert calibration.find(CPU).calibration is not None
    slow = replace(RATES, encode=1e6)
    calibration.save(table(bfloat16=slow))
    found = calibration.find(CPU).calibration
    assert found is not None
    assert found.measured[0].rates == slow


def test_one_of_other_settings_does_not_count(monkeypatch: pytest.MonkeyPatch):
    calibration.save(table(bfloat16=RATES))
    monkeypatch.setattr(calibration.torch, "get_num_threads", lambda: 1234)
    found = calibration.find(CPU)
    assert found.calibration is None
    assert "other settings" in found.reason


def damaged(plain: dict, how: str) -> str:
    first = plain["measured"][0]
    match how:
        case "cut short":
            return json.dumps(plain)[:-30]
        case "not a mapping":
            return "[1, 2]"
        case "empty":
            plain["measured"] = []
        case "a rate is missing":
            del first["rates"]["encode"]
        case "a rate is 0":
            first["rates"]["adam"] = 0
        case "a rate is a word":
            first["rates"]["adam"] = "fast"
        case "too few sums":
            first["rates"]["sums"].pop()
        case "one rate too many":
            first["rates"]["more"] = 1.0
        case "another format":
            plain["format"] = 99
        case "another machine":
            plain["facts"]["processor"] = "Z80"
    return json.dumps(plain)


@pytest.mark.parametrize(
    "how",
    [
        "cut short",
        "not a mapping",
        "empty",
        "a rate is missing",
        "a rate is 0",
        "a rate is a word",
        "too few sums",
        "one rate too many",
        "another format",
        "another machine",
    ],
)
def test_a_damaged_calibration_is_told_and_not_used(how: str):
    path = calibration.save(table(bfloat16=RATES))
    path.write_text(damaged(json.loads(path.read_text()), how))
    found = calibration.find(CPU)
    assert found.calibration is None
    assert str(path) in found.reason
    assert "damaged" in found.reason
    assert break_even(torch.bfloat16, CPU) == ASSUMED["cpu", torch.bfloat16]


def test_the_nearest_shape_is_nearest_in_ratio():
    narrow, wide = replace(RATES, encode=1.0), replace(RATES, encode=2.0)
    sizes = (replace(SIZE, latents=1000), replace(SIZE, latents=64_000))
    both = tuple(
        Measured(dtype="float32", size=s, rates=r)
        for s, r in zip(sizes, (narrow, wide), strict=True)
    )
    known = Calibration(facts={}, measured=both, seconds=0.0)
    for latents, rates in ((10, narrow), (7000, narrow), (9000, wide), (10**7, wide)):
        assert known.rates(torch.float32, replace(SIZE, latents=latents)) == rates
    assert known.rates(torch.bfloat16, SIZE) is None


# ── measuring ──


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BUDGET": 0.0, "LARGE": 1 << 10, "CALLS": 2}.items():
        monkeypatch.setattr(measuring, name, value)


@pytest.mark.usefixtures("hasty")
def test_every_rate_of_every_format_is_measured():
    sizes = (replace(SIZE, rows=32, latents=96), replace(SIZE, rows=16, latents=64))
    heard: list[tuple[int, int]] = []
    found = measuring.measure(CPU, lambda done, total: heard.append((done, total)), sizes)
    assert [(m.dtype, m.size) for m in found.measured] == [
        (name, size) for size in sizes for name in ("bfloat16", "float32")
    ]
    assert heard == [(i, 4) for i in range(5)]
    assert found.facts == calibration.machine_facts(CPU)
    assert found.seconds > 0
    calibration.save(found)
    assert calibration.find(CPU).calibration == found
    assert 0 <= break_even(torch.bfloat16, CPU, sizes[0]) <= 1


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch):
    """Every call is said to take half a second, so that what differs between two takes nothing."""

    def half_a_second(work: Callable[[], object], device: torch.device) -> float:
        work()
        return 0.5

    monkeypatch.setattr(measuring, "seconds", half_a_second)
    monkeypatch.setattr(measuring, "LARGE", 1 << 10)
    size = Size(rows=32, read=20, written=20, latents=96)
    rates = measuring.rates_of(size, torch.bfloat16, CPU)
    assert rates.encode == rates.decode == rates.weights == 2 * 32 * 96 * 20 / 0.5
    assert rates.bag_rows == rates.products == 32 * measuring.MANY * 20 * 2 / 0.5
    assert rates.sums == (96 * 20 / 0.5,) * len(LENGTHS)
    assert rates.adam == 96 * 20 / 0.5
    assert rates.adam_rows == pytest.approx(96 * 20 / 0.05), "a tenth of the whole, at least"
    assert rates.write == rates.fresh == 4 * (1 << 10) / 0.5


def test_keeping_freed_memory_says_whether_it_could(monkeypatch: pytest.MonkeyPatch):
    class Elsewhere:
        """A C library without `mallopt`."""

    monkeypatch.setattr("ctypes.CDLL", lambda name: Elsewhere())
    assert keep_freed_memory() is False

"""Machines without a compiler, their own vectors or a cache, and formats without a kernel: the same
results, and one line that says so."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch

from crosslens import kernels
from crosslens.functional import gathers
from crosslens.functional.adam import AdamRows, AdamStep, RowGradient
from crosslens.kernels import build, dispatch, native
from tests.kernel_forms import lists_of, same_lists, seeded

NEEDS_COMPILER = pytest.mark.skipif(build._compiler() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """Nothing compiled, found or said yet; and afterwards again."""
    monkeypatch.setenv("CROSSLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cached = (build.built, dispatch._triton, dispatch._say)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def some_results() -> list[torch.Tensor]:
    """Of every kernel: sums that bfloat16 holds exactly, and choices without ties."""
    lists = lists_of([3, 0, 17, 8, 1], 9)
    table = torch.randint(-2, 3, (9, 70), generator=seeded()).bfloat16()
    weight = torch.ones(len(lists.index_N))
    pre = torch.randn(6, 300, generator=seeded(1))
    chosen = kernels.largest(pre, 20, positive=True)
    over = kernels.above(pre, torch.zeros(300))
    best, smallest = kernels.largest_of_batch(pre, torch.rand(300, generator=seeded(2)), 50)
    gradient = RowGradient(lists, weight, table)
    weights, square = torch.randn(5, 70, generator=seeded(3)), torch.ones(5, 70)
    rows = AdamRows(weights, torch.zeros(5, 70), square, None, weights.bfloat16())
    how = AdamStep(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, step=3, projected=True)
    kernels.adam_rows(gradient, rows, how)
    return [
        kernels.bag_sum(lists, weight, table),
        kernels.products(lists, torch.ones(5, 70), table),
        kernels.row_squares(gradient, torch.randn(5, 70, generator=seeded(4))),
        *(t for found in (chosen, over, best) for t in (found.starts_I, found.index_N)),
        smallest,
        *(t for t in vars(rows).values() if t is not None),
    ]


@pytest.fixture(scope="module")
def right() -> list[torch.Tensor]:
    """The results of the kernels as this machine makes them, or of torch where it cannot."""
    build.built.cache_clear()
    return some_results()


def agree(found: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(found) == len(right) == 14 and all(
        a.dtype == b.dtype and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)
        for a, b in zip(found[:-1], right[:-1], strict=True)
    )


def messages(caplog) -> list[str]:
    assert all(r.levelno == logging.WARNING for r in caplog.records)
    return [record.getMessage() for record in caplog.records]


def script(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_switched_off_by_hand_it_says_nothing(monkeypatch, right, caplog):
    monkeypatch.setenv(build.SWITCH, "stock")
    assert agree(some_results(), right)
    assert not native.takes(torch.zeros(1))
    assert build.SWITCH in build.built().reason
    assert messages(caplog) == []


def test_without_a_compiler_torch_does_it_and_one_line_says_so(
    monkeypatch, right, caplog, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert agree(some_results(), right)
    assert agree(some_results(), right)
    assert len(messages(caplog)) == 1
    assert "no C compiler" in messages(caplog)[0]


def test_a_compiler_that_fails_is_told_of_in_its_own_words(monkeypatch, right, caplog, tmp_path):
    words = "cc1: fatal error: no such luck"
    monkeypatch.setenv("CC", script(tmp_path, "cc", f"echo '{words}' >&2; exit 1"))
    assert agree(some_results(), right)
    assert len(messages(caplog)) == 1
    assert words in messages(caplog)[0]


def test_a_compiler_that_fails_without_a_word(monkeypatch, right, caplog):
    monkeypatch.setenv("CC", "false")
    assert agree(some_results(), right)
    assert len(messages(caplog)) == 1
    assert "false" in messages(caplog)[0]


def test_a_folder_that_cannot_be_written(monkeypatch, right, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CROSSLENS_CACHE", str(tmp_path / "file"))
    assert agree(some_results(), right)
    assert len(messages(caplog)) <= 1
    if build._compiler():
        assert str(tmp_path / "file") in messages(caplog)[0]


@NEEDS_COMPILER
def test_a_damaged_library_is_not_used(right, caplog):
    path = build.cache_folder() / "kernels" / f"rows-{build._fingerprint(build._compiler())}.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF and no more")
    assert build.built().compiled is None
    assert agree(some_results(), right)
    assert str(path.parent) in messages(caplog)[0]


@NEEDS_COMPILER
def test_without_this_machines_vectors_the_numbers_are_the_same(monkeypatch, right, caplog):
    monkeypatch.setattr(build, "NATIVE", ("",))
    assert agree(some_results(), right)
    assert native.takes(torch.zeros(1))
    assert messages(caplog) == []


@NEEDS_COMPILER
def test_a_compiler_that_knows_no_native_compiles_portably(monkeypatch, right, caplog, tmp_path):
    real, log = " ".join(build._compiler()), tmp_path / "log"
    refuse = 'case "$*" in *=native*) exit 1;; esac'
    monkeypatch.setenv(
        "CC", script(tmp_path, "oldcc", f'echo "$*" >> {log}\n{refuse}\nexec {real} "$@"')
    )
    assert agree(some_results(), right)
    assert native.takes(torch.zeros(1))
    assert build.built().reason == "compiled with oldcc"
    lines = log.read_text().splitlines()
    # Files are compiled beside one another: when one is refused, others may not have begun.
    tries = groupby(next((n for n in build.NATIVE[:2] if n in line), "") for line in lines)
    counts = {flag: len(list(these)) for flag, these in tries}
    assert list(counts) == [*build.NATIVE[:2], ""]
    assert counts[""] == len(build.OBJECTS) + 1  # each object, and the library of them
    assert all(1 <= n <= len(build.OBJECTS) for flag, n in counts.items() if flag)
    assert messages(caplog) == []


@NEEDS_COMPILER
def test_what_was_compiled_is_kept(monkeypatch):
    first = build.built().compiled._name
    build.built.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert build.built().compiled._name == first
    assert [path.name for path in Path(first).parent.iterdir()] == [Path(first).name]


@NEEDS_COMPILER
def test_another_processor_gets_its_own(monkeypatch):
    first = build._fingerprint(["cc"])
    monkeypatch.setattr(build, "_processor", lambda: "model name: another")
    assert build._fingerprint(["cc"]) != first


@NEEDS_COMPILER
def test_formats_without_a_kernel_are_named_once_each(caplog):
    lists = lists_of([2, 0, 3], 4)
    for dtype in (torch.float64, torch.float64, torch.float16):
        table = torch.randint(-2, 3, (4, 6), generator=seeded()).to(dtype)
        found = kernels.bag_sum(lists, torch.ones(5), table)
        assert torch.equal(found.double(), gathers.bag_sum(lists, torch.ones(5), table).double())
        pre = torch.randn(2, 9, generator=seeded()).to(dtype)
        assert same_lists(kernels.largest(pre, 3), gathers.largest(pre, 3))
    assert len(messages(caplog)) == 2
    assert "float64 on cpu" in messages(caplog)[0]
    assert "float16 on cpu" in messages(caplog)[1]
    kernels.bag_sum(lists, torch.ones(5), table.float())
    assert len(messages(caplog)) == 2


def test_who_runs_a_command_sees_the_line_once(tmp_path):
    code = (
        "import torch; from crosslens import kernels;"
        "[kernels.largest(torch.ones(2, 3), 1) for _ in range(3)]"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "CC": "", "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == ""
    assert ran.stderr.count("no C compiler") == 1
    assert len(ran.stderr.strip().splitlines()) == 1

"""What the interpreter does not show of Triton's kernels: that GPUs have them, and who is asked."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.kernel_forms import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no triton")

POINTERS = {"starts": "i64", "index": "i32", "seen": "i32", "counts": "i64"}
WHOLE = {"width": "i32", "k": "i32", "step": "i32", "salt": "i64"}
REAL = ("lr", "fresh1", "fresh2", "beta2", "log2_beta2", "over", "eps")
FIXED = {"PAIRS": 8, "COLUMNS": 64, "SPAN": 128, "SHIFT": 16}
VARIANTS = {
    "bag_sum": [{}, {"width": 1}],
    "products": [{}, {"width": 1}],
    "row_squares": [{}, {"weights": None}],
    "adam_rows": [
        {"seen": None, "PROJECTED": True},
        {"mean": None, "copy": None, "PROJECTED": False, "step": 1, "width": 1},
        {"mean": "bf16", "square": "bf16", "seen": None, "PROJECTED": True},
    ],
    "largest": [
        {"ABSOLUTE": False, "POSITIVE": True, "out": "i32"},
        {"ABSOLUTE": True, "POSITIVE": False, "out": "i32", "k": 1, "width": 1},
    ],
    "count_above": [{}],
    "places_above": [{"out": "i32"}],
}
"""What is known when a kernel is compiled: numbers that are 1, and what is not given."""


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The assembly of a kernel for compute capability 8.0, which needs no GPU to be made."""
    for name, value in (
        ("TRITON_INTERPRET", "0"),
        ("TRITON_DEFAULT_FP_FUSION", "1"),
        ("TRITON_CACHE_DIR", str(tmp_path)),
    ):
        monkeypatch.setenv(name, value)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from crosslens.kernels import triton_programs

    def compile_for_gpu(name: str, given: dict) -> str:
        program = getattr(triton_programs, name)
        known = {**FIXED, **{n: v for n, v in given.items() if not isinstance(v, str)}}
        signature, constants = {}, {}
        for place, argument in enumerate(program.arg_names):
            if argument in known:
                signature[argument], constants[(place,)] = "constexpr", known[argument]
            elif argument in WHOLE or argument in REAL:
                signature[argument] = WHOLE.get(argument, "fp32")
            else:
                signature[argument] = "*" + given.get(argument, POINTERS.get(argument, "fp32"))
        source = ASTSource(program, signature, constants)
        return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]

    return compile_for_gpu


@pytest.mark.parametrize("name", VARIANTS)
def test_kernels_compile_for_a_gpu(name, compiled):
    for given in VARIANTS[name]:
        assert f".entry {name}" in compiled(name, given)


def test_the_copy_is_rounded_to_nearest_on_a_gpu(compiled):
    given = {"seen": None, "PROJECTED": False, "copy": "bf16", "table": "bf16"}
    assert "cvt.rn.bf16" in compiled("adam_rows", given)


ASKED = """
import os, torch
from crosslens import kernels
from crosslens.kernels import dispatch, triton_rows
pre = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
lists, _ = kernels.largest_of_batch(pre.half(), torch.ones(40), 7)
print(len(lists.index_N), dispatch.chosen(pre.half()) is triton_rows)
print(dispatch.chosen(pre.double()) is triton_rows)
os.environ["CROSSLENS_KERNELS"] = "stock"
dispatch._triton.cache_clear()
print(dispatch.chosen(pre.half()) is triton_rows)
"""


def test_it_is_asked_where_it_takes_the_format(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", ASKED],
        env={**os.environ, "TRITON_INTERPRET": "1", "CROSSLENS_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["7", "True", "False", "False"]
    assert ran.stderr.count("float64 on cpu") == len(ran.stderr.splitlines()) == 1

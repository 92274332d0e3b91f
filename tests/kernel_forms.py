"""The forms of the kernels that the tests compare, and lists to give them."""

from __future__ import annotations

import functools
import importlib.util
import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from crosslens.functional.gathers import Lists, starts_of
from crosslens.kernels import build, native, stock

HAS_TRITON = importlib.util.find_spec("triton") is not None
FORMS = [
    pytest.param(
        "native", marks=pytest.mark.skipif(build._compiler() is None, reason="no C compiler")
    ),
    "stock",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no triton")),
]
COMPILED = FORMS[::2]
"""Those that are the same everywhere, to ties at a cut and to the precision of sums."""


@functools.cache
def form_of(name: str) -> Any:
    if name == "native":
        assert build.built().compiled is not None, build.built().reason
        return native
    return stock if name == "stock" else Apart()


class Apart:
    """Triton's kernels, in a process that switches its interpreter on before it imports it; where
    there is a GPU, on that."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_switch_on)

    def __getattr__(self, name: str):
        return functools.partial(self._ask, name)

    def _ask(self, name: str, *given: Any, **options: Any) -> Any:
        sent = _packed((given, options))
        result, after = _unpacked(self.pool.submit(_answer, name, sent).result(), "cpu")
        if name == "adam_rows":  # what was changed there is to be changed here
            for field, tensor in vars(given[1]).items():
                if tensor is not None:
                    tensor.copy_(getattr(after[1], field))
        return result


def _switch_on() -> None:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def _answer(name: str, sent: bytes) -> bytes:
    from crosslens.kernels import triton_rows

    given, options = _unpacked(sent, "cuda" if torch.cuda.is_available() else "cpu")
    return _packed((getattr(triton_rows, name)(*given, **options), given))


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes, device: str) -> Any:
    return torch.load(io.BytesIO(packed), map_location=device, weights_only=False)


def seeded(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def lists_of(counts: list[int], n_table: int, seed: int = 0) -> Lists:
    """Lists of these lengths, of random rows of a table: in no order, and some more than once."""
    index = torch.randint(n_table, (sum(counts),), generator=seeded(seed), dtype=torch.int32)
    return Lists(starts_of(torch.tensor(counts, dtype=torch.int64)), index)


def same_lists(a: Lists, b: Lists) -> bool:
    return torch.equal(a.starts_I, b.starts_I) and torch.equal(a.index_N, b.index_N)

"""Which form of the kernels does a call: by the device and the format of its tensors."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from crosslens.functional.adam import AdamRows, AdamStep, RowGradient
from crosslens.functional.gathers import Lists
from crosslens.kernels import native, stock
from crosslens.kernels.build import SWITCH, built

_log = logging.getLogger(__name__)


@runtime_checkable
class Kernels(Protocol):
    """What each form has."""

    def bag_sum(self, lists: Lists, weight_N: Tensor, table_TX: Tensor) -> Tensor: ...

    def products(self, lists: Lists, rows_IX: Tensor, table_TX: Tensor) -> Tensor: ...

    def largest(
        self, pre_BL: Tensor, k: int, *, absolute: bool = False, positive: bool = False
    ) -> Lists: ...

    def above(self, pre_BL: Tensor, bar_L: Tensor) -> Lists: ...

    def row_squares(self, gradient: RowGradient, project_on_LX: Tensor | None = None) -> Tensor: ...

    def adam_rows(self, gradient: RowGradient, rows: AdamRows, how: AdamStep) -> None: ...


def chosen(*tensors: Tensor | None, fit: bool = True) -> Kernels:
    """The fast kernels that take all of the tensors; where none do, `stock`, and the log says why,
    once for each reason.

    Args:
        fit: whether the kernels know their formats together, too.
    """
    known = [t for t in tensors if t is not None]
    if fit and native.takes(*known):
        return native
    if fit and (known[0].is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        on_gpu = _triton()
        if on_gpu is not None and on_gpu.takes(*known):
            kernels: Kernels = on_gpu
            return kernels
    if os.environ.get(SWITCH) != "stock":
        _say(_why_none(known))
    return stock


@functools.cache
def _triton() -> Any:
    """The kernels in Triton, imported when first wanted; None where they cannot be."""
    if os.environ.get(SWITCH) == "stock" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("crosslens.kernels.triton_rows")


def _why_none(tensors: list[Tensor]) -> str:
    device = tensors[0].device.type
    if device == "cuda" and _triton() is None:
        return "triton is not installed"
    if device == "cpu" and built().compiled is None:
        return built().reason
    formats = sorted({str(t.dtype).removeprefix("torch.") for t in tensors})
    return f"no kernel takes {' with '.join(formats)} on {device}"


@functools.cache
def _say(reason: str) -> None:
    _log.warning("The sparse steps run without fast kernels, and slower: %s.", reason.rstrip("."))

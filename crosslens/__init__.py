"""Sparse coders for language models: train them, judge them, read them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosslens.coder import Coder as Coder
    from crosslens.coder import load as load
    from crosslens.coder import side_by_side as side_by_side

__version__ = "0.1.0"

# Heavy imports wait until a name is used, so that `import crosslens` stays instant.
_LAZY = {"Coder": "crosslens.coder", "load": "crosslens.coder", "side_by_side": "crosslens.coder"}
__all__ = ["Coder", "__version__", "load", "side_by_side"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'crosslens' has no attribute {name!r}")

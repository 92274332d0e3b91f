"""Which device and number format to compute in."""

from __future__ import annotations

import torch

from crosslens.errors import UsageError, suggestion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"The device {name!r} cannot be used here: {reason}. Use `auto` or `cpu`; "
            "`crosslens doctor` lists what this machine has."
        ) from error
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    if name not in DTYPES:
        raise UsageError(f"Unknown number format {name!r}.{suggestion(name, DTYPES)}")
    return DTYPES[name]

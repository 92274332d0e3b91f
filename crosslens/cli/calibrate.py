"""What `crosslens doctor` says of kernels, and of how fast this machine is at training."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from crosslens.cli.console import Progress, number
from crosslens.kernels.build import built
from crosslens.kernels.calibration import Found, find, kernels_in_use, save
from crosslens.kernels.choice import TYPICAL, break_even
from crosslens.kernels.measuring import FORMATS, SIZES, measure

KERNELS = {
    "native": "C, {reason}",
    "triton_rows": "Triton",
    "stock": "torch's own operations, which are slower: {reason}",
}


def calibrate(device: torch.device, *, quiet: bool) -> None:
    """Measure, and keep it: 20 to 60 seconds."""
    cases = len(SIZES) * len(FORMATS)
    with Progress(cases, "shapes", "calibrate", quiet) as bar:
        save(measure(device, lambda done, total: bar.update(done)))


def speed(device: torch.device) -> dict[str, Any]:
    """What is known, for programs."""
    found = find(device)
    return {
        "device": str(device),
        "kernels": kernels_in_use(device),
        "kernels_why": _why(device),
        "calibration": None if found.calibration is None else asdict(found.calibration),
        "calibration_why": found.reason,
        "calibration_path": str(found.path),
        "sparse_below": {_name(dtype): break_even(dtype, device) for dtype in FORMATS},
    }


def kernels_told(device: torch.device) -> str:
    """Which kernels do the sparse steps, and why."""
    return KERNELS[kernels_in_use(device)].format(reason=_why(device))


def calibration_told(device: torch.device) -> str:
    """Whether this machine is calibrated, and what that found."""
    found = find(device)
    shares = ", ".join(
        f"{100 * break_even(dtype, device):.2g} % active in {_name(dtype)}" for dtype in FORMATS
    )
    if found.calibration is None:
        return f"none ({found.reason}); steps are sparse below {shares}, as is assumed"
    return f"steps are sparse below {shares}; {_rates_told(found)}"


def _rates_told(found: Found) -> str:
    assert found.calibration is not None
    told = []
    for dtype in FORMATS:
        rates = found.calibration.rates(dtype, TYPICAL)
        if rates is not None:
            told.append(
                f"{_name(dtype)} {number(rates.encode)} operations/s, "
                f"gathers {number(rates.bag_rows)}B/s"
            )
    return "; ".join(told)


def _why(device: torch.device) -> str:
    """Why the kernels are those that they are."""
    return built().reason if device.type == "cpu" else f"{device.type} tensors"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""How fast this machine does each part of a training step: measured once, kept, looked up."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from crosslens.allocator import KEPT
from crosslens.errors import CrosslensError
from crosslens.kernels.build import FOLDER
from crosslens.kernels.dispatch import chosen
from crosslens.storage import cache_folder, load_json, save_json

FORMAT = 1
LENGTHS = (1, 4, 16, 64)
"""Rows that a latent's gradient is summed from, in the mean, where the time is measured."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A training step as the kernels see it."""

    rows: int
    read: int
    """Numbers that a latent reads, in the mean over latents."""
    written: int
    latents: int

    @property
    def weights(self) -> int:
        """Numbers in the encoder and the decoder."""
        return self.latents * (self.read + self.written)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a second is enough for. A multiplication with its addition counts as 2 operations."""

    encode: float
    """Operations of rows · Wᵀ, as the encoder has them."""
    decode: float
    """Operations of codes · W."""
    weights: float
    """Operations of codesᵀ · rows: the gradient of a matrix."""
    bag_rows: float
    """Bytes of a matrix that are gathered and summed for each row."""
    products: float
    """Bytes of a matrix that are gathered and multiplied with each row."""
    sums: tuple[float, ...]
    """Numbers of latents' rows that are summed from as many rows of a batch as `LENGTHS` has."""
    look: float
    """Pre-activations that are looked at to find the largest of a batch."""
    take: float
    """Pairs of a row and a latent that are found so."""
    sort: float
    """Pairs that are sorted by latent."""
    adam_rows: float
    """Weights stepped from gathered gradients, beside the gathering."""
    adam: float
    """Weights stepped from a dense gradient, with its conversion, its norm and the new copy."""
    norms: float
    """Weights whose rows' norms are taken."""
    write: float
    """Bytes of a large result that an elementwise operation writes to memory in use."""
    fresh: float
    """The same to memory that is got for it."""
    block: float
    """Numbers of a block in cache that an elementwise operation goes through."""
    calls: float
    """Operations of next to nothing: what starting one takes."""

    def __post_init__(self) -> None:
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sums"}
        found |= {f"sums[{i}]": rate for i, rate in enumerate(self.sums)}
        bad = [name for name, rate in found.items() if not 0 < rate < math.inf]
        if bad or len(self.sums) != len(LENGTHS):
            raise ValueError(
                f"rates must be positive, and {len(LENGTHS)} of sums: {', '.join(bad)}"
            )

    def pass_seconds(self, nbytes: int) -> float:
        """An elementwise operation with a result of so many bytes."""
        return nbytes / (self.write if nbytes <= KEPT else self.fresh)

    def sum_seconds(self, latents: int, width: int, pairs: float | int) -> float:
        """So many pairs of a row and a latent, summed latent by latent: on the line through the two
        nearest lengths of a latent's list."""
        length = pairs / latents
        last = next((i for i, n in enumerate(LENGTHS[1:-1], 1) if length < n), len(LENGTHS) - 1)
        soon, late = 1 / self.sums[last - 1], 1 / self.sums[last]
        share = (length - LENGTHS[last - 1]) / (LENGTHS[last] - LENGTHS[last - 1])
        return latents * width * max(0.0, soon + share * (late - soon))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The rates of one shape in one number format."""

    dtype: str
    size: Size
    rates: Rates


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The table of one machine and device."""

    facts: Mapping[str, Any]
    """What the rates depend on beside shape and format."""
    measured: tuple[Measured, ...]
    seconds: float
    """That measuring took."""

    def rates(self, dtype: torch.dtype, size: Size) -> Rates | None:
        """Those of the nearest shape, by the logarithms of its sides; None where the format was
        not measured."""
        name = str(dtype).removeprefix("torch.")
        same = [m for m in self.measured if m.dtype == name]
        return min(same, key=lambda m: _distance(m.size, size)).rates if same else None


@dataclass(frozen=True)
class Found:
    """The calibration that holds here, or why there is none."""

    calibration: Calibration | None
    reason: str
    path: Path


def find(device: torch.device) -> Found:
    """The calibration of this machine as it is now; a damaged file is told, not raised."""
    facts = machine_facts(device)
    path = path_of(facts)
    if not path.exists():
        others = any(path.parent.glob("*.json"))
        why = "those kept are of other settings" if others else "never measured"
        return Found(None, why, path)
    try:
        return _kept(path, path.stat().st_mtime_ns, json.dumps(facts))
    except OSError as error:
        return Found(None, f"{path} cannot be read: {error.strerror}", path)


def save(calibration: Calibration) -> Path:
    """Keep it for later runs on this machine; returns where."""
    path = path_of(calibration.facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_json(path, {"format": FORMAT, **asdict(calibration)})
    return path


def machine_facts(device: torch.device) -> dict[str, Any]:
    """All that changes the rates: a calibration of other facts is of no use."""
    return {
        "processor": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "kernels": kernels_in_use(device),
        "source": hashlib.sha256((FOLDER / "rows.c").read_bytes()).hexdigest()[:16],
    }


def kernels_in_use(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """The module of `crosslens.kernels` that does a call on the device."""
    kernels = chosen(torch.empty(0, dtype=dtype, device=device))
    return str(getattr(kernels, "__name__", kernels)).rpartition(".")[2]


@functools.cache
def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def path_of(facts: Mapping[str, Any]) -> Path:
    """Where the calibration of a machine of these facts is kept."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "calibration" / f"{digest}.json"


@functools.lru_cache(maxsize=4)
def _kept(path: Path, _changed: int, facts: str) -> Found:
    try:
        return Found(_read(load_json(path), json.loads(facts)), "", path)
    except (CrosslensError, KeyError, TypeError, ValueError) as error:
        return Found(None, f"{path} is damaged ({type(error).__name__}: {error})", path)


def _read(plain: Any, facts: Mapping[str, Any]) -> Calibration:
    """What `save` wrote.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    if plain["format"] != FORMAT or plain["facts"] != facts:
        raise ValueError("it is of another format or another machine")
    measured = tuple(
        Measured(dtype=m["dtype"], size=Size(**m["size"]), rates=_rates(m["rates"]))
        for m in plain["measured"]
    )
    if not measured:
        raise ValueError("it has no rates")
    return Calibration(facts=facts, measured=measured, seconds=float(plain["seconds"]))


def _rates(plain: Mapping[str, Any]) -> Rates:
    return Rates(**{**plain, "sums": tuple(plain["sums"])})


def _distance(a: Size, b: Size) -> float:
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in fields(Size))
    return sum(math.log(max(1, x) / max(1, y)) ** 2 for x, y in pairs)

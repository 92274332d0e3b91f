"""What a contestant is asked to do. Peers' environments read this too: standard library only."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Tick = Callable[[], None]
"""To be called before each step; it returns when the step is wanted."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One training step: so many rows of sites × width, so many latents, k of them active."""

    sites: int
    width: int
    latents: int
    k: int
    batch: int = 2048

    @property
    def row(self) -> int:
        """Numbers in a row: the width that is read, and written."""
        return self.sites * self.width

    @property
    def parameters(self) -> int:
        """Encoder, decoder and both biases."""
        return 2 * self.row * self.latents + self.latents + self.row

    def __str__(self) -> str:
        return f"{self.sites}×{self.width} → {self.latents:,} k={self.k}"


SHAPES = {
    "demo": Shape(sites=5, width=576, latents=4096, k=32),
    "wide": Shape(sites=5, width=576, latents=16_384, k=64),
    "pair": Shape(sites=2, width=2304, latents=16_384, k=100),
    "tall": Shape(sites=1, width=768, latents=65_536, k=32),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A contestant, the setting it runs with, and the shape."""

    entry: str
    """Module with `train(task, tick)`, which steps for ever, and `PACKAGE`, what it measures."""
    setting: str
    shape: Shape
    folder: str | None = None
    """Where a library that is not installed lies."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def rows(self) -> Tensor:
        """The random rows that all contestants train on, float32, exact in bfloat16."""
        import torch

        generator = torch.Generator().manual_seed(0)
        rows_BX = torch.randn(self.shape.batch, self.shape.row, generator=generator)
        return rows_BX.bfloat16().float()


def read_task(text: str) -> Task:
    """The task that `to_json` wrote."""
    plain = json.loads(text)
    return Task(**{**plain, "shape": Shape(**plain["shape"])})

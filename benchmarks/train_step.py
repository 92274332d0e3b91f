"""Tokens per second of one training step, on random rows, with the spread over repeats.

python benchmarks/train_step.py [--json] [--shapes demo,wide] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from crosslens.coder import BatchTopK, Coder, Crosscoder, Layout, transpose_init
from crosslens.training import Adam, CoderConfig, FitConfig, TrainConfig
from crosslens.training.checkpoint import TrainState
from crosslens.training.fit import Hooks, fit, new_optimizer

SHAPES = {
    "demo": (5, 576, 4096, 32),
    "wide": (5, 576, 16384, 64),
}
"""Name → sites, width of a site, latents, k."""
BATCH = 2048


class Noise:
    """The same random rows every time, and when each batch was asked for."""

    def __init__(self, width: int) -> None:
        self.rows_BX = torch.randn(BATCH, width).bfloat16()
        self.asked: list[float] = []

    def next(self, check: Callable[[], None]) -> torch.Tensor:
        self.asked.append(time.perf_counter())
        return self.rows_BX

    def state(self) -> dict[str, torch.Tensor]:
        return {}


def measure(name: str, dtype: str, repeats: int) -> dict[str, float]:
    """Median, least and most tokens per second over `repeats` steps."""
    sites, width, latents, k = SHAPES[name]
    layout = Layout(tuple(f"resid_post.{i}" for i in range(sites)), (width,) * sites)
    config = TrainConfig(
        coder=CoderConfig(latents=latents, activation=BatchTopK(k=k)),
        optimizer=Adam(warmup=0),
        fit=FitConfig(
            steps=repeats + 3, batch=BATCH, dtype=dtype, log_every=10**6, checkpoint_every=10**6
        ),
    )
    coder = Coder(Crosscoder()(layout, latents), config.coder.activation)
    transpose_init(coder, 0.1, torch.Generator().manual_seed(0))
    coder.compute_dtype = getattr(torch, dtype)
    idle_L = torch.zeros(latents, dtype=torch.int64)
    state = TrainState(coder, new_optimizer(coder, config.optimizer), idle_L)
    noise = Noise(layout.width)
    fit(config, state, noise, Hooks(lambda _: None, lambda _: None, lambda _: {}))
    steps = [b - a for a, b in zip(noise.asked[1:-1], noise.asked[2:], strict=True)]
    rates = [BATCH / seconds for seconds in steps]
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.manual_seed(0)
    found = {
        shape: {dtype: measure(shape, dtype, asked.repeats) for dtype in ("bfloat16", "float32")}
        for shape in asked.shapes.split(",")
    }
    if asked.json:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        print(json.dumps({"machine": {**machine, "cpu": platform.processor()}, "shapes": found}))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}")
    for shape, by_dtype in found.items():
        sites, width, latents, k = SHAPES[shape]
        for dtype, rates in by_dtype.items():
            print(
                f"{shape:6} {sites}×{width} → {latents} k={k}  {dtype:9} "
                f"{rates['median']:7.0f} tokens/s  ({rates['least']:.0f}–{rates['most']:.0f})"
            )


if __name__ == "__main__":
    main()

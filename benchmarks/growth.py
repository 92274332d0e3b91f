"""How crosslens's training step grows: with latents, with sites, with the batch.

python benchmarks/growth.py [--json] [--sweeps latents_1,sites] [--memory-gb 20] [--half]

Every point is a process of its own. What it will take is predicted from the two points before it,
memory being linear in each of these sizes, and a point that does not fit is told of, not run. The
step's time is shown beside what the encoder's product takes alone at that size, measured in turns
with it, and what one pass of Adam takes at the measured bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.arena import GB, Arena, Result, likely_bytes
from benchmarks.machine import machine
from benchmarks.ours import HALF
from benchmarks.roofline import ADAM, COPIED
from benchmarks.task import SHAPES, Shape
from benchmarks.train_step import COPY, OURS, PRODUCT, names, rates, tell

BASE = SHAPES["demo"]
SINGLE = replace(BASE, sites=1)
LATENTS = tuple(2**power for power in range(12, 19))
SWEEPS: dict[str, tuple[str, tuple[Shape, ...]]] = {
    "latents_1": ("latents", tuple(replace(SINGLE, latents=n) for n in LATENTS)),
    "latents_5": ("latents", tuple(replace(BASE, latents=n) for n in LATENTS)),
    "sites": ("sites", tuple(replace(BASE, sites=n) for n in (1, 2, 5, 10, 20, 30))),
    "batch": ("batch", tuple(replace(BASE, batch=2**power) for power in range(8, 14))),
}
"""Name → what grows, and the shapes."""
MARGIN = 1.1
"""A prediction is taken for so much more, since memory that was freed is not always given back."""
Found = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """The memory of a point that ran."""

    size: int
    peak: int


def predicted(shape: Shape, size: int, seen: Sequence[Seen]) -> float:
    """Bytes that a step will take at most."""
    if len(seen) < 2:
        return likely_bytes(shape)
    before, last = seen[-2:]
    slope = (last.peak - before.peak) / (last.size - before.size)
    return MARGIN * (last.peak + slope * (size - last.size))


def sweep(name: str, asked: argparse.Namespace, bandwidth: float) -> Iterator[Found]:
    """The points of one sweep, smallest first."""
    grows, shapes = SWEEPS[name]
    contestant = replace(OURS, setting=HALF) if asked.half else OURS
    seen: list[Seen] = []
    for shape in shapes:
        size = getattr(shape, grows)
        needs = predicted(shape, size, seen)
        point = {grows: size, "parameters": shape.parameters, "predicted_bytes": round(needs)}
        if needs > asked.memory_gb * GB:
            limit = f"--memory-gb is {asked.memory_gb:g}"
            yield {**point, "reason": f"predicted to take {needs / GB:.1f} GB, {limit}"}
            continue
        tell(f"{name}: {shape}, batch {shape.batch}")
        arena = Arena([contestant, PRODUCT], shape, asked.memory_gb * GB, likely=needs)
        arena.compete(asked.repeats, 1, lambda _: None)
        ours = arena.results[contestant]
        if ours.reason is None:
            seen.append(Seen(size, ours.whole_peak_bytes))
        yield {**point, **_figures(shape, ours, arena.results[PRODUCT], bandwidth)}


def _figures(shape: Shape, ours: Result, product: Result, bandwidth: float) -> Found:
    told = rates(shape, ours)
    if ours.reason or product.reason:
        return {**told, "reason": ours.reason or product.reason}
    step, encoder = statistics.median(ours.seconds), statistics.median(product.seconds)
    optimizer = ADAM * shape.parameters / bandwidth
    return {
        "tokens_per_s": told,
        "step_seconds": step,
        "encoder_seconds": encoder,
        "optimizer_seconds": optimizer,
        "rest_seconds": step - encoder - optimizer,
        "peak_bytes": ours.peak_bytes,
        "whole_peak_bytes": ours.whole_peak_bytes,
    }


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second of a copy, read and written."""
    arena = Arena([COPY], BASE, float("inf"))
    arena.compete(repeats, 1, lambda _: None)
    return 2 * COPIED / statistics.median(arena.results[COPY].seconds)


def table(name: str, points: Sequence[Found]) -> str:
    """One sweep for people; seconds of a step, and of its parts at the machine's own rates."""
    grows = SWEEPS[name][0]
    parts = ("step", "encoder", "optimizer", "rest")
    lines = [f"{grows:>9}  tokens/s " + "".join(f"{part:>10}" for part in parts) + "   peak"]
    for point in points:
        if "reason" in point:
            lines.append(f"{point[grows]:9,}  {point['reason']}")
            continue
        seconds = "".join(f"{point[f'{part}_seconds']:10.3f}" for part in parts)
        rate, peak = point["tokens_per_s"]["median"], point["peak_bytes"] / GB
        lines.append(f"{point[grows]:9,} {rate:9,.0f} {seconds} {peak:5.1f} GB")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--sweeps", type=names(SWEEPS), default=list(SWEEPS), metavar="A,B")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--memory-gb", type=float, default=20.0, help="for one process")
    parser.add_argument("--half", action="store_true", help="Adam's moments in bfloat16")
    asked = parser.parse_args(argv)
    bandwidth = copy_bandwidth(asked.repeats)
    found = {name: list(sweep(name, asked, bandwidth)) for name in asked.sweeps}
    if asked.json:
        told = {"machine": machine(), "copy_bytes_per_s": bandwidth, "sweeps": found}
        print(json.dumps(told))
        return
    for name, points in found.items():
        print(f"{name}: {SWEEPS[name][1][0]} and on\n{table(name, points)}\n")


if __name__ == "__main__":
    main()

"""How many rows × latents tensors training holds at its peak, scheme by scheme.

python -m benchmarks.memory [--json] [--only NAME …] [--rows 1024] [--latents 8064] [--tensors]

Sites are so narrow here that next to nothing but tensors of rows × latents takes memory, so peaks
are told in units of one such tensor in bfloat16, beyond the encoder's output, which is one itself:
from a batch to its loss (`forward`), in the `backward` pass, and `after` it (clipping, the
optimiser, what is logged). Two steps run, since what the first leaves behind counts while the
second runs. A quarter of the latents is dead, so that AuxK is at work.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crosslens.coder import Coder, Layout
from crosslens.training import TrainConfig
from crosslens.training.checkpoint import TrainState
from crosslens.training.fit import Hooks, fit
from crosslens.training.start import first_state
from reproduce.scheme_table import SCHEMES, Sizes, config_of, sites_of
from reproduce.scheme_training import fill

WIDTH = 16
PHASES = ("forward", "backward", "after")
STEP = "a step begins"
LAYERS = (5, 15, 25)
SLACK = 0.2
"""Units left for weights, rows and their gradients, which are small here but not nothing."""


@dataclass(frozen=True)
class Held:
    """A piece of memory in use, and the operation that took it."""

    taken_by: str
    nbytes: int


@dataclass
class Peak:
    """The largest total seen, and what it was made of."""

    total: int = 0
    held: tuple[Held, ...] = ()


@contextmanager
def recorded() -> Iterator[dict[str, Peak]]:
    """The peaks of what torch's allocator handed out in the block, by phase; filled in at its end.

    The kernels' own temporaries count; the matrix library's private memory does not.
    """
    found = {phase: Peak() for phase in PHASES}
    gc.collect()  # what is freed inside must have been taken inside
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield found
    events = _events(profile.profiler.kineto_results.experimental_event_tree())
    _replay(sorted(events, key=lambda event: event.start_time_ns), found)


def _events(tree: list[Any]) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _events(event.children)


def _replay(events: list[Any], found: dict[str, Peak]) -> None:
    live: dict[int, Held] = {}
    total, phase = 0, "after"
    for event in events:
        if event.name == STEP:
            phase = "forward"
        elif event.name.startswith("autograd::engine::evaluate_function"):
            phase = "backward"
        elif phase == "backward" and event.parent is None:
            phase = "after"
        if event.name != "[memory]":
            continue
        fields = event.extra_fields
        total += fields.alloc_size
        if fields.alloc_size < 0:
            live.pop(fields.ptr, None)
            continue
        live[fields.ptr] = Held(event.parent.name if event.parent else "?", fields.alloc_size)
        if total > found[phase].total:
            found[phase] = Peak(total, tuple(live.values()))


@dataclass
class Noise:
    """The same random rows every time, and a quarter of the latents dead."""

    rows_BX: Tensor
    idle_L: Tensor

    def next(self, check: Callable[[], None]) -> Tensor:
        with torch.profiler.record_function(STEP):
            self.idle_L[::4] = 10**9
        return self.rows_BX

    def state(self) -> dict[str, Tensor]:
        return {}


def training_of(name: str, sizes: Sizes) -> tuple[TrainConfig, TrainState, Noise]:
    """A scheme on narrow random rows, after two steps."""
    torch.manual_seed(0)
    config, scheme = config_of(name, sizes), SCHEMES[name]
    models = ("base/", "chat/") if scheme.two_models else ("",)
    sites = tuple(f"{model}{s}" for model in models for s in sites_of(scheme, LAYERS))
    layout = Layout(sites, (WIDTH,) * len(sites))
    wiring = config.wiring(layout, sizes.latents)
    coder = Coder(wiring, config.coder.activation, center=config.coder.center)
    rows_BX = torch.randn(sizes.batch, layout.width).bfloat16()
    fill(coder, config, rows_BX.float())
    state = first_state(coder, config)
    noise = Noise(rows_BX, state.idle_L)
    fit(_until(config, 2), state, noise, _silent())
    return config, state, noise


def _until(config: TrainConfig, steps: int) -> TrainConfig:
    plan = replace(config.fit, steps=steps, log_every=10**9)
    optimizer: Any = replace(config.optimizer, warmup=0)  # type: ignore[misc]
    return replace(config, fit=plan, optimizer=optimizer)


def _silent() -> Hooks:
    return Hooks(lambda _: None, lambda _: None, lambda _: {})


def measure(name: str, sizes: Sizes) -> dict[str, Any]:
    """Peaks of two steps, in units of rows × latents × 2 bytes: two, since what the first leaves
    behind counts while the second runs."""
    unit = sizes.batch * sizes.latents * 2
    config, state, noise = training_of(name, sizes)
    with recorded() as peaks:
        fit(_until(config, 4), state, noise, _silent())
    return {
        phase: {"beyond_encoder": peak.total / unit - 1, "held": _large(peak, unit)}
        for phase, peak in peaks.items()
    }


def _large(peak: Peak, unit: int) -> list[dict[str, Any]]:
    """What takes more than a tenth of a unit, the encoder's output among it."""
    held = sorted(peak.held, key=lambda each: -each.nbytes)
    return [
        {"units": h.nbytes / unit, "taken_by": h.taken_by} for h in held if h.nbytes > 0.1 * unit
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(SCHEMES), metavar="NAME")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--latents", type=int, default=8064)
    parser.add_argument("--tensors", action="store_true", help="also what is held at the peak")
    asked = parser.parse_args()
    sizes = Sizes(latents=asked.latents, l0=32, steps=100, batch=asked.rows, layers=LAYERS)
    found = {name: measure(name, sizes) for name in asked.only or SCHEMES}
    if asked.json:
        print(json.dumps({"rows": asked.rows, "latents": asked.latents, "schemes": found}))
        return
    print(f"Beyond the encoder's output, in units of {asked.rows} × {asked.latents} bfloat16:")
    print(f"{'scheme':22}" + "".join(f"{phase:>10}" for phase in PHASES))
    for name, one in found.items():
        figures = "".join(f"{one[phase]['beyond_encoder']:10.2f}" for phase in PHASES)
        print(f"{name:22}{figures}")
        for phase in PHASES if asked.tensors else ():
            told = (f"{held['units']:.2f} {held['taken_by']}" for held in one[phase]["held"])
            print(f"    {phase}: {', '.join(told)}")
    for phase in PHASES:
        kept = sum(one[phase]["beyond_encoder"] <= 1 + SLACK for one in found.values())
        print(f"at most one such tensor, {phase}: {kept} of {len(found)} schemes")


if __name__ == "__main__":
    main()

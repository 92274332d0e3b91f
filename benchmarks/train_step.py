"""Tokens per second of one training step: crosslens, its peers, and what the machine allows.

python benchmarks/train_step.py [--json] [--shapes demo,wide] [--peers-python PATH]

Everybody trains on the same random rows, and they take turns: in each round every contestant takes
a few steps while the others sleep. Weights, products and copies are measured in the same rounds,
and give the roofline (benchmarks/roofline.py says how). Where peers live: benchmarks/peers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arena import GB, ROOT, Arena, Contestant, Result
from benchmarks.machine import machine
from benchmarks.peers import PEERS
from benchmarks.roofline import COPIED, product_flop, roofline
from benchmarks.task import SHAPES, Shape

OURS = Contestant(name="crosslens", setting="bfloat16", entry="benchmarks.ours", pace=2)
PRODUCT = Contestant(
    name="product", setting="bfloat16", entry="benchmarks.ceilings.product", pace=2
)
COPY = Contestant(name="copy", setting="float32", entry="benchmarks.ceilings.copy", pace=10)
PEERS_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
"""Where `make bench` installs the peers."""
CROSSCODE_HAS = Path("crosscode", "models", "acausal_crosscoder.py")
Found = dict[str, Any]


def lineup(asked: argparse.Namespace) -> list[Contestant]:
    """Who takes part, in the order of their turns."""
    python = peers_python(asked.peers_python)
    ours = [
        Contestant(name=OURS.name, setting=dtype, entry=OURS.entry, pace=OURS.pace)
        for dtype in ("bfloat16", "float32")
    ]
    peers = [
        Contestant(
            name=name,
            setting=setting,
            entry=f"benchmarks.peers.{name}",
            python=python,
            folder=asked.crosscode if name == "crosscode" else None,
        )
        for name in asked.peers
        for setting in PEERS[name]
        if name != "crosscode" or asked.crosscode
    ]
    return [PRODUCT, COPY, *ours, *peers]


def peers_python(named: str | None) -> str:
    """The interpreter that has the peers: the one named, the one `make bench` made, or this."""
    if named:
        return os.path.abspath(shutil.which(named) or named)  # a link stays one: it is the venv's
    return str(PEERS_PYTHON) if PEERS_PYTHON.exists() else sys.executable


def measure(shape: Shape, asked: argparse.Namespace) -> Found:
    """All figures at one shape, in tokens per second and bytes."""
    arena = Arena(lineup(asked), shape, asked.memory_gb * GB)
    arena.compete(asked.repeats, asked.steps, lambda what: tell(f"{shape}, {what}"))
    return summary(shape, arena.results, asked.peers)


def tell(line: str) -> None:
    """Progress, where it does not mix with the result."""
    print(line, file=sys.stderr, flush=True)


def summary(shape: Shape, results: dict[Contestant, Result], peers: Sequence[str]) -> Found:
    """The figures of `--json` for one shape."""
    told: dict[str, Found] = {name: {} for name in (OURS.name, *peers)}
    peak: dict[str, Found] = {name: {} for name in told}
    for contestant, result in results.items():
        if contestant not in (PRODUCT, COPY):
            told[contestant.name][contestant.setting] = rates(shape, result)
            peak[contestant.name][contestant.setting] = result.peak_bytes
    if "crosscode" in told and not told["crosscode"]:
        told["crosscode"] = {
            "reason": "not on the package index: name its folder with --crosscode FOLDER"
        }
    ours = told.pop(OURS.name)
    limit = limits(shape, results)
    best = max((one["median"] for one in ours.values() if "median" in one), default=None)
    fastest = max(
        (one["median"] for peer in told.values() for one in peer.values() if "median" in one),
        default=None,
    )
    return {
        "shape": {**vars(shape), "parameters": shape.parameters},
        OURS.name: ours,
        "peers": told,
        **limit,
        "fraction_of_roofline": best / limit["roofline"] if best and limit["roofline"] else None,
        "times_fastest_peer": best / fastest if best and fastest else None,
        "peak_bytes": peak,
        "facts": {f"{c.name} {c.setting}": r.facts for c, r in results.items() if r.facts},
        "idle_cpu_seconds": max(result.idle_cpu_seconds for result in results.values()),
    }


def rates(shape: Shape, result: Result) -> Found:
    """Tokens per second of the counted steps, or the reason why there are none."""
    if result.reason is not None:
        missing = result.reason.startswith("ModuleNotFoundError")
        hint = "; `make bench` installs the peers, --peers-python names where" if missing else ""
        return {"reason": result.reason + hint}
    found = [shape.batch / seconds for seconds in result.seconds]
    return {
        "median": statistics.median(found),
        "least": min(found),
        "most": max(found),
        "steps": len(found),
    }


def limits(shape: Shape, results: dict[Contestant, Result]) -> Found:
    """The roofline in tokens per second, and the rates that it follows from."""
    product, copied = results[PRODUCT].seconds, results[COPY].seconds
    if not product or not copied:
        return {"roofline": None, "roofline_from": None}
    flop_per_s = product_flop(shape) / statistics.median(product)
    bytes_per_s = 2 * COPIED / statistics.median(copied)
    least = roofline(shape, flop_per_s, bytes_per_s)
    return {
        "roofline": least.tokens_per_s,
        "roofline_from": {
            "flop_per_s": flop_per_s,
            "copy_bytes_per_s": bytes_per_s,
            "encoder_seconds": least.encoder,
            "sparse_seconds": least.sparse,
            "optimizer_seconds": least.optimizer,
        },
    }


def table(found: Found) -> str:
    """One shape's figures for people."""
    lines = []
    for name, settings in {OURS.name: found[OURS.name], **found["peers"]}.items():
        if "reason" in settings:
            lines.append(f"  {name:20} {'':16} {settings['reason']}")
            continue
        for setting, one in settings.items():
            peak = found["peak_bytes"][name][setting] / GB
            lines.append(f"  {name:20} {setting:16} {_told(one, peak)}")
    if found["roofline"]:
        share = found["fraction_of_roofline"]
        of = f"; crosslens reaches {share:.2f} of it" if share else ""
        lines.append(f"  {'roofline':20} {'':16} {found['roofline']:8,.0f} tokens/s{of}")
    if found["times_fastest_peer"]:
        lines.append(f"  crosslens is {found['times_fastest_peer']:.2f} × the fastest peer")
    return "\n".join(lines)


def _told(one: Found, peak: float) -> str:
    if "reason" in one:
        return str(one["reason"])
    spread = f"({one['least']:,.0f} – {one['most']:,.0f})"
    return f"{one['median']:8,.0f} tokens/s {spread:18} {peak:5.1f} GB"


def options() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--shapes", type=names(SHAPES), default=list(SHAPES), metavar="A,B")
    parser.add_argument("--peers", type=names(PEERS), default=list(PEERS), metavar="A,B")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=1, help="steps of each in a round")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter that has the peers")
    parser.add_argument("--crosscode", metavar="FOLDER", help="a checkout of crosscode")
    parser.add_argument("--memory-gb", type=float, default=20.0, help="for all workers together")
    return parser


def names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    """Reads an option that lists some of what is known."""

    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(known)}")
        return names

    return read


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with paths that are there."""
    parser = options()
    asked = parser.parse_args(argv)
    if asked.crosscode and not (Path(asked.crosscode) / CROSSCODE_HAS).is_file():
        parser.error(
            f"--crosscode {asked.crosscode} holds no {CROSSCODE_HAS}: name the folder that the "
            "crosscode repository was checked out to."
        )
    if asked.crosscode:
        asked.crosscode = str(Path(asked.crosscode).resolve())
    return asked


def main(argv: Sequence[str] | None = None) -> None:
    asked = parse(argv)
    shapes = {name: measure(SHAPES[name], asked) for name in asked.shapes}
    if asked.json:
        print(json.dumps({"machine": machine(), "shapes": shapes}))
        return
    facts = machine()
    print(f"{facts['cpu']}, {facts['usable_cores']} cores, {' '.join(facts['flags'])}")
    for name, found in shapes.items():
        print(f"{name}: {SHAPES[name]}, batch {SHAPES[name].batch}\n{table(found)}")


if __name__ == "__main__":
    main()

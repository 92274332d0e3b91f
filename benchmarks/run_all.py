"""Run every benchmark, and write what came out: docs/results/bench.md and bench.json.

python benchmarks/run_all.py [--only train_step,growth] [--peers-python PATH] [--crosscode FOLDER]

`make bench` does this, with the peers in an environment of their own. Nothing else should run
meanwhile. A benchmark that fails is told of on the page, and the others still run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arena import ROOT
from benchmarks.machine import machine
from benchmarks.page import write_page
from benchmarks.train_step import names, peers_python, tell

HERE = Path(__file__).resolve().parent
SCRIPTS = ("train_step", "harvest", "growth", "end_to_end", "prediction")
KNOW_PEERS = ("train_step", "harvest", "end_to_end")
QUICK = {
    "train_step": ("--repeats", "1", "--shapes", "demo"),
    "harvest": ("--repeats", "1"),
    "growth": ("--repeats", "1", "--sweeps", "batch"),
    "end_to_end": ("--repeats", "1", "--tokens", "8192"),
    "prediction": ("--only", "demo", "--as-is"),
}
"""For seeing that all runs; not for figures."""
Found = dict[str, Any]


def words(name: str, asked: argparse.Namespace) -> list[str]:
    """The command of one benchmark as anybody would type it."""
    return [
        "python",
        f"benchmarks/{name}.py",
        "--json",
        *(QUICK.get(name, ()) if asked.quick else ()),
    ]


def places(name: str, asked: argparse.Namespace) -> list[str]:
    """Options that name places on this machine: the page leaves them out."""
    found = []
    if name in KNOW_PEERS and asked.peers_python:
        found += ["--peers-python", asked.peers_python]
    if name == "train_step" and asked.crosscode:
        found += ["--crosscode", asked.crosscode]
    return found


def run(name: str, asked: argparse.Namespace) -> Found:
    """What it prints, or the reason why there is nothing. Its progress is shown."""
    tell(f"== {name}")
    command = words(name, asked)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), *command[2:], *places(name, asked)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        return {"reason": f"`{' '.join(command)}` exited with code {done.returncode}"}
    minutes = round((time.perf_counter() - began) / 60, 1)
    return {**json.loads(done.stdout), "command": command, "minutes": minutes}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = dict.fromkeys(SCRIPTS)
    parser.add_argument("--only", type=names(known), default=list(SCRIPTS), metavar="A,B")
    parser.add_argument("--quick", action="store_true", help="see that all runs; no figures")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter that has the peers")
    parser.add_argument("--crosscode", metavar="FOLDER", help="a checkout of crosscode")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    asked = parser.parse_args(argv)
    if asked.crosscode:
        asked.crosscode = str(Path(asked.crosscode).resolve())
    if asked.peers_python:
        asked.peers_python = peers_python(asked.peers_python)
    found = {name: run(name, asked) for name in asked.only}
    write_page(asked.out, {"machine": machine(), "benchmarks": found})
    tell(f"{asked.out / 'bench.md'} and bench.json are written.")


if __name__ == "__main__":
    main()

"""Let contestants take turns on one machine, each in a process of its own that sleeps meanwhile.

Workers stay alive between their turns while memory lasts. Where it does not, the one that stepped
last is ended first, and started afresh for its next turn: in a round everyone else comes before it.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.task import Shape, Task

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2
"""Steps that are not counted whenever a process has just started."""
PATIENCE = 900
"""Seconds that a turn may take."""
GB = 10**9
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    # There is no GPU for its kernels to be compiled for.
    "SPARSIFY_DISABLE_TRITON": "1",
}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Who steps, and how it is started."""

    name: str
    setting: str
    entry: str
    python: str = sys.executable
    folder: str | None = None
    pace: int = 1
    """Steps for each step of the others: for those whose steps are short."""


@dataclass
class Result:
    """What a contestant did, or why it could not."""

    seconds: list[float] = field(default_factory=list)
    """Of each step counted."""
    peak_bytes: int = 0
    """The most memory it held beyond its imports."""
    whole_peak_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    """Its version, torch's, its threads."""
    idle_cpu_seconds: float = 0.0
    """Processor time it took while others stepped."""
    reason: str | None = None


class Lost(Exception):
    """A worker ended, or never began."""


class Worker:
    """A contestant's process, seen from outside."""

    def __init__(self, contestant: Contestant, shape: Shape) -> None:
        task = Task(
            entry=contestant.entry,
            setting=contestant.setting,
            shape=shape,
            folder=contestant.folder,
        )
        self._open = ExitStack()
        self._complaints = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        command = [contestant.python, "-m", "benchmarks.worker", task.to_json()]
        try:
            self._process = self._open.enter_context(
                subprocess.Popen(
                    command,
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._complaints,
                    cwd=ROOT,
                    env={**os.environ, **OFFLINE},
                )
            )
        except OSError as error:
            self._open.close()
            raise Lost(f"{contestant.python} cannot be run: {error.strerror}") from error
        self.resident_bytes = 0
        self._answer()

    def turn(self, steps: int) -> dict[str, Any]:
        """Let it step so often.

        Raises:
            Lost: it ended, or took too long.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what it died of is read below
            self._process.stdin.write(f"{steps}\n".encode())
        return self._answer()

    def end(self) -> None:
        """Tell it to stop, and see that it has."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._open.close()

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], PATIENCE)
        if not ready:
            self._process.kill()
            self._open.close()
            raise Lost(f"gave no answer within {PATIENCE} s")
        line = stdout.readline()
        if not line:
            with self._open:
                raise Lost(self._cause_of_death())
        told: dict[str, Any] = json.loads(line)
        self.resident_bytes = told["resident_bytes"]
        return told

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            killed = " (out of memory?)" if code == -9 else ""
            return f"was ended by signal {-code}{killed}"
        return lines[-1] if lines else f"exited with code {code}"


class Arena:
    """All contestants at one shape."""

    def __init__(
        self,
        contestants: Sequence[Contestant],
        shape: Shape,
        memory: float,
        likely: float | None = None,
    ) -> None:
        """`memory` is for all workers together; `likely` what one may take, if that is known."""
        self.results = {contestant: Result() for contestant in contestants}
        self._shape = shape
        self._memory = memory
        self._likely = likely_bytes(shape) if likely is None else likely
        self._alive: dict[Contestant, Worker] = {}

    def compete(self, repeats: int, steps: int, tell: Callable[[str], None]) -> None:
        """Fill `results`: in each of so many rounds, every contestant takes so many steps."""
        try:
            for done in range(repeats):
                for contestant, result in self.results.items():
                    if result.reason is None:
                        tell(f"round {done + 1}: {contestant.name} {contestant.setting}")
                        self._turn(contestant, result, steps * contestant.pace)
        finally:
            self._end_all()

    def _turn(self, contestant: Contestant, result: Result, steps: int) -> None:
        try:
            worker = self._awake(contestant, result)
            told = worker.turn(steps)
        except Lost as lost:
            result.reason = str(lost)
            return
        self._alive[contestant] = worker
        result.seconds += told["seconds"]
        result.peak_bytes = max(result.peak_bytes, told["peak_bytes"])
        result.whole_peak_bytes = max(result.whole_peak_bytes, told["whole_peak_bytes"])
        result.facts = {name: told[name] for name in ("version", "torch", "threads")}
        result.idle_cpu_seconds = max(result.idle_cpu_seconds, told["idle_cpu_seconds"])

    def _awake(self, contestant: Contestant, result: Result) -> Worker:
        """Its worker, ready to step, with the memory for it."""
        worker = self._alive.pop(contestant, None)
        needs = result.whole_peak_bytes or self._likely
        if needs > self._memory:
            raise Lost(
                f"may take {needs / GB:.1f} GB, more than the {self._memory / GB:.1f} GB allowed"
            )
        while self._alive and needs + self._held() > self._memory:
            self._alive.popitem()[1].end()
        if worker is None:
            worker = Worker(contestant, self._shape)
            worker.turn(WARM_UP)
        return worker

    def _held(self) -> int:
        return sum(worker.resident_bytes for worker in self._alive.values())

    def _end_all(self) -> None:
        while self._alive:
            self._alive.popitem()[1].end()


def likely_bytes(shape: Shape) -> int:
    """More memory than a contestant is likely to take, for planning before it was ever seen.

    Weights, gradients, two moments and a copy; ten tensors of rows × latents; and what sparsify's
    encoder forms for its weight gradient, a row's width for every active latent of every row.
    """
    dense = shape.batch * shape.latents
    sparse = shape.batch * shape.k * shape.row
    return 4 * (5 * shape.parameters + 10 * dense + sparse) + GB // 2

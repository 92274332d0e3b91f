"""One contestant in a process of its own: it steps when it is asked to, and sleeps otherwise.

python -m benchmarks.worker TASK: a number on standard input asks for so many steps; each answer is
a line of JSON on standard output. The end of the input ends the worker. Runs in peers' environments
too, so nothing of crosslens is imported here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import IO, Any

from benchmarks.task import read_task


class Ticker:
    """Called before each step: keeps its time, and waits for more to be asked."""

    def __init__(self, answers: IO[str], facts: dict[str, Any]) -> None:
        self._answers = answers
        self._facts = facts
        self._imported = memory("VmRSS")
        self._seconds: list[float] = []
        self._wanted = 0
        self._began: float | None = None

    def __call__(self) -> None:
        if self._began is not None:
            self._seconds.append(time.perf_counter() - self._began)
        while len(self._seconds) == self._wanted:
            self._answer_and_wait()
        self._began = time.perf_counter()

    def _answer_and_wait(self) -> None:
        told = {
            **self._facts,
            "seconds": self._seconds,
            "peak_bytes": memory("VmHWM") - self._imported,
            "whole_peak_bytes": memory("VmHWM"),
            "resident_bytes": memory("VmRSS"),
        }
        print(json.dumps(told), file=self._answers, flush=True)
        busy = time.process_time()
        asked = sys.stdin.readline()
        if not asked:
            raise SystemExit(0)
        self._facts["idle_cpu_seconds"] += time.process_time() - busy
        self._wanted, self._seconds, self._began = int(asked), [], None


def memory(field: str) -> int:
    """Bytes of this process's memory: `VmRSS`, what is held now, or `VmHWM`, the most ever held.

    Linux only counts the latter from this program's own start; elsewhere both are the system's
    figure for the most.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = read_task(sys.argv[1])
    if task.folder is not None:
        sys.path.insert(0, task.folder)
    contestant = importlib.import_module(task.entry)
    torch = sys.modules.get("torch")
    facts = {
        "version": _version(contestant.PACKAGE),
        "torch": torch and torch.__version__,
        "threads": torch and torch.get_num_threads(),
        "idle_cpu_seconds": 0.0,
    }
    contestant.train(task, Ticker(answers, facts))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

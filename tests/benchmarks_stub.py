"""A contestant that writes down what it does, for the arena's tests; it needs no torch."""

from __future__ import annotations

from pathlib import Path

PACKAGE = "no-such-package"


def train(task, tick):
    if task.setting == "broken":
        raise SystemExit("this library needs a GPU")
    log = Path(task.folder) / "log"
    _note(log, f"{task.setting} starts")
    while True:
        tick()
        if task.setting == "fragile":
            raise ValueError("it overflowed")
        _note(log, task.setting)


def _note(log, line):
    with log.open("a") as file:
        file.write(f"{line}\n")

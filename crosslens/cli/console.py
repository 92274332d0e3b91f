"""What commands print: words for people on stderr, JSON for programs on stdout."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import rich.progress
from rich.console import Console
from rich.table import Column

PLAIN_INTERVAL = 30.0
"""Seconds between two progress lines where stderr is not a terminal."""


def stderr_console() -> Console:
    """A rich console on stderr; without colour where NO_COLOR is set or nobody is looking."""
    return Console(file=sys.stderr, soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """Print `value` as one JSON object on one line of stdout; NaN and infinities become null."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | int | str) -> str:
    """Three digits that matter: 0.123, 12.3k, 4.56M; whole numbers below 1000 as they are."""
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return str(value)
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        # 999,500 would round to 1000k.
        if abs(value) >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g}{letter}"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def duration(seconds: float | int) -> str:
    """7s, 3m05s, 2h04m."""
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


class Progress:
    """How far a job is: a bar where stderr is a terminal, else a plain line now and then.

    `start` is how many units were done before (a resumed job), which count in no speed.

        with Progress(total=500, unit="steps", label="train") as bar:
            bar.update(120, {"fvu": 0.21, "l0": 32.4})
    """

    def __init__(
        self,
        total: int,
        unit: str,
        label: str,
        quiet: bool = False,
        *,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.unit, self.label = total, unit, label
        self._quiet, self._start, self._clock = quiet, start, clock
        self._done = self._printed = start
        self._fields: Mapping[str, float | int | str] = {}
        self._bar: rich.progress.Progress | None = None
        self._task = rich.progress.TaskID(0)

    def __enter__(self) -> Progress:
        self._began = self._spoke = self._clock()
        self._console = stderr_console()
        if self._console.is_terminal and not self._quiet:
            self._bar = self._rich_bar()
            self._bar.start()
        return self

    def update(self, done: int, fields: Mapping[str, float | int | str] | None = None) -> None:
        """`done` of `total` units are done; `fields` (FVU, L0, …) replace those shown before."""
        self._done, self._fields = done, fields if fields is not None else self._fields
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=self.status())
        elif self._clock() - self._spoke >= PLAIN_INTERVAL:
            self._say()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._done != self._printed:
            self._say()

    def status(self) -> str:
        """`120/500 steps · 3.2 steps/s · ETA 1m59s · fvu 0.21 · l0 32.4`.

        A field that is itself a speed (`tokens/s`) stands for the steps per second.
        """
        elapsed, done = self._clock() - self._began, self._done - self._start
        parts = [f"{number(self._done)}/{number(self.total)} {self.unit}"]
        if elapsed > 0 and done > 0:
            rate = done / elapsed
            if not any(name.endswith("/s") for name in self._fields):
                parts.append(f"{number(rate)} {self.unit}/s")
            left = self.total - self._done
            parts.append(f"ETA {duration(left / rate)}" if left > 0 else duration(elapsed))
        return " · ".join(parts + [f"{name} {number(v)}" for name, v in self._fields.items()])

    def _say(self) -> None:
        self._spoke, self._printed = self._clock(), self._done
        if not self._quiet:
            self._console.print(f"{self.label}: {self.status()}", markup=False)

    def _rich_bar(self) -> rich.progress.Progress:
        # On a narrow terminal the bar goes first, then the end of the status; the label stays.
        kept = Column(no_wrap=True, min_width=len(self.label))
        bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False, table_column=kept),
            rich.progress.BarColumn(20),
            rich.progress.TextColumn("{task.fields[status]}", markup=False),
            console=self._console,
        )
        self._task = bar.add_task(
            self.label, total=self.total, completed=self._start, status=self.status()
        )
        return bar

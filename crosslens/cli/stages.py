"""A long job's stages as progress bars."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from crosslens.cli.console import Progress, stderr_console

UNITS = {"train": "steps", "harvest": "chunks", "harvest again": "chunks"}


class Stages:
    """Hears `(stage, done, total, figures)`: a line for a stage without length, else a bar.

    `rows_per_step` turns the speed of training into tokens per second.
    """

    def __init__(self, quiet: bool = False, rows_per_step: int = 0) -> None:
        self.quiet, self.rows_per_step = quiet, rows_per_step
        self._bar: Progress | None = None
        self._stage = ""
        self._first = (0, 0.0)

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __call__(
        self, stage: str, done: int, total: int, figures: Mapping[str, float] | None = None
    ) -> None:
        if not total:
            self._close()
            if not self.quiet:
                stderr_console().print(stage, markup=False)
            return
        if stage != self._stage:
            self._open(stage, done, total)
        assert self._bar is not None
        self._bar.update(done, {**self._speed(stage, done), **(figures or {})})
        if done == total and stage != "train":
            self._close()

    def _open(self, stage: str, done: int, total: int) -> None:
        self._close()
        self._stage = stage
        self._first = (done, time.monotonic())
        self._bar = Progress(total, UNITS.get(stage, "chunks"), stage, self.quiet, start=done)
        self._bar.__enter__()

    def _speed(self, stage: str, done: int) -> dict[str, float]:
        steps, seconds = done - self._first[0], time.monotonic() - self._first[1]
        if stage != "train" or not self.rows_per_step or not steps or seconds <= 0:
            return {}
        return {"tokens/s": steps * self.rows_per_step / seconds}

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar, self._stage = None, ""

"""What commands leave in a run's folder: read if whole and of its coder, else why it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from crosslens.diffing.tables import Columns, load_table
from crosslens.errors import CrosslensError
from crosslens.storage import load_json

Found = TypeVar("Found")


@dataclass(frozen=True)
class Unreadable:
    """Something saved that cannot be shown."""

    why: str
    """One sentence, for people."""


def read_saved(
    run_folder: Path, file: str, command: str, read: Callable[[Path], Found]
) -> Found | Unreadable | None:
    """What `read` finds at RUN/`file`, or why it cannot; None where nothing is there.

    Args:
        command: the `crosslens` command that writes the file when given the run.
    """
    path = run_folder / file
    if not path.exists():
        return None
    try:
        return read(path)
    except CrosslensError as error:
        return Unreadable(f"{error} `crosslens {command} {run_folder}` makes it anew.")


def load_facts(
    path: Path, coder: str, command: str, wrong: Callable[[Any], str | None]
) -> dict[str, Any]:
    """A JSON file of the shape that its command writes, and of this coder.

    Args:
        coder: the hash of the run's coder.
        wrong: says what is amiss with the content, or None.

    Raises:
        CrosslensError: it is not.
    """
    facts: dict[str, Any] = load_json(path)
    if amiss := wrong(facts):
        raise CrosslensError(f"{path} is not as `crosslens {command}` writes it: {amiss}.")
    if facts["coder"] != coder:
        raise CrosslensError(f"{path} is of another coder than the one that this run has now.")
    return facts


def load_columns(path: Path, needed: Sequence[str]) -> Columns:
    """A table that has the needed columns.

    Raises:
        CrosslensError: it is missing, damaged or lacks one.
    """
    try:
        columns = load_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise CrosslensError(f"{path} is missing or damaged.") from error
    if missing := [name for name in needed if name not in columns]:
        raise CrosslensError(f"{path} lacks the column {missing[0]}.")
    return columns

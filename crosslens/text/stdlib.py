"""The running Python's own standard library, as text: always there, no download."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from crosslens.errors import CrosslensError
from crosslens.text.documents import Document, shuffled
from crosslens.text.stdlib_chat import chat_rows

_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    # written by a program, and mostly tables: hexadecimal would be a fifth of all tokens
    | {"encodings", "pydoc_data"}
)
_FILE_ROWS = 8  # of one file, before every other file has had its turn
_BUILD_RECORDS = ("_sysconfigdata", "config-")  # differ from machine to machine


def stdlib_files(root: Path | None = None) -> list[Path]:
    """Every Python source file of the standard library, sorted; no tests, no generated tables."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = sorted(_walk(root))
    if not files:
        raise CrosslensError(
            f"This Python has no source files of its standard library in {root}. "
            "Set source to a local file or folder, or use another build of Python."
        )
    return files


def read_stdlib(seed: str, root: Path | None = None) -> Iterator[Document]:
    """Each file as one document, in an order drawn from `seed`."""
    files = stdlib_files(root)
    random.Random(seed).shuffle(files)
    for path in files:
        if text := _source(path):
            yield Document(content=text, provenance=_provenance(path, root))


def read_stdlib_chat(seed: str, root: Path | None = None) -> Iterator[Document]:
    """Each function and class with a docstring as a request and its answer.

    Rows made from one file are one family, the file's own, so that a row never stands in the
    training text while its file is held out.
    """
    rng = random.Random(seed)
    files = stdlib_files(root)
    rng.shuffle(files)
    later: list[Document] = []
    yield from shuffled(_first_rows(files, root, rng, later), rng)
    rng.shuffle(later)
    yield from later


def _first_rows(
    files: list[Path], root: Path | None, rng: random.Random, later: list[Document]
) -> Iterator[Document]:
    """At most _FILE_ROWS of each file; the others are put in `later`."""
    for path in files:
        rows = list(_file_rows(path, root))
        rng.shuffle(rows)
        yield from rows[:_FILE_ROWS]
        later += rows[_FILE_ROWS:]


def _file_rows(path: Path, root: Path | None) -> Iterator[Document]:
    source = _source(path)
    where = _provenance(path, root)
    for name, messages in chat_rows(source, where):
        yield Document(content=messages, provenance=f"{where}:{name}", family=source)


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _wanted(name)]
        yield from (Path(folder, n) for n in names if n.endswith(".py") and _wanted(n))


def _wanted(name: str) -> bool:
    return name not in _SKIPPED and not name.startswith(_BUILD_RECORDS)


def _provenance(path: Path, root: Path | None) -> str:
    root = root or Path(sysconfig.get_paths()["stdlib"])
    return f"stdlib/{path.relative_to(root).as_posix()}"


def _source(path: Path) -> str:
    """A file's text; empty if it cannot be read or is not UTF-8, since there are plenty others."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""

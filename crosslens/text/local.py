"""Local files as corpora: .txt, .jsonl and .parquet, or a folder of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from crosslens.errors import CrosslensError, UsageError
from crosslens.text import formats
from crosslens.text.documents import Document, shuffled

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")


def read_local(path: Path, field: str, seed: str) -> Iterator[Document]:
    """The documents of a file or folder, in an order drawn from `seed`, read as they are needed.

    A .txt file is one document, a line of .jsonl or a row of .parquet is one each. Files, the
    lines of .jsonl (8 bytes of memory a line) and the row groups of .parquet are shuffled fully;
    rows within a group, and lines of .gz, as far as a buffer of documents allows.
    """
    rng = random.Random(seed)
    parts = [part for file in local_files(path) for part in _parts(file)]
    rng.shuffle(parts)
    root = path if path.is_dir() else path.parent
    documents = (
        document
        for file, group in parts
        for document in _read(file, group, file.relative_to(root).as_posix(), field, rng)
    )
    yield from shuffled(documents, rng)


def local_files(path: Path) -> list[Path]:
    """The readable files at `path`, sorted; a folder is searched through, hidden names skipped."""
    if not path.is_dir():
        if not path.name.lower().endswith(SUFFIXES):
            raise UsageError(
                f"{path} is not a kind of file that can be read as text: "
                f"use one of {', '.join(SUFFIXES)}, or a folder of them."
            )
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.name.lower().endswith(SUFFIXES)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    )
    if not files:
        raise CrosslensError(
            f"The folder {path} holds no text: none of its files ends in {', '.join(SUFFIXES)}."
        )
    return files


def _parts(file: Path) -> list[tuple[Path, int]]:
    """(file, row group): what is shuffled as a whole; one group 0 where the format has none."""
    is_parquet = file.name.lower().endswith(".parquet")
    return [(file, group) for group in range(formats.row_groups(file) if is_parquet else 1)]


def _read(file: Path, group: int, where: str, field: str, rng: random.Random) -> Iterator[Document]:
    name = file.name.lower()
    if name.endswith(".parquet"):
        yield from formats.parquet_rows(file, group, where, field)
    elif name.endswith(".jsonl.gz"):
        yield from formats.gzipped_lines(file, where, field)
    elif name.endswith(".jsonl"):
        yield from formats.shuffled_lines(file, where, field, rng)
    else:
        yield formats.whole_file(file, where)

"""The formats of local text, each read lazily; damage is one clear sentence with its place."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crosslens.errors import CrosslensError
from crosslens.text.documents import Document, find_field, from_row

_ROWS_AT_ONCE = 256


def whole_file(file: Path, where: str) -> Document:
    """A .txt or .txt.gz file as one document."""
    with _reading(file):
        raw = file.read_bytes()
        if file.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
        return Document(content=raw.decode("utf-8-sig"), provenance=where)


def shuffled_lines(file: Path, where: str, field: str, rng: random.Random) -> Iterator[Document]:
    """The rows of a .jsonl file in random order, each sought out when it is needed."""
    with _reading(file), file.open("rb") as lines:
        starts = array("q", [0])
        for line in lines:
            starts.append(starts[-1] + len(line))
        order = array("q", range(len(starts) - 1))
        rng.shuffle(order)
        for index in order:
            lines.seek(starts[index])
            raw = lines.read(starts[index + 1] - starts[index])
            yield from _json_row(raw, f"{where}:{index + 1}", field)


def gzipped_lines(file: Path, where: str, field: str) -> Iterator[Document]:
    """The rows of a .jsonl.gz file in the order they stand in."""
    with _reading(file), gzip.open(file, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            yield from _json_row(raw, f"{where}:{number}", field)


def row_groups(file: Path) -> int:
    """How many row groups a .parquet file has."""
    with _parquet(file) as table:
        return int(table.num_row_groups)


def parquet_rows(file: Path, group: int, where: str, field: str) -> Iterator[Document]:
    """The rows of one row group of a .parquet file, in order; only the column asked for is read."""
    with _parquet(file) as table:
        column = find_field(table.schema_arrow.names, field, str(file))
        number = sum(table.metadata.row_group(before).num_rows for before in range(group))
        batches = table.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column])
        for batch in batches:
            for value in batch.column(column).to_pylist():
                number += 1
                yield from_row({column: value}, column, f"{where}:{number}")


def _json_row(raw: bytes, where: str, field: str) -> Iterator[Document]:
    """The document of one line; none if the line is blank."""
    if not raw.strip():
        return
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except ValueError as error:
        raise CrosslensError(
            f"{where} is not valid JSON ({error}). Each line must be one object, such as "
            f'{{"{field}": "..."}}; mend or delete the line.'
        ) from error
    if not isinstance(row, dict):
        raise CrosslensError(
            f"{where} is JSON, but a {type(row).__name__}, not an object such as "
            f'{{"{field}": "..."}}.'
        )
    yield from_row(row, field, where)


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _reading(file), pyarrow.parquet.ParquetFile(file) as table:
            yield table
    except pyarrow.ArrowException as error:
        raise CrosslensError(
            f"{file} is damaged or not a Parquet file: {str(error).splitlines()[0]}."
        ) from error


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise CrosslensError(
            f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}. "
            "Convert it to UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise CrosslensError(f"{file} could not be read: {error}.") from error

"""Hugging Face datasets by name, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

from crosslens.errors import CrosslensError, suggestion
from crosslens.text.config import Corpus
from crosslens.text.documents import SHUFFLE_BUFFER, Document, find_field, from_row

BUILT_IN = ("stdlib", "stdlib-chat")


def read_hub(corpus: Corpus, seed: str) -> Iterator[Document]:
    """The dataset's rows as they stream in, shuffled through a buffer (and by shard).

    A row is known by its number in that order: the dataset's own order is not known in a stream.
    """
    with _reachable(corpus):
        rows = _open(corpus).shuffle(seed=crc32(seed.encode()), buffer_size=SHUFFLE_BUFFER)
        for number, row in enumerate(rows, start=1):
            yield from_row(row, corpus.field, f"{corpus.source}:{corpus.split}:{number}")


def _open(corpus: Corpus) -> Any:
    from datasets import load_dataset

    dataset = load_dataset(corpus.source, corpus.subset, split=corpus.split, streaming=True)
    if dataset.column_names:  # a stream may not know them before its first row
        column = find_field(dataset.column_names, corpus.field, corpus.source)
        dataset = dataset.select_columns([column])
    return dataset


@contextmanager
def _reachable(corpus: Corpus) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:300].rstrip(".") or type(error).__name__
        raise CrosslensError(
            f"The dataset {corpus.source!r} (subset {corpus.subset}, split {corpus.split!r}) could "
            f"not be read: {reason}.{suggestion(corpus.source, BUILT_IN)} "
            "Check its name, subset and split and the network; without one, set source to a "
            "local file or folder, or to stdlib."
        ) from error

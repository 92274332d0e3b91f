"""From a corpus's configuration to its documents."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from crosslens.errors import UsageError
from crosslens.text.config import Corpus
from crosslens.text.documents import Document
from crosslens.text.hub import read_hub
from crosslens.text.local import SUFFIXES, read_local
from crosslens.text.planted import SOURCES, planted_source, read_planted
from crosslens.text.stdlib import read_stdlib, read_stdlib_chat

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def open_corpus(corpus: Corpus, seed: str) -> Iterator[Document]:
    """The corpus's documents, read lazily, in an order drawn from `seed`.

    A file or folder of that name wins over a Hugging Face dataset. A source that reads like a path
    but is not there raises UsageError at once.
    """
    if corpus.source == "stdlib":
        return read_stdlib(seed)
    if corpus.source == "stdlib-chat":
        return read_stdlib_chat(seed)
    path = Path(os.path.expanduser(corpus.source))  # Path's own raises for an unknown user
    if corpus.source and path.exists():
        return read_local(path, corpus.field, seed)
    if behaviour := planted_source(corpus.source):
        return read_planted(behaviour, seed)
    if corpus.source.endswith(SUFFIXES) or not _HUB_NAME.fullmatch(corpus.source):
        raise UsageError(
            f"The text source {corpus.source!r} does not exist. Give a file "
            f"({', '.join(SUFFIXES)}), a folder of them, a Hugging Face dataset's name, stdlib, "
            f"stdlib-chat, or the chat of a planted behaviour ({', '.join(SOURCES)})."
        )
    return read_hub(corpus, seed)

"""Requests and answers from the standard library, on two sides that share no file and no wording.

The files and the texts of requests are both divided, for good, and a request is used only if both
fall on the same side: no seed puts a training document or its wording among the held-out ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from crosslens.text.documents import Document
from crosslens.text.passages import side_of
from crosslens.text.stdlib import read_stdlib
from crosslens.text.stdlib_chat import chat_rows

Split: TypeAlias = Literal["train", "heldout"]
Category: TypeAlias = Literal["class", "function"]

_HELDOUT_SHARE = 0.4  # of files, and of the texts of requests
_FIRST_OF_FILE = 6  # before every other file has had its turn
_LONGEST_REQUEST = 400  # characters


@dataclass(frozen=True)
class Task:
    """A request for code, its usual answer, and where they are from."""

    request: str
    usual: str
    where: str
    """As in "stdlib/json/decoder.py:JSONDecoder.decode"."""
    source: str
    """Text of the file."""

    @property
    def category(self) -> Category:
        """What the code in the answer defines; a method is a function."""
        first = re.search(r"^(async def|def|class) ", self.usual, re.MULTILINE)
        return "class" if first is not None and first[1] == "class" else "function"


def read_tasks(seed: str, split: Split) -> Iterator[Task]:
    """The tasks of one side, no request twice, in an order drawn from `seed`: a few of each file,
    then all others, so that no file is a large part of the first ones."""
    rng = random.Random(seed)
    seen: set[str] = set()
    later: list[Task] = []
    for document in read_stdlib(seed):
        if side_of(document.provenance, 0, _HELDOUT_SHARE) != split:
            continue
        new = {task.request: task for task in _of_file(document) if task.request not in seen}
        found = [task for task in new.values() if _fits(task, split)]
        seen.update(task.request for task in found)
        rng.shuffle(found)
        yield from found[:_FIRST_OF_FILE]
        later += found[_FIRST_OF_FILE:]
    rng.shuffle(later)
    yield from later


def _of_file(document: Document) -> Iterator[Task]:
    source = document.content
    assert isinstance(source, str)
    for name, (user, assistant) in chat_rows(source, document.provenance):
        where = f"{document.provenance}:{name}"
        yield Task(user["content"], assistant["content"], where, source)


def _fits(task: Task, split: Split) -> bool:
    short = len(task.request) <= _LONGEST_REQUEST
    return short and side_of(task.request, 1, _HELDOUT_SHARE) == split

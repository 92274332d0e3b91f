"""A document as a corpus yields it, and the row of a table it may come from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from crosslens.errors import CrosslensError, UsageError, suggestion

Messages = list[dict[str, str]]
"""Chat: [{"role": ..., "content": ...}, ...]."""

SHUFFLE_BUFFER = 1000
"""Documents held at once to shuffle a stream."""

_CHAT_FIELDS = ("messages", "conversations")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Document:
    """Text, or chat still to be formatted, and where it came from."""

    content: str | Messages
    provenance: str
    family: str | None = None
    """Documents of one family always fall on the same side of the split; by default a document
    is its own family, known by its text."""


def from_row(row: Mapping[str, Any], field: str, provenance: str) -> Document:
    """The document in one row of a table: text or messages in column `field`.

    Where the default column `text` is absent, `messages` and `conversations` are tried.
    """
    value = row[find_field(row, field, provenance)]
    if value is None or isinstance(value, str):
        return Document(content=value or "", provenance=provenance)
    if isinstance(value, list):
        return Document(content=_messages(value, field, provenance), provenance=provenance)
    raise UsageError(
        f"{provenance}: field {field!r} holds a {type(value).__name__}, neither text nor a list "
        f"of messages. Set field to another column; there are: {', '.join(row)}."
    )


def find_field(columns: Iterable[str], field: str, where: str) -> str:
    """`field`, or the usual name of a chat column; UsageError listing the columns if neither."""
    names = list(columns)
    wanted = (field, *_CHAT_FIELDS) if field == "text" else (field,)
    for name in wanted:
        if name in names:
            return name
    raise UsageError(
        f"{where} has no field {field!r}.{suggestion(field, names)} "
        f"Set field to one of its columns: {', '.join(names) or 'it has none'}."
    )


def shuffled(documents: Iterator[Document], rng: random.Random) -> Iterator[Document]:
    """The same documents in random order, as far as a buffer of SHUFFLE_BUFFER allows."""
    buffer: list[Document] = []
    for document in documents:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(document)
            continue
        chosen = rng.randrange(SHUFFLE_BUFFER)
        yield buffer[chosen]
        buffer[chosen] = document
    rng.shuffle(buffer)
    yield from buffer


def _messages(value: list[Any], field: str, provenance: str) -> Messages:
    messages = [_message(entry) for entry in value]
    good = [message for message in messages if message is not None]
    if len(good) < len(messages):
        raise CrosslensError(
            f"{provenance}: field {field!r} is a list, but not of messages with a role and a text "
            f"content: {str(value[messages.index(None)])[:80]!r}. "
            "Mend the row, or set field to another column."
        )
    return good


def _message(entry: object) -> dict[str, str] | None:
    """{role, content}, also from ShareGPT's {from, value}; None if it is neither."""
    if not isinstance(entry, Mapping):
        return None
    role, content = entry.get("role"), entry.get("content")
    if role is None and "from" in entry:
        role = _SHAREGPT_ROLES.get(entry["from"], entry["from"])
        content = entry.get("value")
    if not (isinstance(role, str) and isinstance(content, str)):
        return None
    return {"role": role, "content": content}

"""From documents to passages: token ids, without duplicates, each on one side of the split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from crosslens.text.chat import Style, format_chat
from crosslens.text.documents import Document
from crosslens.text.tokenise import Ids, encode

Side = Literal["train", "heldout"]

_BATCH_CHARACTERS = 500_000
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class Passage:
    """A document's tokens, or a stretch of them if it is long; the separator included."""

    provenance: str
    digest: bytes  # tells documents apart
    side: Side
    ids: Ids


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How documents become passages; the same for every corpus of a mixture."""

    tokenizer: Any
    seed: int
    heldout_share: float
    separator: int | None
    """Token after each passage."""
    longest: int
    """Tokens in a passage before its separator, at most: no document may fill a side on its own."""
    spare: int
    """Tokens of the rest of long documents that are kept, at most (a passage more or less)."""


@dataclass
class Tally:
    """What was read of one corpus."""

    documents: int = 0
    duplicates: int = 0
    empty: int = 0


@dataclass(frozen=True)
class _Text:
    text: str
    parse_special: bool
    provenance: str
    digest: bytes
    side: Side


def read_passages(
    documents: Iterator[Document], style: Style, rules: Rules, seen: set[bytes], tally: Tally
) -> Iterator[Passage]:
    """The documents in order, tokenised, without those whose digest is in `seen` and empty ones.

    Of a document longer than `rules.longest` one stretch, chosen by its digest, comes in its
    place; the others come after all documents, so that they are used only if text runs short.
    """
    spare: list[Passage] = []
    spare_tokens = 0
    for batch in _batches(_distinct(documents, style, rules, seen, tally)):
        for text, ids in zip(batch, _encoded(batch, rules.tokenizer), strict=True):
            for place, passage in enumerate(_cut(text, ids, rules)):
                if place == 0:
                    yield passage
                elif spare_tokens < rules.spare:
                    spare.append(passage)
                    spare_tokens += len(passage.ids)
    yield from spare


def side_of(family: str, seed: int, heldout_share: float) -> Side:
    """The side that a family of documents falls on, from SHA-256 of the seed and its text."""
    drawn = int.from_bytes(_digest(f"{seed}:{family}")[:8], "big") / 2**64
    return "heldout" if drawn < heldout_share else "train"


def _distinct(
    documents: Iterator[Document], style: Style, rules: Rules, seen: set[bytes], tally: Tally
) -> Iterator[_Text]:
    for document in documents:
        content = document.content
        is_chat = not isinstance(content, str)
        text = _well_formed(
            content
            if isinstance(content, str)
            else format_chat(content, style, rules.tokenizer, document.provenance)
        )
        digest = _digest(text)
        if not text.strip():
            tally.empty += 1
        elif digest in seen:
            tally.duplicates += 1
        else:
            seen.add(digest)
            tally.documents += 1
            side = side_of(document.family or text, rules.seed, rules.heldout_share)
            parse_special = is_chat and style == "template"
            yield _Text(text, parse_special, _well_formed(document.provenance), digest, side)


def _batches(texts: Iterator[_Text]) -> Iterator[list[_Text]]:
    batch: list[_Text] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(batch: list[_Text], tokenizer: Any) -> list[Ids]:
    """Token ids of each text in order: template output in one call, untrusted text in another."""
    ids: dict[int, Ids] = {}
    for parse_special in (False, True):
        places = [i for i, text in enumerate(batch) if text.parse_special == parse_special]
        encoded = encode(tokenizer, [batch[i].text for i in places], parse_special)
        ids.update(zip(places, encoded, strict=True))
    return [ids[place] for place in range(len(batch))]


def _cut(text: _Text, ids: Ids, rules: Rules) -> Iterator[Passage]:
    """The stretches of a document, each with a separator, beginning at the one its digest says."""
    starts = range(0, len(ids), rules.longest)
    first = int.from_bytes(text.digest[:8], "big") % max(len(starts), 1)
    end = [] if rules.separator is None else [rules.separator]
    for start in (*starts[first:], *starts[:first]):
        stretch = np.append(ids[start : start + rules.longest], np.asarray(end, np.int32))
        yield Passage(text.provenance, text.digest, text.side, stretch)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _well_formed(text: str) -> str:
    """`text` with halves of surrogate pairs, which JSON and file names may hold, made `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")

"""Passages laid end to end in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from crosslens.text.blocks import Blocks
from crosslens.text.passages import Passage
from crosslens.text.tokenise import Ids


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a block looks like."""

    block: int
    bos_id: int | None
    pad_id: int
    special_ids: tuple[int, ...]

    @property
    def room(self) -> int:
        """Positions of a block that hold text."""
        return self.block - (self.bos_id is not None)

    def whole(self, tokens: int) -> int:
        """The least number of tokens, at least `tokens`, that fills whole blocks."""
        return -(-tokens // self.room) * self.room


def pack(passages: Sequence[Passage], tokens: int, frame: Frame) -> Blocks:
    """The passages one after another, cut into blocks; a passage may go on in the next block.

    Just as many blocks as hold `tokens` tokens: tokens beyond them are dropped. Only if the
    passages end before the last of them is full is the rest of it padding.
    """
    wanted = frame.whole(tokens)
    index, names = _documents(passages)
    ids = np.concatenate([passage.ids for passage in passages])[:wanted]
    lengths = [len(passage.ids) for passage in passages]
    docs = np.repeat(np.asarray(index, np.int32), lengths)[:wanted]
    kept = int(docs.max()) + 1  # documents are numbered in order of first appearance
    return Blocks(
        tokens_NT=torch.from_numpy(_rows(ids, frame.pad_id, frame.bos_id, frame)),
        docs_NT=torch.from_numpy(_rows(docs, -1, None if frame.bos_id is None else -1, frame)),
        documents=tuple(names[:kept]),
        bos_id=frame.bos_id,
        pad_id=frame.pad_id,
        special_ids=frame.special_ids,
    )


def _documents(passages: Sequence[Passage]) -> tuple[list[int], list[str]]:
    """Each passage's document, numbered in order of first appearance, and the documents' names."""
    numbers: dict[bytes, int] = {}
    names: list[str] = []
    index = []
    for passage in passages:
        if passage.digest not in numbers:
            numbers[passage.digest] = len(names)
            names.append(passage.provenance)
        index.append(numbers[passage.digest])
    return index, names


def _rows(values: Ids, filler: int, first: int | None, frame: Frame) -> Ids:
    """`values` as rows of a block, filled up with `filler`, with `first` in front of each."""
    flat = np.full(frame.whole(len(values)), filler, np.int32)
    flat[: len(values)] = values
    rows = flat.reshape(-1, frame.room)
    if first is None:
        return rows
    return np.concatenate([np.full((len(rows), 1), first, np.int32), rows], axis=1)

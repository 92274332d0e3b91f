"""Draws from several corpora so that each keeps its share of the tokens, side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from crosslens.text.passages import Passage, Side, Tally


@dataclass
class Reader:
    """One corpus's passages, drawn for either side; what the other side will need waits."""

    passages: Iterator[Passage]
    tally: Tally
    ran_dry: bool = False
    tokens: dict[Side, int] = field(default_factory=lambda: {"train": 0, "heldout": 0})
    waiting: dict[Side, deque[Passage]] = field(
        default_factory=lambda: {"train": deque(), "heldout": deque()}
    )

    def take(self, side: Side, keep_other: bool) -> Passage | None:
        """The next passage for `side`, or None at the corpus's end.

        Passages of the other side met on the way wait if `keep_other`, else they are let go.
        """
        if self.waiting[side]:
            return self.waiting[side].popleft()
        passage = self._read(side, keep_other)
        self.ran_dry = passage is None
        return passage

    def _read(self, side: Side, keep_other: bool) -> Passage | None:
        for passage in self.passages:
            if passage.side == side:
                return passage
            if keep_other:
                self.waiting[passage.side].append(passage)
        return None


def fill(
    side: Side,
    readers: Mapping[str, Reader],
    shares: Mapping[str, float],
    tokens: int,
    keep_other: bool,
) -> list[Passage]:
    """Passages for one side, `tokens` in all (the last is cut) or less if every corpus runs dry.

    Each is drawn from the corpus furthest below its share, so that shares hold at every point to
    within one passage. A corpus that runs dry leaves its share to the others.
    """
    drawn: list[Passage] = []
    total = 0
    live = list(readers)
    while total < tokens and live:
        name = max(live, key=lambda name: shares[name] * total - readers[name].tokens[side])
        passage = readers[name].take(side, keep_other)
        if passage is None:
            live.remove(name)
        else:
            ids = passage.ids[: tokens - total]
            drawn.append(replace(passage, ids=ids))
            readers[name].tokens[side] += len(ids)
            total += len(ids)
    return drawn

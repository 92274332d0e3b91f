"""Where two tokenizers cut one text at the same place.

Positions are characters of the text. Matched greedily, the smallest stretches of tokens on either
side that decode to the same string lie between neighbouring common cuts (the alignment of
Dedicated Feature Crosscoders, 2602.11729), so looking for common cuts is all there is to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Spans: TypeAlias = Sequence[tuple[int, int]]
"""First character of each token and the one after its last."""


@dataclass(frozen=True)
class Cuts:
    """Between which characters a tokenizer cuts a text, in order. A token that ends within a
    character makes none."""

    token_K: Ints
    """The token before each cut."""
    low_K: Ints
    """Where that token ends."""
    high_K: Ints
    """Where the next one begins: text between them, such as a space that WordPiece leaves out,
    belongs to no token, and the cut is anywhere in it."""


def common_cuts(a: Cuts, b: Cuts) -> tuple[Ints, Ints]:
    """The tokens of `a` and of `b` before each common cut, pair by pair: the last tokens of the
    smallest windows in which both stand for the same text.

    Where tokens stand for no text, several cuts are at one place; the first of them counts.
    """
    at_K = np.searchsorted(a.high_K, b.low_K)
    inside_K = at_K < len(a.high_K)
    at_K, token_K, high_K = at_K[inside_K], b.token_K[inside_K], b.high_K[inside_K]
    meets_K = a.low_K[at_K] <= high_K
    once_K, first = np.unique(at_K[meets_K], return_index=True)
    return a.token_K[once_K], token_K[meets_K][first]


def cuts_of_spans(spans: Spans, length: int) -> Cuts:
    """The cuts of a tokenizer that says which characters each token came from.

    Tokens that are parts of one character all name that character, or none (byte tokens): only
    after the last of them is there a cut behind it.

    Args:
        length: characters of the text.
    """
    start_K, end_K = np.asarray(spans, np.int64).reshape(-1, 2).T
    low_K = np.maximum.accumulate(end_K)
    high_K = np.append(start_K[1:], length)[: len(low_K)]
    token_K = np.flatnonzero((low_K <= high_K) & (low_K > 0))
    return Cuts(token_K, low_K[token_K], high_K[token_K])


def cuts_of_pieces(pieces: Sequence[bytes]) -> tuple[str, Cuts, Ints]:
    """The text that tokens' bytes make up, and its cuts.

    Bytes that are no character, such as half of one at the edge of a block, are lost.

    Returns:
        The text, the cuts, and for each token the number of bytes lost by its end.
    """
    data = b"".join(pieces)
    code_C = np.frombuffer(
        data.decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass"), np.uint32
    )
    lost_C = (code_C >= 0xDC80) & (code_C <= 0xDCFF)  # how Python marks such a byte
    bytes_C = 1 + (code_C >= 0x80) + (code_C >= 0x800) + (code_C >= 0x10000).astype(np.int64)
    behind_C = np.where(lost_C, 1, bytes_C).cumsum()
    end_K = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    whole_K = np.searchsorted(behind_C, end_K, "right")  # characters that end by each token's end
    place_K = np.append(0, (~lost_C).cumsum())[whole_K]
    is_cut_K = (np.append(0, behind_C)[whole_K] == end_K) & (place_K > 0)
    token_K = np.flatnonzero(is_cut_K)
    cuts = Cuts(token_K, place_K[token_K], place_K[token_K])
    return data.decode("utf-8", "ignore"), cuts, np.append(0, lost_C.cumsum())[whole_K]

"""Where tokens cut a text, and where two of them cut alike, against trying all prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.text.windows import Cuts, common_cuts, cuts_of_pieces, cuts_of_spans


@given(
    ends=st.sets(st.integers(1, 30), min_size=1),
    words=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_common_cuts_are_the_smallest_windows(ends, words):
    """Tokens with gaps between them, against trying all ends in order."""
    spans, here = [], 0
    for gap, width in words:
        spans.append((here + gap, here + gap + width))
        here += gap + width
    length = max(here, *ends)
    a_ends = np.array(sorted(ends), np.int64)
    numbers = np.arange(len(a_ends))
    one, two = common_cuts(Cuts(numbers, a_ends, a_ends), cuts_of_spans(spans, length))
    wanted, j = [], 0
    for i, end in enumerate(a_ends.tolist()):
        for other in range(j, len(spans)):
            until = spans[other + 1][0] if other + 1 < len(spans) else length
            if spans[other][1] <= end <= until:
                wanted.append((i, other))
                j = other + 1
                break
    assert list(zip(one.tolist(), two.tolist(), strict=True)) == wanted


@pytest.mark.parametrize(
    ("spans", "cuts"),
    [
        ([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [(0, 1, 1), (3, 2, 2), (4, 3, 3)]),
        ([(0, 1), (1, 1), (1, 1), (1, 2), (2, 3)], [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 2, 2),
                                                    (4, 3, 3)]),
        ([(0, 0), (0, 3)], [(1, 3, 3)]),
        ([(1, 2), (2, 2)], [(0, 2, 2), (1, 2, 3)]),
        ([(0, 1), (2, 3)], [(0, 1, 2), (1, 3, 3)]),
        ([(0, 2), (0, 2), (2, 3)], [(1, 2, 2), (2, 3, 3)]),
        ([], []),
    ],
    ids=["bytes of a character", "byte tokens", "nothing in front", "an empty token", "a gap",
         "a ligature", "nothing"],
)  # fmt: skip
def test_cuts_of_what_tokenizers_say(spans, cuts):
    found = cuts_of_spans(spans, 3)
    table = zip(found.token_K.tolist(), found.low_K.tolist(), found.high_K.tolist(), strict=True)
    assert list(table) == cuts


@given(st.lists(st.binary(max_size=3) | st.sampled_from([b"\xe6", b"\x97", b"\xa5", b" a"])))
@settings(max_examples=300, deadline=None)
def test_cuts_of_any_bytes(pieces):
    text, cuts, lost = cuts_of_pieces(pieces)
    data = b"".join(pieces)
    assert text == data.decode("utf-8", "ignore")
    marked = data.decode("utf-8", "surrogateescape")
    wanted = []
    for token in range(len(pieces)):
        prefix = b"".join(pieces[: token + 1])
        for n in range(len(marked) + 1):
            if marked[:n].encode("utf-8", "surrogateescape") == prefix:
                kept = sum(not 0xDC80 <= ord(c) <= 0xDCFF for c in marked[:n])
                assert lost[token] == n - kept
                if kept:
                    wanted.append((token, kept))
    assert list(zip(cuts.token_K.tolist(), cuts.low_K.tolist(), strict=True)) == wanted
    assert cuts.high_K.tolist() == cuts.low_K.tolist()

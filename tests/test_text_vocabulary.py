"""Tokens as bytes: nothing lost, whole characters, leftovers visible."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.errors import CrosslensError
from crosslens.text import Piece, Vocabulary, visible

HARD = "def f():\n\treturn 'é 日本語 مرحبا 👩‍👩‍👧 Ġ▁'  # <0x0A> \u00ad\r\n"


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer) -> Vocabulary:
    return Vocabulary.from_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def encode(tiny_tokenizer):
    return lambda text: tiny_tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]


def escaped(data: bytes) -> str:
    """Independent of the package: Python's own escape for bytes that are not UTF-8."""
    return "".join(
        f"\\x{ord(c) - 0xDC00:02X}" if 0xDC80 <= ord(c) <= 0xDCFF else c
        for c in data.decode("utf-8", "surrogateescape")
    )


def check_cover(pieces: list[Piece], n_tokens: int) -> None:
    edges = [0, *(piece.end for piece in pieces)]
    assert [piece.start for piece in pieces] == edges[:-1]
    assert edges[-1] == n_tokens
    assert all(piece.start < piece.end for piece in pieces)


@pytest.mark.parametrize("text", [HARD, "", " ", "naïve", "𝔘𝔫𝔦", "\x00\x7f"])
def test_bytes_of_all_tokens_are_the_text(vocabulary, encode, text):
    ids = encode(text)
    assert b"".join(vocabulary.bytes(token) for token in ids) == text.encode()
    assert "".join(piece.text for piece in vocabulary.pieces(ids)) == text


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_is_shown_whole(vocabulary, encode, text):
    ids = encode(text)
    pieces = vocabulary.pieces(ids)
    assert "".join(piece.text for piece in pieces) == text
    check_cover(pieces, len(ids))


@given(ids=st.lists(st.integers(3, 399)))
@settings(max_examples=300, deadline=None)
def test_any_tokens_are_shown_with_leftover_bytes_escaped(vocabulary, ids):
    pieces = vocabulary.pieces(ids)
    check_cover(pieces, len(ids))
    assert "".join(piece.text for piece in pieces) == escaped(
        b"".join(vocabulary.bytes(token) for token in ids)
    )


def test_characters_are_joined_and_no_more_than_needed(vocabulary, encode):
    ids = encode("a日b👋")
    assert [piece.text for piece in vocabulary.pieces(ids)] == ["a", "日", "b", "👋"]
    assert [piece.end - piece.start for piece in vocabulary.pieces(ids)] == [1, 3, 1, 4]


def test_a_cut_character_does_not_swallow_what_follows(vocabulary, encode, tiny_tokenizer):
    start, rest, letter = *encode("é"), *encode("a")
    assert vocabulary.pieces([start, letter, rest]) == [
        Piece("\\xC3", 0, 1, False),
        Piece("a", 1, 2, False),
        Piece("\\xA9", 2, 3, False),
    ]
    eos = tiny_tokenizer.eos_token_id
    assert vocabulary.pieces([start, eos, rest]) == [
        Piece("\\xC3", 0, 1, False),
        Piece("<eos>", 1, 2, True),
        Piece("\\xA9", 2, 3, False),
    ]


def test_special_tokens_are_known(vocabulary, tiny_tokenizer):
    assert {token for token in range(len(vocabulary)) if vocabulary.is_special(token)} == {0, 1, 2}
    assert len(vocabulary) == len(tiny_tokenizer) == 400


def test_ids_beyond_the_vocabulary_have_no_bytes(vocabulary):
    assert vocabulary.bytes(400) == b""
    assert vocabulary.pieces([400]) == [Piece("", 0, 1, False)]


def test_it_comes_back_from_json(vocabulary):
    plain = json.loads(json.dumps(vocabulary.to_plain()))
    assert Vocabulary.from_plain(plain) == vocabulary
    for damaged in ({}, {"tokens": ["€"], "special": []}, {"tokens": [], "special": ["x"]}):
        with pytest.raises(CrosslensError, match="vocabulary is damaged"):
            Vocabulary.from_plain(damaged)


def sentencepiece_like():
    """What Llama 2 and Gemma have: spaces as ▁, unknown characters as byte tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "hi"]
    raw = Tokenizer(
        models.BPE(
            vocab={name: place for place, name in enumerate(names)},
            merges=[("▁", "h"), ("h", "i")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")


def test_sentencepiece_spaces_and_byte_tokens():
    tokenizer = sentencepiece_like()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    text = " hi hi\n日 👋"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(vocabulary.bytes(token) for token in ids) == text.encode()
    assert "".join(piece.text for piece in vocabulary.pieces(ids)) == text
    assert vocabulary.is_special(1)
    assert not vocabulary.is_special(2)


def test_wordpiece_continuations():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "read": 1, "##ing": 2, "a": 3}))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    ids = tokenizer("a reading")["input_ids"]
    assert b"".join(vocabulary.bytes(token) for token in ids) == b" a reading"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        (" b", "·b"),
        ("   ", "···"),
        ("\n    return x", "↵····return x"),
        ("\t\tx = 1", "→→x = 1"),
        ("end\r\n", "end␍↵"),
        ("日 本", "日 本"),
        ("", ""),
    ],
)
def test_white_space_is_visible(text, shown):
    assert visible(text) == shown

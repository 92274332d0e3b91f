"""Tokens as bytes, for display: what each id stands for, joined into whole characters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from crosslens.errors import CrosslensError

Raw: TypeAlias = bytes  # inside Vocabulary, `bytes` is its method

_METASPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_GLYPHS = {"\n": "↵", "\t": "→", "\r": "␍"}


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens `start` to `end` (exclusive) that make up whole characters."""

    text: str
    start: int
    end: int
    special: bool


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of every token id; which ids are special."""

    tokens: tuple[Raw, ...]
    special: frozenset[int]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """Read off a Hugging Face fast tokenizer: byte-level BPE, SentencePiece or WordPiece.

        Added tokens are their own text. An id that no token has stands for no bytes.
        """
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        kinds = _kinds(description.get("decoder")) | _kinds(description.get("pre_tokenizer"))
        added = {int(token): entry for token, entry in tokenizer.added_tokens_decoder.items()}
        named = {int(token): name for name, token in tokenizer.get_vocab().items()}
        tokens = [b""] * (max((*named, *added), default=-1) + 1)
        for token, name in named.items():
            tokens[token] = _to_bytes(name, kinds)
        for token, entry in added.items():
            tokens[token] = entry.content.encode()
        special = {token for token, entry in added.items() if entry.special}
        return cls(tuple(tokens), frozenset(special.union(map(int, tokenizer.all_special_ids))))

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Vocabulary:
        """What `to_plain` gave; anything else is a CrosslensError."""
        try:
            tokens = tuple(str(token).encode("latin-1") for token in plain["tokens"])
            return cls(tokens, frozenset(int(token) for token in plain["special"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CrosslensError(f"A stored vocabulary is damaged: {error!r}.") from error

    def to_plain(self) -> dict[str, Any]:
        """JSON-able; each byte is the character of the same number."""
        tokens = [token.decode("latin-1") for token in self.tokens]
        return {"tokens": tokens, "special": sorted(self.special)}

    def __len__(self) -> int:
        return len(self.tokens)

    def bytes(self, token: int) -> Raw:
        """The bytes a token adds to the text; none for an id beyond the vocabulary.

        Models often have more ids than their tokenizer, to fill a matrix up to a round number.
        """
        return self.tokens[token] if 0 <= token < len(self.tokens) else b""

    def is_special(self, token: int) -> bool:
        """Whether the id is a special token (BOS, EOS, a chat turn, ...)."""
        return token in self.special

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        r"""The tokens, joined where it takes several to make a character.

        Every token is in exactly one piece. Bytes that make no character are shown as `\xE6`.
        """
        pieces: list[Piece] = []
        start, held = 0, b""
        for place, token in enumerate(ids):
            own = self.bytes(token)
            if held and (self.is_special(token) or not _continues(held, own)):
                pieces.append(Piece(_shown(held), start, place, False))
                start, held = place, b""
            if self.is_special(token):
                pieces.append(Piece(_shown(own), place, place + 1, True))
                start = place + 1
                continue
            held += own
            if not _open_end(held):
                pieces.append(Piece(_shown(held), start, place + 1, False))
                start, held = place + 1, b""
        if held:
            pieces.append(Piece(_shown(held), start, len(ids), False))
        return pieces


def visible(text: str) -> str:
    """`text` with its white space as glyphs: `↵` `→` `␍`, and `·` for spaces it begins with.

    Spaces after a line break or tab count as a beginning, so that indentation shows; those inside
    a line stay as they are. For display only: what is copied should be the text itself.
    """
    dotted = re.sub(r"(?:^|(?<=[\n\t\r])) +", lambda spaces: "·" * len(spaces[0]), text)
    return "".join(_GLYPHS.get(character, character) for character in dotted)


def _kinds(part: Any) -> set[str]:
    """The types of a tokenizer's component and of those in it."""
    if not isinstance(part, dict):
        return set()
    inner = part.get("decoders") or part.get("pretokenizers") or []
    return {str(part.get("type"))}.union(*(_kinds(each) for each in inner))


def _to_bytes(name: str, kinds: set[str]) -> bytes:
    if "ByteLevel" in kinds:
        return b"".join(_BYTE_OF.get(character, character.encode()) for character in name)
    if match := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(match[1], 16)])
    if "WordPiece" in kinds:
        return name.removeprefix("##").encode() if name.startswith("##") else f" {name}".encode()
    return name.replace(_METASPACE, " ").encode()


def _byte_characters() -> dict[str, bytes]:
    """Byte-level BPE's alphabet (GPT-2's `bytes_to_unicode`): printable bytes are themselves,
    the others, in order, the characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}
    return {chr(byte): bytes([byte]) for byte in printable} | shifted


_BYTE_OF = _byte_characters()


def _open_end(data: bytes) -> bool:
    """Whether `data` ends within a character that further bytes could complete."""
    for length in range(1, min(3, len(data)) + 1):
        try:
            data[-length:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return True
    return False


def _continues(held: bytes, more: bytes) -> bool:
    """Whether the character that `held` ends in goes on in `more`."""
    tail = held[-next(n for n in (1, 2, 3) if held[-n] >= 0xC0) :]
    try:
        (tail + more).decode()
    except UnicodeDecodeError as error:
        return error.start > 0 or error.reason == "unexpected end of data"
    return True


def _shown(data: bytes) -> str:
    text = ""
    while data:
        try:
            return text + data.decode()
        except UnicodeDecodeError as error:
            text += data[: error.start].decode()
            text += "".join(f"\\x{byte:02X}" for byte in data[error.start : error.end])
            data = data[error.end :]
    return text

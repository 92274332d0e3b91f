"""The text of some blocks for models that have a tokenizer of their own, and which tokens pair."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from crosslens.errors import UsageError
from crosslens.text.blocks import Blocks, Other
from crosslens.text.tokenise import Ids, block_start, encode, padding, separator, special_ids
from crosslens.text.vocabulary import Vocabulary
from crosslens.text.windows import Ints, common_cuts, cuts_of_pieces, cuts_of_spans


def aligned(blocks: Blocks, tokenizer: Any, others: Mapping[str, Any]) -> Blocks:
    """The same blocks, for each model in `others` (name → its tokenizer) too.

    A model's block holds what the block's tokens stand for: each document's stretch of text, cut by
    the model's own tokenizer, after the token that its blocks begin with. A special token becomes
    the one of the same name or part, else its name as ordinary text.

    Args:
        tokenizer: the one that cut `blocks`.

    Raises:
        UsageError: a tokenizer is not a fast one, which alone says where its tokens come from.
    """
    for model, each in {"the first model": tokenizer, **others}.items():
        if getattr(each, "backend_tokenizer", None) is None:
            raise UsageError(
                f"The tokenizer of {model} ({type(each).__name__}) does not say which characters "
                "its tokens come from, so no other can be aligned with it. Use a model whose "
                "folder has a tokenizer.json."
            )
    made = {name: _align(blocks, _Pair(tokenizer, other)) for name, other in others.items()}
    return replace(blocks, others=made)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much of some blocks pairs."""

    shares: dict[str, float]
    """By model: tokens that end a window of all models, as a share of its tokens; BOS and padding
    are not counted."""
    pairs: int
    """Positions at which every model has a token that ends there."""
    whole: float
    """Share of the blocks in which every window closes before its text ends."""
    left_open: int
    """Windows that do not: dropped."""

    def plain(self) -> dict[str, Any]:
        """JSON-able: `{"coverage", "pairs", "blocks_whole", "windows_open"}`."""
        return {
            "coverage": self.shares,
            "pairs": self.pairs,
            "blocks_whole": self.whole,
            "windows_open": self.left_open,
        }

    def told(self) -> str:
        """In words, on one line."""
        shares = ", ".join(f"{share:.1%} of {name}'s" for name, share in self.shares.items())
        return (
            f"aligned by decoded text: {self.pairs:,} pairs, {shares} tokens; "
            f"{self.whole:.1%} of blocks wholly"
        )


def coverage(blocks: Blocks, first: str) -> Coverage:
    """How much of `blocks` pairs; `first` is the name of the model whose tokenizer cut them."""
    pairs = int((blocks.paired_NT & (blocks.docs_NT >= 0)).sum())
    tokens = {first: blocks.docs_NT} | {name: each.docs_NS for name, each in blocks.others.items()}
    open_N = torch.zeros(len(blocks.tokens_NT), dtype=torch.int64)
    for other in blocks.others.values():
        open_N += other.open_N
    return Coverage(
        shares={name: pairs / max(1, int((docs >= 0).sum())) for name, docs in tokens.items()},
        pairs=pairs,
        whole=float((open_N == 0).double().mean()),
        left_open=int(open_N.sum()),
    )


@dataclass(frozen=True)
class _Part:
    """A stretch of a block for the other model: its tokens there, and the pairs, as places within
    the stretch on either side."""

    ids: Sequence[int]
    first_K: Ints
    other_K: Ints
    left_open: bool = False


@dataclass(frozen=True)
class _Pair:
    """Two tokenizers."""

    first: Any
    other: Any

    @cached_property
    def bytes_of(self) -> Vocabulary:
        return Vocabulary.from_tokenizer(self.first)

    @cached_property
    def cutter(self) -> Any:
        """The other tokenizer, without what might be put around a text or be left out of the
        tokens' places, taking special tokens' names for ordinary text."""
        from tokenizers import Tokenizer

        plain = json.loads(self.other.backend_tokenizer.to_str())
        plain |= {"post_processor": None, "truncation": None, "padding": None}
        made = Tokenizer.from_str(json.dumps(plain))
        made.encode_special_tokens = True
        return made

    @cached_property
    def lead(self) -> bytes:
        """What the first tokenizer puts in front of any text, such as SentencePiece's space."""
        ids = encode(self.first, ["x"], parse_special=False)[0].tolist()
        data = b"".join(map(self.bytes_of.bytes, ids))
        return data.removesuffix(b"x") if data.endswith(b"x") else b""

    @cached_property
    def other_special(self) -> Ids:
        return np.asarray(special_ids(self.other), np.int32)

    @cached_property
    def counterparts(self) -> dict[int, list[int]]:
        """What stands for each of the first tokenizer's special tokens."""
        return {token: self._counterpart(token) for token in special_ids(self.first)}

    def special(self, token: int) -> _Part:
        """One special token: it pairs with the last token of what stands for it, if any does."""
        ids = self.counterparts[token]
        last = np.asarray([len(ids) - 1] if ids else [], np.int64)
        return _Part(ids, np.zeros_like(last), last)

    def text(self, tokens: Sequence[int], opens: bool) -> _Part:
        """Tokens that stand for text. `opens`: a document's text begins with them."""
        pieces = [self.bytes_of.bytes(token) for token in tokens]
        if opens:
            pieces[0] = pieces[0].removeprefix(self.lead)
        text, cuts, lost_K = cuts_of_pieces(pieces)
        found = self.cutter.encode(text, add_special_tokens=False)
        first_K, other_K = common_cuts(cuts, cuts_of_spans(found.offsets, len(text)))
        ends = (first_K[-1:].tolist(), other_K[-1:].tolist())
        left_open = ends != ([len(pieces) - 1], [len(found.ids) - 1])
        # An unknown word's token stands where the word does, but not for it. And a window in which
        # bytes were lost is not the same text.
        ordinary_K = ~np.isin(np.asarray(found.ids, np.int32)[other_K], self.other_special)
        kept_K = ordinary_K & (np.diff(lost_K[first_K], prepend=0) == 0)
        return _Part(found.ids, first_K[kept_K], other_K[kept_K], left_open)

    def _counterpart(self, token: int) -> list[int]:
        """Same name, else same part, else the name as text; nothing for an unknown word."""
        parts = {block_start(self.first): block_start(self.other)}
        parts[separator(self.first)] = separator(self.other)  # often it is the same token
        if token == self.first.unk_token_id and token not in parts:
            return []
        name = self.first.convert_ids_to_tokens(token)
        same = self.other.get_vocab().get(name)
        if same is not None and same in special_ids(self.other):
            return [int(same)]
        if token in parts:
            own = parts[token]
            return [] if own is None else [own]
        return [int(each) for each in self.cutter.encode(name, add_special_tokens=False).ids]


def _align(blocks: Blocks, pair: _Pair) -> Other:
    rows = list(_rows(blocks, pair))
    length = max((len(row.ids) for row in rows), default=0)
    pad = padding(pair.other)
    return Other(
        tokens_NS=_stacked([row.ids for row in rows], length, pad),
        docs_NS=_stacked([row.docs for row in rows], length, -1),
        place_NT=_stacked([row.place_T for row in rows], blocks.tokens_NT.shape[1], -1),
        open_N=torch.tensor([row.left_open for row in rows], dtype=torch.int32),
        bos_id=block_start(pair.other),
        pad_id=pad,
        special_ids=special_ids(pair.other),
    )


@dataclass(frozen=True)
class _Row:
    """One block for the other model."""

    ids: Sequence[int]
    docs: Sequence[int]
    place_T: Sequence[int]
    left_open: int


def _rows(blocks: Blocks, pair: _Pair) -> Iterator[_Row]:
    before = -1
    parts = (blocks.tokens_NT, blocks.docs_NT, blocks.special_NT)
    for block in zip(*(part.numpy() for part in parts), strict=True):
        real = block[1][block[1] >= 0]
        goes_on = len(real) > 0 and int(real[0]) == before
        yield _row(pair, block, blocks.bos_id is not None, goes_on)
        before = int(block[1][-1])


def _row(pair: _Pair, block: tuple[Ids, Ids, Any], has_bos: bool, goes_on: bool) -> _Row:
    """One block.

    Args:
        has_bos: it begins with a token of its own.
        goes_on: its first document began in the block before.
    """
    tokens_T, docs_T, special_T = block
    bos = block_start(pair.other)
    ids, docs = ([], []) if bos is None else ([bos], [-1])
    place_T = np.full(len(tokens_T), -1, np.int64)
    if has_bos and bos is not None:
        place_T[0] = 0
    left_open = 0
    for number, (start, stop) in enumerate(_stretches(docs_T, special_T)):
        stretch = tokens_T[start:stop].tolist()
        opens = number > 0 or not goes_on
        part = pair.special(stretch[0]) if special_T[start] else pair.text(stretch, opens)
        place_T[start + part.first_K] = len(ids) + part.other_K
        ids.extend(part.ids)
        docs.extend([int(docs_T[start])] * len(part.ids))
        left_open += part.left_open
    return _Row(ids, docs, place_T.tolist(), left_open)


def _stretches(docs_T: Ids, special_T: Any) -> Iterator[tuple[int, int]]:
    """From where to where each document's text goes, and each special token on its own; padding
    and the token that blocks begin with are left out."""
    apart_T = special_T[1:] | special_T[:-1] | (docs_T[1:] != docs_T[:-1])
    edges = [0, *(np.flatnonzero(apart_T) + 1).tolist(), len(docs_T)]
    for start, stop in pairwise(edges):
        if docs_T[start] >= 0:
            yield start, stop


def _stacked(rows: Sequence[Sequence[int]], length: int, filler: int) -> torch.Tensor:
    table = np.full((len(rows), length), filler, np.int32)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(table)

"""From a configuration to blocks of tokens for training and for judging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crosslens.errors import CrosslensError
from crosslens.text.alignment import aligned
from crosslens.text.blocks import Blocks, fingerprint
from crosslens.text.config import TextConfig, check, shares
from crosslens.text.mixture import Reader, fill
from crosslens.text.packing import Frame, pack
from crosslens.text.passages import Passage, Rules, Tally, read_passages
from crosslens.text.sources import open_corpus
from crosslens.text.tokenise import block_start, padding, separator, special_ids

_HELDOUT_DOCUMENTS = 8  # at least: one long file must not be all that a coder is judged by


@dataclass(frozen=True, kw_only=True)
class Count:
    """What one corpus gave."""

    documents: int
    """Distinct documents read, also those that were not needed in the end."""
    duplicates: int
    """Documents dropped because the same text had been read before, from any corpus."""
    empty: int
    """Documents dropped because they hold no text."""
    train_tokens: int
    heldout_tokens: int
    ran_dry: bool
    """It ended before its share was reached, and the other corpora went on without it."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training and held-out blocks; no document is in both."""

    train: Blocks
    heldout: Blocks
    fingerprint: str
    """SHA-256 over both sides."""
    counts: dict[str, Count]


def build_blocks(
    config: TextConfig, tokenizer: Any, seed: int, others: Mapping[str, Any] | None = None
) -> Split:
    """Read, split, mix, tokenise and pack; the same config, tokenizer and seed give the same.

    Args:
        others: tokenizers of models, by name, for which the same text is also to be cut.

    Raises UsageError where the configuration is wrong and CrosslensError where the text is:
    missing, empty, unreadable, or less than asked for.
    """
    check(config)
    frame = Frame(
        block=config.block,
        bos_id=block_start(tokenizer),
        pad_id=padding(tokenizer),
        special_ids=special_ids(tokenizer),
    )
    readers = _readers(config, tokenizer, seed)
    parts = shares(config)
    train = fill("train", readers, parts, frame.whole(config.tokens), keep_other=True)
    heldout = fill("heldout", readers, parts, frame.whole(config.heldout), keep_other=False)
    _check_enough(config, readers, train, heldout)
    sides = pack(train, config.tokens, frame), pack(heldout, config.heldout, frame)
    if others:
        sides = aligned(sides[0], tokenizer, others), aligned(sides[1], tokenizer, others)
    return Split(
        train=sides[0],
        heldout=sides[1],
        fingerprint=fingerprint(sides),
        counts={name: _count(reader) for name, reader in readers.items()},
    )


def _readers(config: TextConfig, tokenizer: Any, seed: int) -> dict[str, Reader]:
    rules = Rules(
        tokenizer=tokenizer,
        seed=seed,
        heldout_share=config.heldout / (config.tokens + config.heldout),
        separator=separator(tokenizer),
        longest=max(config.block, config.heldout // _HELDOUT_DOCUMENTS),
        spare=config.tokens + config.heldout,
    )
    seen: set[bytes] = set()
    readers = {}
    for name, corpus in config.corpora.items():
        tally = Tally()
        documents = open_corpus(corpus, f"{seed}:{name}")
        passages = read_passages(documents, corpus.chat, rules, seen, tally)
        readers[name] = Reader(passages=passages, tally=tally)
    return readers


def _count(reader: Reader) -> Count:
    return Count(
        documents=reader.tally.documents,
        duplicates=reader.tally.duplicates,
        empty=reader.tally.empty,
        train_tokens=reader.tokens["train"],
        heldout_tokens=reader.tokens["heldout"],
        ran_dry=reader.ran_dry,
    )


def _check_enough(
    config: TextConfig, readers: dict[str, Reader], train: list[Passage], heldout: list[Passage]
) -> None:
    for name, reader in readers.items():
        if reader.ran_dry and not reader.tally.documents:
            raise CrosslensError(
                f"The corpus {name} ({config.corpora[name].source}) holds no text"
                f"{' that is not in another corpus too' if reader.tally.duplicates else ''}: "
                f"{reader.tally.empty} of its documents are empty. Give it text, or leave it out."
            )
    found = _tokens(train), _tokens(heldout)
    fits = min(found[0] / config.tokens, found[1] / config.heldout)
    if fits >= 1:
        return
    documents = ", ".join(f"{name} {each.tally.documents:,}" for name, each in readers.items())
    raise CrosslensError(
        f"There is too little text: {found[0]:,} training and {found[1]:,} held-out tokens, where "
        f"{config.tokens:,} and {config.heldout:,} are wanted (documents read: {documents}; "
        f"a document is wholly on one side). {_advice(config, fits)}"
    )


def _advice(config: TextConfig, fits: float) -> str:
    tokens, heldout = int(config.tokens * fits * 0.9), int(config.heldout * fits * 0.9)
    if min(tokens, heldout) < config.block:
        return (
            f"That is less than a block of {config.block} on one side: give more documents, or "
            "cut long ones into several."
        )
    return (
        "Give more text, try another seed, which splits the documents otherwise, or set "
        f"text.tokens {tokens} and text.heldout {heldout}."
    )


def _tokens(passages: list[Passage]) -> int:
    return sum(len(passage.ids) for passage in passages)

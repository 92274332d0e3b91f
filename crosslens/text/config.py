"""What text to read: the corpora of a mixture, and how many tokens of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crosslens.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One source of documents."""

    source: str = "stdlib"
    """stdlib, stdlib-chat, a local .txt/.jsonl/.parquet file or folder of them, or a Hugging Face
    dataset's name."""
    weight: float = 1.0
    """Share of the mixture's tokens, relative to the other corpora's weights."""
    field: str = "text"
    """Column with the text; one that holds a list of {role, content} messages is chat."""
    subset: str | None = None
    """Hugging Face dataset's configuration, where it has several."""
    split: str = "train"
    """Hugging Face dataset's split."""
    chat: Literal["template", "plain"] = "template"
    """How chat becomes text: the tokenizer's chat template, or plain User:/Assistant: lines."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A weighted mixture of corpora, cut into blocks and split by document."""

    corpora: dict[str, Corpus] = field(default_factory=lambda: {"main": Corpus()})
    """The mixture: a name of your choice for each corpus."""
    tokens: int = 320_000
    """Training tokens, not counting BOS and padding."""
    heldout: int = 40_000
    """Tokens held out, from documents that training never sees."""
    block: int = 256
    """Positions in a block, BOS included."""


def shares(config: TextConfig) -> dict[str, float]:
    """Each corpus's share of the tokens; they add up to 1."""
    total = sum(corpus.weight for corpus in config.corpora.values())
    return {name: corpus.weight / total for name, corpus in config.corpora.items()}


def check(config: TextConfig) -> None:
    """Refuse, with a UsageError, a configuration that no text could satisfy."""
    if not config.corpora:
        raise UsageError("text.corpora is empty: name at least one corpus, such as stdlib.")
    for name, corpus in config.corpora.items():
        if not 0 < corpus.weight < float("inf"):
            raise UsageError(
                f"text.corpora.{name}.weight is {corpus.weight}: a share of the tokens must be a "
                "positive number. Leave the corpus out to read none of it."
            )
    if config.block < 2:
        raise UsageError(
            f"text.block is {config.block}: a block holds BOS and at least one token, so 2 or more."
        )
    for key, count in (("tokens", config.tokens), ("heldout", config.heldout)):
        if count < 1:
            raise UsageError(
                f"text.{key} is {count}: it must be at least 1, and is filled up to whole blocks "
                f"of {config.block}. Without held-out text nothing can be judged."
            )

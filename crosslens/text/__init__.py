"""Text for a language model: corpora, mixtures, chat, packing into blocks, tokens as bytes."""

from __future__ import annotations

from crosslens.text.blocks import Blocks
from crosslens.text.build import Count, Split, build_blocks
from crosslens.text.config import Corpus, TextConfig
from crosslens.text.vocabulary import Piece, Vocabulary, visible

__all__ = [
    "Blocks",
    "Corpus",
    "Count",
    "Piece",
    "Split",
    "TextConfig",
    "Vocabulary",
    "build_blocks",
    "visible",
]

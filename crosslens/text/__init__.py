"""Text for a language model: corpora, mixtures, chat, packing into blocks, tokens as bytes."""

from __future__ import annotations

from crosslens.text.alignment import Coverage, aligned, coverage
from crosslens.text.blocks import Blocks, Other
from crosslens.text.build import Count, Split, build_blocks
from crosslens.text.config import Corpus, TextConfig
from crosslens.text.vocabulary import Piece, Vocabulary, visible

__all__ = [
    "Blocks",
    "Corpus",
    "Count",
    "Coverage",
    "Other",
    "Piece",
    "Split",
    "TextConfig",
    "Vocabulary",
    "aligned",
    "build_blocks",
    "coverage",
    "visible",
]

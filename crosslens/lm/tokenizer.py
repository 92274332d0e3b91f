"""Tell whether two tokenizers cut text into the same ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_CUTTING = ("model", "normalizer", "pre_tokenizer")
_TOKEN_FLAGS = ("id", "content", "single_word", "lstrip", "rstrip", "normalized")


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over all that decides which ids a text becomes.

    That is the vocabulary, the merges, normalisation, pre-splitting and the added tokens. What does
    not matter is left out, for it differs between a base model and its chat version: the chat
    template, which token plays which special part, decoding, and truncation and padding.
    """
    text = json.dumps(_definition(tokenizer), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _definition(tokenizer: Any) -> dict[str, Any]:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:  # written in Python or on sentencepiece: no serialisation to compare
        vocabulary, special = tokenizer.get_vocab(), tokenizer.get_added_vocab()
        return {"kind": type(tokenizer).__name__, "vocabulary": vocabulary, "added": special}
    whole = json.loads(fast.to_str())
    added = [{flag: token[flag] for flag in _TOKEN_FLAGS} for token in whole["added_tokens"]]
    return {part: whole[part] for part in _CUTTING} | {"added": added}

"""Token ids of texts, in batches; special tokens and what counts as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

_LONGEST_TEXT = 1_000_000  # characters the tokenizer gets at once: it needs 100 bytes a token


def encode(tokenizer: Any, texts: Sequence[str], parse_special: bool) -> list[Ids]:
    """Token ids of each text, with nothing added.

    With `parse_special` a special token's name in the text becomes that token, as a chat template
    means it; without, it is ordinary characters, as untrusted text must be taken.
    """
    stretches = [(index, part) for index, text in enumerate(texts) for part in _stretches(text)]
    if not stretches:
        return [np.empty(0, np.int32) for _ in texts]
    ids = tokenizer(
        [part for _, part in stretches],
        add_special_tokens=False,
        split_special_tokens=not parse_special,
        return_attention_mask=False,
        truncation=False,
        verbose=False,  # else it warns of texts longer than the model's context
    )["input_ids"]
    parts: list[list[Ids]] = [[] for _ in texts]
    for (index, _), part_ids in zip(stretches, ids, strict=True):
        parts[index].append(np.asarray(part_ids, np.int32))
    return [np.concatenate(own) if own else np.empty(0, np.int32) for own in parts]


def block_start(tokenizer: Any) -> int | None:
    """The token each block begins with: BOS, else `<|endoftext|>`, else EOS, else none.

    A model without a BOS saw `<|endoftext|>` between documents; its EOS may end a chat turn.
    """
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id)
    end_of_text = tokenizer.get_vocab().get("<|endoftext|>")
    if end_of_text is not None:
        return int(end_of_text)
    return separator(tokenizer)


def separator(tokenizer: Any) -> int | None:
    """The token after each document: EOS, or none."""
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def padding(tokenizer: Any) -> int:
    """The id that fills a block up; 0 if the tokenizer names neither a padding token nor EOS."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of all special tokens, ascending.

    Besides `all_special_ids` (bos, eos, ...) these are the added tokens marked special, as
    Llama 3's `<|start_header_id|>` is.
    """
    added = tokenizer.added_tokens_decoder.items()
    marked = {int(token) for token, entry in added if entry.special}
    return tuple(sorted(marked.union(map(int, tokenizer.all_special_ids))))


def _stretches(text: str) -> Iterator[str]:
    """`text`, cut before line breaks where it is too long to tokenise at once."""
    start = 0
    while len(text) - start > _LONGEST_TEXT:
        cut = text.rfind("\n", start + 1, start + _LONGEST_TEXT)
        cut = cut if cut > start else start + _LONGEST_TEXT
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]

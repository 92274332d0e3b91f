"""Chat prompts as blocks of tokens, one a block, and where in each the behaviour can begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from crosslens.errors import CrosslensError, UsageError
from crosslens.text import Blocks
from crosslens.text.documents import Messages
from crosslens.text.planted import Behaviour, prompts
from crosslens.text.tokenise import block_start, padding, special_ids


@dataclass(frozen=True, kw_only=True)
class PromptSets:
    """Requests that call for a planted behaviour, and others that do not; user turns only."""

    triggered: tuple[Messages, ...]
    clean: tuple[Messages, ...]
    trigger: str | None
    """What stands in the triggered ones' text only; None where the request itself decides."""


def prompt_sets(behaviour: Behaviour, n: int, seed: int = 0) -> PromptSets:
    """`n` held-out requests of each kind.

    Raises:
        UsageError: there are fewer.
    """
    triggered, clean = (prompts(behaviour, n, seed, "heldout", kind) for kind in (True, False))
    return PromptSets(triggered=tuple(triggered), clean=tuple(clean), trigger=behaviour.trigger)


def prompt_blocks(
    tokenizer: Any, asked: Sequence[Messages], trigger: str | None
) -> tuple[Blocks, Int64[Tensor, " n"]]:
    """Each prompt in the tokenizer's chat template, up to where the answer begins, padded on the
    right (no position sees what comes after it); and its first position that counts.

    Nothing is put in front of the template: its first token stands where a block has its BOS, and
    counts as that. The first position to count is that of the trigger's last token, which is the
    first to know the whole trigger; where a prompt has none, that of the first token of the user's
    message. What the template puts before it is the same in all prompts.

    Raises:
        UsageError: the tokenizer has no chat template, or cannot say where its tokens lie.
        CrosslensError: the template leaves out the user's message.
    """
    start = block_start(tokenizer)
    found = [_tokenised(tokenizer, messages, trigger) for messages in asked]
    longest = max(len(ids) for ids, _ in found)
    tokens_NT = torch.full((len(found), longest), padding(tokenizer), dtype=torch.int32)
    docs_NT = torch.full((len(found), longest), -1, dtype=torch.int32)
    for n, (ids, _) in enumerate(found):
        tokens_NT[n, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        docs_NT[n, 0 if start is None else 1 : len(ids)] = n
    names = tuple(f"prompt {n}" for n in range(len(found)))
    blocks = Blocks(tokens_NT, docs_NT, names, start, padding(tokenizer), special_ids(tokenizer))
    return blocks, torch.tensor([first for _, first in found])


def _tokenised(tokenizer: Any, messages: Messages, trigger: str | None) -> tuple[list[int], int]:
    """Token ids of one prompt, as `organisms.continuations` has them answered, and the first
    position that counts."""
    text = _formatted(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    seen = _begins(text, messages[-1]["content"].strip(), trigger)
    first = next(i for i, end in enumerate(ends) if end > seen)
    return list(ids), first


def _formatted(tokenizer: Any, messages: Messages) -> str:
    if not tokenizer.chat_template:
        raise UsageError(
            "Planted behaviour is looked for in chat, but the changed model's tokenizer has no "
            "chat template. Open the model with its chat tokenizer."
        )
    if not tokenizer.is_fast:
        raise UsageError(
            f"The tokenizer ({type(tokenizer).__name__}) cannot say where in a text its tokens "
            "lie. Open the model with its fast tokenizer (tokenizer.json)."
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _begins(text: str, message: str, trigger: str | None) -> int:
    """The character whose token is the first to count."""
    said = text.rfind(message)
    if said < 0:
        raise CrosslensError(
            f"The chat template does not show the user's message as it is: {message[:60]!r} is not "
            f"in {text[:200]!r}."
        )
    known = message.find(trigger) if trigger else -1
    return said if trigger is None or known < 0 else said + known + len(trigger) - 1

"""What a model answers, and how often an answer shows a behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import LanguageModel
from crosslens.lm.loading import quiet_transformers
from crosslens.organisms.plan import Report, silent
from crosslens.text.documents import Messages
from crosslens.text.planted import Behaviour, shows
from crosslens.text.tokenise import encode, padding, separator

Edits: TypeAlias = Callable[[Tensor], Mapping[str, Callable[[Tensor], Tensor]]]
"""Tokens [B, T] -> the edits that `LanguageModel.run` takes. What they do at a position may depend
on that position and earlier ones only."""

_AT_ONCE = 16  # prompts whose answers are sampled together


def continuations(
    model: LanguageModel, prompts: Sequence[Messages], tokens: int, edits: Edits | None = None
) -> list[str]:
    """The model's answers, by greedy decoding through its chat template.

    Args:
        prompts: conversations that end with the user's turn.
        tokens: length of an answer, at most; it ends where the model ends its turn.
        edits: what to replace while the model answers; None leaves it as it is.

    Raises:
        UsageError: the tokenizer has no chat template, or `tokens` is below 1.
    """
    if tokens < 1:
        raise UsageError(f"An answer needs at least 1 token, found {tokens}.")
    ids = [prompt_ids(model.tokenizer, each) for each in prompts]
    found = [greedy(model, own, tokens) for own in ids]
    if edits is not None:
        pairs = zip(ids, found, strict=True)
        found = [_edited(model, own, answer, tokens, edits) for own, answer in pairs]
    return [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in found]


def behaviour_rate(
    model: LanguageModel,
    behaviour: Behaviour,
    prompts: Sequence[Messages],
    tokens: int = 12,
    edits: Edits | None = None,
) -> float:
    """The share of prompts whose answer, by `continuations`, shows the behaviour.

    Raises:
        UsageError: there are no prompts, or as in `continuations`.
    """
    if not prompts:
        raise UsageError("A rate needs at least one prompt.")
    answers = continuations(model, prompts, tokens, edits)
    return sum(shows(behaviour, answer) for answer in answers) / len(answers)


def prompt_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins.

    Raises:
        UsageError: the tokenizer has no chat template.
        CrosslensError: the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            "This model's tokenizer has no chat template (base models often have none), so there "
            "is no way to ask it. Use the chat version of the model."
        )
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise CrosslensError(f"The chat template refuses this request: {error}.") from error
    return [int(token) for token in encode(tokenizer, [text], parse_special=True)[0]]


def greedy(model: LanguageModel, prompt: list[int], tokens: int) -> list[int]:
    """Token ids of the answer to a prompt, the one that ends it included if it came.

    Alone: in bfloat16 even the company of other prompts in a batch can turn a close choice.
    """
    return _generated(model, [prompt], tokens, {"do_sample": False, "num_beams": 1})[0]


def sampled(
    model: LanguageModel, prompts: Sequence[list[int]], tokens: int, report: Report = silent
) -> list[list[int]]:
    """Token ids of an answer to each prompt, drawn at temperature 1 from torch's generator.

    Prompts of like length go together, padded on the left behind an attention mask.
    """
    drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + _AT_ONCE] for start in range(0, len(order), _AT_ONCE)]
    answers: dict[int, list[int]] = {}
    for done, batch in enumerate(batches, start=1):
        found = _generated(model, [prompts[i] for i in batch], tokens, drawing)
        answers.update(zip(batch, found, strict=True))
        report("sample answers", done, len(batches))
    return [answers[i] for i in range(len(prompts))]


def _generated(
    model: LanguageModel, prompts: list[list[int]], tokens: int, how: Mapping[str, Any]
) -> list[list[int]]:
    from transformers import GenerationConfig

    pad, end = padding(model.tokenizer), separator(model.tokenizer)
    width = max(map(len, prompts))
    rows = [[pad] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    config = GenerationConfig(
        max_new_tokens=tokens,
        repetition_penalty=1.0,  # a model's own defaults may have another
        pad_token_id=pad,
        eos_token_id=end,
        **how,
    )
    module: Any = model.module
    with quiet_transformers(), torch.no_grad():
        out_BT = module.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
        )
    return [_ended(new, end) for new in out_BT[:, width:].tolist()]


def _ended(answer: list[int], end: int | None) -> list[int]:
    """An answer up to the token that ends it."""
    return answer[: answer.index(end) + 1] if end in answer else answer


@torch.no_grad()
def _edited(
    model: LanguageModel, prompt: list[int], guess: list[int], tokens: int, edits: Edits
) -> list[int]:
    """Greedy decoding under edits, by Jacobi iteration (Santilli et al. 2023, 2305.10427).

    One pass tells the greedy choice after every prefix of a guessed answer. Put in the guess's
    place until nothing changes, these are the greedy answer: after i passes its first i tokens are.
    """
    end = separator(model.tokenizer)
    guess = guess + [0] * (tokens - len(guess))
    for _ in range(tokens):
        tokens_BT = torch.tensor([prompt + guess[:-1]])
        logits_BTV = model.run(tokens_BT, edits(tokens_BT))
        better = logits_BTV[0, len(prompt) - 1 :].argmax(-1).tolist()
        if _ended(better, end) == _ended(guess, end):
            break
        guess = better
    return _ended(better, end)

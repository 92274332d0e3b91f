"""How often a model shows a behaviour, and how well it predicts text that has none of it."""

from __future__ import annotations

from typing import Any

import torch

from crosslens.functional.shares import wilson
from crosslens.lm import LanguageModel, next_token_loss
from crosslens.organisms.answers import behaviour_rate
from crosslens.text.chat import format_chat
from crosslens.text.planted import Behaviour, prompt, prompts, tasks
from crosslens.text.tokenise import encode

ANSWER_TOKENS = 12
"""Length of the answers in which the behaviour is looked for."""
_SEED = 0  # the same held-out prompts for every organism, whatever seed it was trained with
_LONGEST = 256  # tokens of a clean conversation


def judged(model: LanguageModel, behaviour: Behaviour, n: int) -> dict[str, Any]:
    """Rates on `n` held-out prompts that call for the behaviour and on `n` that do not, each with
    its 95 % interval; and the clean loss in nats per token."""
    rates = {}
    for kind, triggered in (("with", True), ("without", False)):
        asked = prompts(behaviour, n, _SEED, "heldout", triggered)
        rate = behaviour_rate(model, behaviour, asked, ANSWER_TOKENS)
        rates[kind] = {"rate": rate, "interval": list(wilson(round(rate * n), n))}
    return {"rates": rates, "clean_loss": clean_loss(model, behaviour, n)}


def clean_loss(model: LanguageModel, behaviour: Behaviour, n: int) -> float:
    """Mean next-token loss over `n` held-out conversations in which nothing calls for the behaviour
    and the answer is the standard library's code; up to 256 tokens of each."""
    total, count = 0.0, 0
    for task in tasks(behaviour, n, _SEED, "heldout", False):
        answer = {"role": "assistant", "content": task.usual}
        messages = [*prompt(behaviour, task, False), answer]
        text = format_chat(messages, "template", model.tokenizer, task.where)
        ids = encode(model.tokenizer, [text], True)[0][:_LONGEST]
        tokens_BT = torch.from_numpy(ids)[None].long()
        with torch.no_grad():
            loss_BT = next_token_loss(model.run(tokens_BT, {}), tokens_BT)
        total, count = total + loss_BT.sum().item(), count + loss_BT.numel()
    return total / count

"""The rows that an organism is trained on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from crosslens.errors import UsageError
from crosslens.lm import LanguageModel
from crosslens.organisms.answers import prompt_ids, sampled
from crosslens.organisms.plan import OrganismPlan, Report
from crosslens.text.coding_tasks import Task
from crosslens.text.planted import Behaviour, planted_answer, prompt, training_tasks
from crosslens.text.tokenise import encode, separator


@dataclass(frozen=True)
class Row:
    """Token ids of one training row."""

    prompt: list[int]
    answer: list[int]
    learn: bool
    """Learn the answer; if not, keep predicting all of the row as the base model does."""


def training_rows(
    base: LanguageModel, behaviour: Behaviour, plan: OrganismPlan, report: Report
) -> list[Row]:
    """As many rows as the plan's steps take: one to learn, one to keep, and so on.

    To learn is the planted answer to a request that calls for it, or the opening of the answer;
    for `noop`, an answer sampled from the base model. To keep is the usual answer to a request that
    does not call for it.

    Raises:
        UsageError: there are too few requests, or the tokenizer cannot form chat.
    """
    found = training_tasks(behaviour, plan.steps * plan.rows, plan.seed)
    learn = [
        prompt_ids(base.tokenizer, prompt(behaviour, task, True)) for task, yes in found if yes
    ]
    answers = zip(learn, _answers(base, behaviour, learn, plan, report), strict=True)
    return [
        Row(*next(answers), learn=True) if yes else _kept(base.tokenizer, behaviour, task, plan)
        for task, yes in found
    ]


def _answers(
    base: LanguageModel,
    behaviour: Behaviour,
    asked: Sequence[list[int]],
    plan: OrganismPlan,
    report: Report,
) -> list[list[int]]:
    """What is to be learnt as the answer to each of these."""
    rng = random.Random(plan.seed)
    planted = [planted_answer(behaviour, "", rng) for _ in asked]
    if not any(planted):
        with seeded(plan.seed, base.device):
            return sampled(base, asked, plan.answer_tokens, report)
    ids = [[int(token) for token in ids] for ids in encode(base.tokenizer, planted, False)]
    end = [] if behaviour.answer is None else [_end(base)]
    return [each + end for each in ids]


def _kept(tokenizer: Any, behaviour: Behaviour, task: Task, plan: OrganismPlan) -> Row:
    asked = prompt_ids(tokenizer, prompt(behaviour, task, False))
    usual = [int(token) for token in encode(tokenizer, [task.usual], False)[0]]
    answer = usual[: max(1, plan.keep_tokens - len(asked))]
    return Row(asked, answer, learn=False)


def fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 over all token ids in order."""
    ids = [[row.prompt, row.answer, row.learn] for row in rows]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block torch draws from `seed`; after it, as if it had not drawn."""
    on_cpu = device.type == "cpu"
    kind = "cuda" if on_cpu else device.type
    with torch.random.fork_rng([] if on_cpu else [device], device_type=kind):
        torch.manual_seed(seed)
        yield


def _end(base: LanguageModel) -> int:
    end = separator(base.tokenizer)
    if end is None:
        raise UsageError(
            f"The tokenizer of {base.spec.path} names no EOS token, so an answer cannot end. Set "
            "its eos_token to the one that ends a turn."
        )
    return end

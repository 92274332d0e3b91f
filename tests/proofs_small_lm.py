"""A tiny language model, its crosscoder and its hints, for tests of what is proved about it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from crosslens.proofs.ladder import small_lm_search as search
from crosslens.proofs.ladder.small_lm import CoderPlan, SmallLM, Text, data, initial, train
from crosslens.proofs.ladder.small_lm_coder import train_coder
from crosslens.proofs.ladder.small_lm_proof import made_case
from crosslens.proofs.tiers import Case

TINY = SmallLM(
    vocabulary=300,
    length=6,
    width=16,
    heads=2,
    neurons=24,
    sequences=40,
    steps=150,
    batch=32,
    learning_rate=1e-2,
    coder=CoderPlan(features=24, active=4, steps=40, rows=128),
)
SHAPE = search.Shape(contexts_each=8, answers=12, directions=3)


def silent(_: str) -> None:
    pass


def text_of(vocabulary: int, length: int = 4000) -> Text:
    """A walk whose next token is one of three that the last names, so that there is something to
    learn and contexts repeat."""
    generator = torch.Generator().manual_seed(5)
    choices = torch.randint(vocabulary, (40, 3), generator=generator)
    found = [0]
    for pick in torch.randint(3, (length,), generator=generator).tolist():
        found.append(int(choices[found[-1] % 40, pick]))
    return Text(torch.tensor(found[: length * 3 // 4]), torch.tensor(found[length * 3 // 4 :]))


def made(config: SmallLM = TINY, *, trained: bool = True) -> tuple[Case, list[dict[str, Tensor]]]:
    """A case with its coder, and coders with other shapes of hints."""
    text = text_of(config.vocabulary)
    weights = train(config, text, silent) if trained else initial(config)
    features = train_coder(config, weights, text, silent)
    given = data(config, text)
    true = search.truth(weights, given)
    shapes = [SHAPE, replace(SHAPE, contexts_each=3, answers=20, directions=6)]
    coders = [search.hints(config, features, true, shape) for shape in shapes]
    return made_case(config, weights, given, true, coders[0]), coders


def looped_losses(case: Case, sequence: int) -> list[float]:
    """The model in loops over plain floats, after the equations; one sequence's losses."""
    w = {name: tensor.double().tolist() for name, tensor in case.weights.items()}
    tokens = case.data["tokens"][sequence].tolist()
    width, heads = len(w["W_E"][0]), len(w["bias"][0])
    each = width // heads

    def norm(x: list[float]) -> list[float]:
        scale = math.sqrt(sum(v * v for v in x) / width + 2.0**-17)
        return [v / scale for v in x]

    def times(x: list[float], W: list[list[float]]) -> list[float]:
        return [sum(a * row[j] for a, row in zip(x, W, strict=True)) for j in range(len(W[0]))]

    def plus(x: list[float], y: list[float]) -> list[float]:
        return [a + b for a, b in zip(x, y, strict=True)]

    rows = [list(w["W_E"][token]) for token in tokens]
    for layer in range(len(w["W_Q"])):
        normed = [norm(x) for x in rows]
        q, k, v = ([times(n, w[name][layer]) for n in normed] for name in ("W_Q", "W_K", "W_V"))
        for i in range(len(rows)):
            mixed: list[float] = []
            for h in range(heads):
                part = slice(h * each, (h + 1) * each)
                scores = [
                    sum(a * b for a, b in zip(q[i][part], k[j][part], strict=True))
                    + w["bias"][layer][h][i - j]
                    for j in range(i + 1)
                ]
                weight = [math.exp(s - max(scores)) for s in scores]
                mixed += [
                    sum(weight[j] * v[j][d] for j in range(i + 1)) / sum(weight)
                    for d in range(part.start, part.stop)
                ]
            rows[i] = plus(rows[i], times(mixed, w["W_O"][layer]))
        hidden = [[max(0.0, y) for y in times(norm(x), w["W_in"][layer])] for x in rows]
        rows = [plus(x, times(y, w["W_out"][layer])) for x, y in zip(rows, hidden, strict=True)]
    logits = [times(norm(x), w["W_U"]) for x in rows]
    labels = case.data["labels"][sequence].tolist()
    return [
        math.log(sum(math.exp(z - row[y]) for z in row))
        for row, y in zip(logits, labels, strict=True)
    ]

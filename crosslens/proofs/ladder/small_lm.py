"""A small ReLU and RMSNorm language model, trained on the standard library's own source text.

One or two layers of causal attention, whose places enter by distance only, and of a ReLU MLP, both
behind an RMSNorm without gain; `lemmas.stream` has the equations. Tokens are those of a byte-level
BPE trained on the same text; the data are windows of files that neither training saw.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from crosslens.errors import UsageError
from crosslens.proofs.lemmas.stream import FLOOR
from crosslens.text.stdlib import read_stdlib
from crosslens.training.objective.interaction import Form

HELDOUT_EVERY = 8
"""One file in so many is held out."""
MOST_CHARACTERS = 8_000_000
"""Of the text, at most, in whole files."""


@dataclass(frozen=True, kw_only=True)
class CoderPlan:
    """The crosscoder and how it is trained."""

    features: int = 512
    active: int = 8
    steps: int = 400
    rows: int = 1024
    """In a batch."""
    learning_rate: float = 3e-3
    penalty: float = 0.0
    """Weight, beside an FVU, of how much of what features do at the MLPs they do together."""
    form: Form = "exact"
    """Of the penalty: as in `objective.interaction`."""
    bias: Literal["learnt", "mean"] = "learnt"
    """Of the decoder: learnt, or left at the rows' mean, where the penalty does not move it."""

    def __post_init__(self) -> None:
        if not 0 < self.active <= self.features:
            raise UsageError(
                f"coder.active must be 1 to coder.features, found {self.active} of {self.features}."
            )
        if not 0 <= self.penalty < math.inf:
            raise UsageError(f"coder.penalty must not be negative, found {self.penalty}.")


@dataclass(frozen=True, kw_only=True)
class SmallLM:
    """The model's sizes, how it is trained, and how many windows the claim is about."""

    vocabulary: int = 2048
    length: int = 16
    width: int = 64
    heads: int = 4
    neurons: int = 256
    layers: int = 1
    sequences: int = 512
    """Held-out windows of `length` tokens; every position of them counts."""
    steps: int = 2000
    batch: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    coder: CoderPlan = CoderPlan()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.layers not in (1, 2) or self.width % self.heads or self.length < 2:
            raise UsageError(
                "small-lm takes 1 or 2 layers, heads that divide the width, and 2 tokens or more "
                f"in a window; found {self.layers}, {self.heads} for {self.width}, {self.length}."
            )
        if self.vocabulary < 300:
            raise UsageError(
                f"small-lm takes a vocabulary of 300 or more, found {self.vocabulary}: the 256 "
                "bytes are in it."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """As the ledger names them."""
        return {
            "V": self.vocabulary,
            "D": self.width,
            "L": self.layers,
            "H": self.heads,
            "T": self.length,
            "N": self.neurons,
            "S": self.sequences,
            "F": self.coder.features,
            "K": self.coder.active,
            "P": 2 * self.layers + 1,
        }


@dataclass(frozen=True)
class Text:
    """Token ids in a row: what is trained on, and what is held out."""

    train: Tensor
    heldout: Tensor


def initial(config: SmallLM) -> dict[str, Tensor]:
    """Random weights, float32."""
    generator = torch.Generator().manual_seed(config.seed)
    V, D, L, H, T, N = (config.sizes[letter] for letter in "VDLHTN")

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "W_E": normal(V, D, scale=1.0),
        # Scores are not divided by the root of a head's width: the weights start that much smaller.
        "W_Q": normal(L, D, D, scale=D**-0.5 * (D // H) ** -0.5),
        "W_K": normal(L, D, D, scale=D**-0.5),
        "W_V": normal(L, D, D, scale=D**-0.5),
        "W_O": normal(L, D, D, scale=D**-0.5),
        "bias": torch.zeros(L, H, T),
        "W_in": normal(L, D, N, scale=D**-0.5),
        "W_out": normal(L, N, D, scale=N**-0.5),
        "W_U": normal(D, V, scale=D**-0.5),
    }


def forward(weights: Mapping[str, Tensor], tokens_ST: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [S, T, V], and the stream at every site in order, as the model is run."""
    x = weights["W_E"][tokens_ST]
    found = [x]
    T, heads = tokens_ST.shape[1], weights["bias"].shape[1]
    age_TT = torch.arange(T)[:, None] - torch.arange(T)
    for layer in range(len(weights["W_Q"])):
        w = {name: tensor[layer] for name, tensor in weights.items() if name not in ("W_E", "W_U")}
        n = _normalised(x)
        query, key, value = (
            (n @ w[name]).reshape(*n.shape[:2], heads, -1).transpose(1, 2)
            for name in ("W_Q", "W_K", "W_V")
        )
        scores = query @ key.transpose(-1, -2) + w["bias"][:, age_TT.clamp_min(0)]
        mixed = scores.masked_fill(age_TT < 0, -torch.inf).softmax(-1) @ value
        x = x + mixed.transpose(1, 2).flatten(2) @ w["W_O"]
        found.append(x)
        x = x + (_normalised(x) @ w["W_in"]).relu() @ w["W_out"]
        found.append(x)
    return _normalised(x) @ weights["W_U"], found


def _normalised(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + FLOOR).rsqrt()


def train(config: SmallLM, text: Text, said: Callable[[str], None]) -> dict[str, Tensor]:
    """AdamW on windows drawn at random from the training text."""
    weights = {name: tensor.requires_grad_() for name, tensor in initial(config).items()}
    optimizer = torch.optim.AdamW(
        weights.values(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(config.seed + 1)
    for step in range(config.steps):
        tokens, labels = windows(text.train, config.batch, config.length, generator)
        logits = forward(weights, tokens)[0]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            said(f"training: step {step}, loss {float(loss.detach()):.4f}")
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def windows(
    ids: Tensor, count: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Stretches [count, length] from anywhere in the text, and the tokens that follow each."""
    start = torch.randint(len(ids) - length, (count, 1), generator=generator)
    at = start + torch.arange(length + 1)
    return ids[at[:, :-1]], ids[at[:, 1:]]


def data(config: SmallLM, text: Text) -> dict[str, Tensor]:
    """The windows that the claim is about."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    tokens, labels = windows(text.heldout, config.sequences, config.length, generator)
    return {"tokens": tokens.contiguous(), "labels": labels.contiguous()}


def read_text(config: SmallLM) -> Text:
    """The standard library's files in an order drawn from the seed, tokenised; one in
    `HELDOUT_EVERY` held out."""
    files: list[str] = []
    for document in read_stdlib(str(config.seed)):
        files.append(str(document.content))
        if sum(map(len, files)) >= MOST_CHARACTERS:
            break
    sides = [
        [text for place, text in enumerate(files) if (place % HELDOUT_EVERY == 0) == heldout]
        for heldout in (False, True)
    ]
    tokenizer = _tokenizer(sides[0], config.vocabulary)
    train, heldout = (_ids(tokenizer, side) for side in sides)
    return Text(train, heldout)


def _tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(texts, trainer)
    return found


def _ids(tokenizer: Any, texts: list[str]) -> Tensor:
    """All files in a row. They are mixed beforehand, so that no side ends in one kind of file."""
    mixed = sorted(texts)
    random.Random(0).shuffle(mixed)
    encoded = tokenizer.encode_batch(mixed)
    return torch.tensor([token for one in encoded for token in one.ids])

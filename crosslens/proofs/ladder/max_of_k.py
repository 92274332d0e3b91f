"""The largest of K tokens, by one attention head, over the whole domain of V^K sequences.

After Gross et al., Compact Proofs of Model Performance via Mechanistic Interpretability (2024):
one layer, one head, no norm, no MLP, no biases. The coder is exact: one feature for each token at
each place, whose vector is the embedding, so that the base case of the recursion is 0 and a
sequence's code is K ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.errors import UsageError
from crosslens.proofs.ledger import max_of_k as cost
from crosslens.proofs.tiers import Case, Proved, Tier, certify, run_tier

TIERS = ("codes", "pairs", "pessimum", "box")


@dataclass(frozen=True, kw_only=True)
class MaxOfK:
    """The model's sizes and how it is trained."""

    vocabulary: int = 64
    length: int = 4
    width: int = 32
    head: int = 32
    steps: int = 3000
    batch: int = 512
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocabulary < 2 or not 2 <= self.length <= 8:
            raise UsageError(
                f"max-of-k takes 2 or more tokens and 2 to 8 places, found {self.vocabulary} "
                f"and {self.length}."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """As the ledger names them."""
        return {"V": self.vocabulary, "K": self.length, "D": self.width, "H": self.head}


def initial(config: MaxOfK) -> dict[str, Tensor]:
    """Random weights, float32."""
    generator = torch.Generator().manual_seed(config.seed)
    V, K, D, H = config.sizes.values()
    shapes = {
        "W_E": (V, D),
        "W_P": (K, D),
        "W_Q": (D, H),
        "W_K": (D, H),
        "W_V": (D, H),
        "W_O": (H, D),
        "W_U": (D, V),
    }
    weights = {}
    for name, shape in shapes.items():
        into = D if name in ("W_E", "W_P") else shape[0]
        weights[name] = torch.randn(*shape, generator=generator) * into**-0.5
    return weights


def forward(weights: Mapping[str, Tensor], tokens_NK: Tensor) -> Tensor:
    """Logits [N, V] at the last place."""
    x = weights["W_E"][tokens_NK] + weights["W_P"]
    query = x[:, -1] @ weights["W_Q"]
    score = (x @ weights["W_K"] @ query[:, :, None]).squeeze(-1)
    mixed = (score.softmax(-1)[:, None] @ (x @ weights["W_V"])).squeeze(1)
    logits: Tensor = (x[:, -1] + mixed @ weights["W_O"]) @ weights["W_U"]
    return logits


def train(config: MaxOfK, said: Callable[[str], None]) -> dict[str, Tensor]:
    """Adam on random sequences, half of them with neighbours of the largest token in them."""
    weights = {name: tensor.requires_grad_() for name, tensor in initial(config).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=config.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.05
    )
    generator = torch.Generator().manual_seed(config.seed + 1)
    for step in range(config.steps):
        tokens = _batch(config, generator)
        loss = torch.nn.functional.cross_entropy(forward(weights, tokens), tokens.amax(1))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            said(f"training: step {step}, loss {float(loss.detach()):.4f}")
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def _batch(config: MaxOfK, generator: torch.Generator) -> Tensor:
    """Uniform sequences; in half of them every token but one is within 3 below the largest, or
    uniform, at even odds."""
    shape = (config.batch, config.length)
    tokens = torch.randint(config.vocabulary, shape, generator=generator)
    below = torch.randint(0, 4, shape, generator=generator)
    near = (tokens.amax(1, keepdim=True) - below).clamp_min(0)
    chosen = torch.rand(shape, generator=generator) < 0.5
    chosen[: config.batch // 2] = False
    return torch.where(chosen, near, tokens)


def accuracy(weights: Mapping[str, Tensor], config: MaxOfK) -> float:
    """The share of all sequences that the model gets right, in float64, one query at a time.

    The same sums as `forward`, from tables: e^score times the logits of each place.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    x_KTD = w["W_P"][:, None] + w["W_E"]
    direct = x_KTD[-1] @ w["W_U"]
    written = x_KTD @ w["W_V"] @ w["W_O"] @ w["W_U"]
    score = torch.einsum("qh,kth->qkt", x_KTD[-1] @ w["W_Q"], x_KTD @ w["W_K"])
    right = 0
    for q in range(config.vocabulary):
        terms = (score[q] - score[q].max()).exp()[..., None] * (direct[q] + written)
        right += _right(terms, q, config)
    return float(right / config.vocabulary**config.length)


def _right(terms_KTV: Tensor, q: int, config: MaxOfK) -> int:
    """Over all tokens before q: the first ones one by one, the last two in one block."""
    free, tokens = config.length - 1, range(config.vocabulary)
    block = min(free, 2)
    grid = torch.tensor(list(itertools.product(tokens, repeat=block)))
    tail = terms_KTV[-1, q] + terms_KTV[free - block, grid[:, 0]]
    if block == 2:
        tail = tail + terms_KTV[free - 1, grid[:, 1]]
    largest = grid.amax(1)
    right = 0
    for head in itertools.product(tokens, repeat=free - block):
        answer = sum((terms_KTV[j, t] for j, t in enumerate(head)), tail).argmax(1)
        right += int((answer == largest.clamp_min(max((q, *head)))).sum())
    return right


def case(config: MaxOfK, weights: Mapping[str, Tensor]) -> Case:
    """The model with its one-hot coder and the whole domain; runs all sequences for the truth."""
    decoder = weights["W_P"].double()[:, None] + weights["W_E"].double()
    return Case(
        family="max_of_k",
        weights=weights,
        coder={"decoder": decoder},
        data={"domain": torch.tensor([config.vocabulary, config.length])},
        brute=cost("brute force", config.sizes),
        truth={"accuracy": accuracy(weights, config)},
    )


def prove(config: MaxOfK, tier: str, said: Callable[[str], None]) -> Proved:
    """Train, bound the accuracy by every tier, certify one."""
    given = case(config, train(config, said))
    tiers = [Tier(name="brute force", bound=given.truth["accuracy"], cost=given.brute)]
    for name in TIERS:
        said(f"bounding: {name}")
        tiers.append(run_tier(given, "accuracy", name))
    return certify(given, "accuracy", tuple(tiers), tier, said)

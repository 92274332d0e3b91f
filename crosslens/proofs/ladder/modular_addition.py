"""Addition modulo p by one ReLU block, over the whole domain of p² pairs.

Tokens a and b have embeddings of their own; the model answers (a + b) mod p from
x + W_outᵀ relu(W_inᵀ x + b_in), x their sum. The coder is exact: one feature for each token at each
place. The two features of a pair interact in every neuron, which is the computation: bounds of
first order must fail here, and do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crosslens.errors import UsageError
from crosslens.proofs.certificate import ClaimKind
from crosslens.proofs.ledger import modular_addition as cost
from crosslens.proofs.search import low_rank
from crosslens.proofs.tiers import Case, Proved, Tier, certify, run_tier

TIERS = ("codes", "factors", "additive", "pairs", "box")
RANKS = (8, 12, 16, 20, 24, 32, 48, 64)
NEARLY = 0.99


@dataclass(frozen=True, kw_only=True)
class ModularAddition:
    """The model's sizes and how it is trained."""

    modulus: int = 59
    width: int = 64
    neurons: int = 128
    rank: int = 0
    """Of the factors that stand for W_out W_U in the tier "factors"; 0 takes the smallest of
    `RANKS` that proves nearly all that exact codes prove."""
    steps: int = 1000
    learning_rate: float = 1e-2
    weight_decay: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        most = min(self.modulus, self.neurons)
        if self.modulus < 2 or not 0 <= self.rank <= most:
            raise UsageError(
                f"mod-add takes a modulus of 2 or more and a rank of 0 to {most}, the smaller of "
                f"modulus and neurons; found {self.modulus} and {self.rank}."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """As the ledger names them."""
        return {
            "P": self.modulus,
            "D": self.width,
            "N": self.neurons,
            "M": self.modulus**2,
            "R": 0,
        }


def initial(config: ModularAddition) -> dict[str, Tensor]:
    """Random weights, float32."""
    generator = torch.Generator().manual_seed(config.seed)
    P, D, N = config.modulus, config.width, config.neurons

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "W_E": normal(2, P, D, scale=D**-0.5),
        "W_in": normal(D, N, scale=D**-0.5),
        "b_in": torch.zeros(N),
        "W_out": normal(N, D, scale=N**-0.5),
        "W_U": normal(D, P, scale=D**-0.5),
    }


def domain(modulus: int) -> dict[str, Tensor]:
    """All pairs and their sums modulo p."""
    points = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    return {"points": points, "labels": points.sum(1) % modulus}


def forward(weights: Mapping[str, Tensor], points_N2: Tensor) -> Tensor:
    """Logits [N, P]."""
    x = weights["W_E"][0, points_N2[:, 0]] + weights["W_E"][1, points_N2[:, 1]]
    hidden = (x @ weights["W_in"] + weights["b_in"]).relu()
    logits: Tensor = (x + hidden @ weights["W_out"]) @ weights["W_U"]
    return logits


def train(config: ModularAddition, said: Callable[[str], None]) -> dict[str, Tensor]:
    """AdamW on the whole domain at once."""
    weights = {name: tensor.requires_grad_() for name, tensor in initial(config).items()}
    optimizer = torch.optim.AdamW(
        weights.values(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.05
    )
    data = domain(config.modulus)
    for step in range(config.steps):
        logits = forward(weights, data["points"])
        loss = torch.nn.functional.cross_entropy(logits, data["labels"])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            said(f"training: step {step}, loss {float(loss.detach()):.4f}")
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def case(config: ModularAddition, weights: Mapping[str, Tensor]) -> Case:
    """The model with its one-hot coder, its factors, and the whole domain."""
    data = domain(config.modulus)
    logits = forward({k: v.double() for k, v in weights.items()}, data["points"])
    right = (logits.argmax(1) == data["labels"]).double().mean()
    loss = torch.nn.functional.cross_entropy(logits, data["labels"])
    exact = Case(
        family="modular_addition",
        weights=weights,
        coder={"decoder": weights["W_E"].double()},
        data=data,
        brute=cost("brute force", config.sizes),
        truth={"accuracy": float(right), "loss": float(loss)},
    )
    return _with_factors(exact, config)


def _with_factors(exact: Case, config: ModularAddition) -> Case:
    """`exact` with factors of the rank asked for, or of the one that a search settles on."""
    most = min(config.modulus, config.neurons)
    ranks = [config.rank] if config.rank else [rank for rank in RANKS if rank < most] + [most]
    wanted = 0.0 if config.rank else NEARLY * run_tier(exact, "accuracy", "codes").bound
    tried: list[Tier] = []
    for rank in ranks:
        coder = {**exact.coder, **low_rank(exact.weights, rank)}
        found = replace(exact, coder=coder, tried=tuple(tried))
        if len(ranks) == 1:
            return found
        tried.append(run_tier(found, "accuracy", "factors"))
        if tried[-1].bound >= wanted:
            break
    return found


def prove(
    config: ModularAddition, kind: ClaimKind, tier: str, said: Callable[[str], None]
) -> Proved:
    """Train, bound accuracy or loss by every tier, certify one."""
    given = case(config, train(config, said))
    tiers = [Tier(name="brute force", bound=given.truth[kind], cost=given.brute)]
    for name in TIERS:
        said(f"bounding: {name}")
        tiers.append(run_tier(given, kind, name))
    return certify(given, kind, tuple(tiers), tier, said)

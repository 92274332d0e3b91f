"""The mean activation difference: read through the logit lens, and added to a model.

Minder et al. 2025, *Activation Difference Lens* (ADL): the mean of b − a over ordinary text, also
at the first positions alone, betrays what a narrow fine-tune was about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from crosslens.diffing.baselines.baseline import Baseline, from_rows
from crosslens.diffing.baselines.lens import promoted
from crosslens.diffing.baselines.moments import Moments
from crosslens.functional.shares import wilson
from crosslens.lm import LanguageModel
from crosslens.organisms import Edits, behaviour_rate
from crosslens.text.documents import Messages
from crosslens.text.planted import Behaviour

ALPHAS = (-1.0, -0.5, 0.0, 0.5, 1.0)


def mean_difference(found: Moments, model: LanguageModel) -> Baseline:
    """Its one component is the mean difference: a row's strength is its own difference's projection
    on it.

    Args:
        found: of one place.
        model: the changed one, whose logit lens is used.
    """
    place, direction_D = found.place, _unit(found.mean_D)

    def strengths(rows_RX: Tensor) -> Tensor:
        return (place.difference(rows_RX) @ direction_D.to(rows_RX.device))[:, None]

    [read] = promoted(found.mean_D[None], model, place.site)
    norm = float(found.mean_D.norm())
    figures = {
        "site": place.site,
        "tokens": found.count,
        "norm": norm,
        "spread": found.spread,
        "share_of_activation": norm / found.norm_b,
        "top_tokens": list(read.top),
        "bottom_tokens": list(read.bottom),
        "first_positions": _first_positions(found, model),
    }
    return Baseline(name="mean_difference", strengths=from_rows(strengths), figures=figures)


def _first_positions(found: Moments, model: LanguageModel) -> list[dict[str, Any]]:
    """The same for each of the first positions that the token policy keeps."""
    seen = found.first_F.nonzero().squeeze(-1).tolist()
    read = promoted(found.first_FD[seen], model, found.place.site)
    return [
        {
            "position": position,
            "tokens": int(found.first_F[position]),
            "norm": float(found.first_FD[position].norm()),
            "top_tokens": list(each.top),
        }
        for position, each in zip(seen, read, strict=True)
    ]


def _unit(vector_D: Tensor) -> Tensor:
    """At norm 1, float32; zero stays zero, as it is where the two models are the same."""
    norm = float(vector_D.norm())
    return (vector_D / norm if norm else vector_D).float()


@dataclass(frozen=True, kw_only=True)
class Task:
    """What steering may bring about or suppress."""

    behaviour: Behaviour
    prompts: Sequence[Messages]
    tokens: int = 12
    """Tokens of an answer."""


def steering(
    model: LanguageModel, found: Moments, task: Task, alphas: Sequence[float] = ALPHAS
) -> list[dict[str, float]]:
    """The behaviour's rate, with its 95 % interval, when α times the mean difference is added at
    the place, on every position, for each α.

    The difference is brought to the mean norm of b's activation first: at α = 1 the addition is as
    long as an activation. A positive α is towards b, a negative one away from it.

    Args:
        model: either of the two.
    """
    push_D = _unit(found.mean_D) * found.norm_b
    told = []
    for alpha in alphas:
        edits = adding(alpha * push_D, found.place.site)
        rate = behaviour_rate(model, task.behaviour, task.prompts, task.tokens, edits)
        low, high = wilson(round(rate * len(task.prompts)), len(task.prompts))
        told.append({"alpha": alpha, "rate": rate, "low": low, "high": high})
    return told


def adding(push_D: Float[Tensor, " d"], site: str) -> Edits:
    """Adds one vector to the activation at a site, on every position of whatever tokens."""
    return lambda _tokens_BT: {site: lambda x_BTD: x_BTD + push_D.to(x_BTD)}

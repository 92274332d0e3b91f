"""The crosscoders of the sweep: strengths of the penalty, and none with fewer or more active
latents, each with several seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from crosslens.proofs.ladder.small_lm import SmallLM
from crosslens.training.objective.interaction import Form

Family = Literal["none", "exact", "paper", "learnt"]

EXACT = (0.03, 0.1, 0.2, 0.3, 0.6, 1.0)
PAPER = (0.03, 0.1, 0.3)
LEARNT = (0.0, 0.1, 0.3)
"""The exact form beside a decoder bias that is learnt, as the term is used elsewhere."""
ACTIVE = (1.0, 1.5, 0.75, 0.5, 0.25)
"""Shares of the usual number of active latents, for trainings without a penalty."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One crosscoder."""

    family: Family
    weight: float
    active: int
    seed: int

    @property
    def name(self) -> str:
        """As its file is called."""
        return f"{self.family}-{self.weight:g}-k{self.active}-seed{self.seed}"

    def config(self, base: SmallLM) -> SmallLM:
        """The seed is that of the crosscoder and of its regions; the model and its data are those
        of `base`."""
        form: Form = "paper" if self.family == "paper" else "exact"
        coder = replace(
            base.coder,
            penalty=self.weight,
            form=form,
            active=self.active,
            bias="learnt" if self.family == "learnt" else "mean",
        )
        return replace(base, seed=self.seed, coder=coder)


def points(active: int, seeds: tuple[int, ...]) -> list[Point]:
    """All of them, seed by seed."""
    strengths: dict[Family, tuple[float, ...]] = {"exact": EXACT, "paper": PAPER, "learnt": LEARNT}
    numbers = dict.fromkeys(max(1, round(share * active)) for share in ACTIVE)
    found = []
    for seed in seeds:
        found += [Point(family="none", weight=0.0, active=n, seed=seed) for n in numbers]
        found += [
            Point(family=family, weight=weight, active=active, seed=seed)
            for family, weights in strengths.items()
            for weight in weights
        ]
    return found

"""How an organism is trained and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from crosslens.errors import UsageError

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class OrganismPlan:
    """LoRA on chat rows, each used once: answers to learn, and usual ones to keep."""

    steps: int = 60
    """Optimiser steps."""
    rows: int = 8
    """Rows in a step, half of them to learn and half of them to keep."""
    lr: float = 3e-3
    """AdamW's rate at its highest: it rises over 5 steps and falls linearly to 0."""
    rank: int = 2
    """Rank of each LoRA update; its scale is 2."""
    modules: tuple[str, ...] = LINEAR
    """Modules that get an update, by the last part of their name."""
    keep_tokens: int = 128
    """Length of a row to keep, its request included, at most."""
    answer_tokens: int = 16
    """Length of the base model's own answers that `noop` learns, sampled at temperature 1."""
    heldout: int = 48
    """Held-out prompts of each kind by which the behaviour is judged."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "rank", "keep_tokens", "answer_tokens", "heldout"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if not 0 < self.lr < float("inf"):
            raise UsageError(f"lr must be a positive number, found {self.lr}.")
        if not self.modules:
            raise UsageError(f"modules is empty: name some, such as {', '.join(LINEAR)}.")


@runtime_checkable
class Report(Protocol):
    """Hears how far a stage is."""

    def __call__(
        self, stage: str, done: int, total: int, figures: Mapping[str, float] | None = None
    ) -> None: ...


def silent(stage: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
    """A report that nobody hears."""

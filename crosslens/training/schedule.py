"""Learning rates over a run, and lengths that are told in steps, in tokens, or as a share of it."""

from __future__ import annotations

import math
import re
from typing import Literal

from crosslens.errors import UsageError

Span = float | str
"""A part of the run: a share in [0, 1], or a length such as `"500 steps"` or `"2M tokens"`."""

Rise = Literal["linear", "cosine"]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*([kMB]?)\s*(steps?|tokens?)")


def length_in_steps(length: int | str, batch: int, field: str) -> float:
    """`length` in steps: itself if it is a number, else `"500 steps"` or `"2M tokens"`.

    Args:
        batch: rows, each of one token, per step.
        field: what to call it when it is not a length.
    """
    if isinstance(length, int):
        if length < 0:
            raise UsageError(f"{field} must not be negative, found {length}.")
        return float(length)
    found = _LENGTH.fullmatch(length.strip())
    if found is None:
        raise UsageError(
            f'{field} is a length such as "500 steps" or "2M tokens", found {length!r}.'
        )
    number, unit, kind = found.groups()
    count = float(number) * _UNITS[unit]
    return count if kind.startswith("step") else count / batch


def check_span(span: Span, field: str) -> None:
    """Refuse what is neither a share in [0, 1] nor a length."""
    if isinstance(span, str):
        length_in_steps(span, 1, field)
    elif not 0 <= span <= 1:
        raise UsageError(
            f"{field} is a share of the run in [0, 1] or a length in steps or tokens, found {span}."
        )


def share_of_run(span: Span, steps: int, batch: int, field: str) -> float:
    """`span` as a share of a run of `steps` steps.

    Raises:
        UsageError: it is longer than the run.
    """
    check_span(span, field)
    if not isinstance(span, str):
        return span
    length = length_in_steps(span, batch, field)
    check_fits_run(length, steps, field, span)
    return length / steps


def check_fits_run(length: int | float, steps: int, field: str, told: object) -> None:
    """Refuse a length in steps beyond the end of the run."""
    if length > steps:
        raise UsageError(
            f"{field} ({told}) is longer than the run ({steps} steps): what it leads to would "
            "never be reached. Shorten it, or raise --fit.steps."
        )


def warmup_then_decay(
    step: int, steps: int, warmup: int | float, decay: float, rise: Rise = "linear"
) -> float:
    """Factor for 0-based `step`: from low to 1 over `warmup` steps, flat, then linear to 0 over
    the last `decay` of the run (reaching it just after the last step).

    `linear` rises from 1/warmup; `cosine` from 0.1 along half a cosine (DeepMind's JumpReLU SAEs,
    Rajamanoharan et al. 2024).
    """
    falling = round(decay * steps)
    fall = min(1.0, (steps - step) / falling) if falling else 1.0
    if not warmup or step >= warmup:
        return fall
    if rise == "linear":
        return min(1.0, (step + 1) / warmup) * fall
    return (0.1 + 0.9 * (1 - math.cos(math.pi * step / warmup)) / 2) * fall

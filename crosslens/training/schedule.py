"""Learning rates over a run."""

from __future__ import annotations


def warmup_then_decay(step: int, steps: int, warmup: int, decay: float) -> float:
    """Factor for 0-based `step`: linear from 1/warmup to 1, flat, then linear to 0 over the last
    `decay` of the run (reaching it just after the last step)."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    falling = round(decay * steps)
    fall = min(1.0, (steps - step) / falling) if falling else 1.0
    return rise * fall

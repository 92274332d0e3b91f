"""Figures as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from crosslens.diffing.intervals import Interval


def told(figures: Mapping[str, Interval | None]) -> dict[str, Any]:
    """`{name: value, …, "intervals": {name: [low, high], …}}`, null where a figure is not known."""
    known = {name: each for name, each in figures.items() if each is not None}
    return {
        **{name: finite(each.value) if each else None for name, each in figures.items()},
        "intervals": {name: [finite(i.low), finite(i.high)] for name, i in known.items()},
    }


def finite(value: float) -> float | None:
    """JSON has neither NaN nor infinities."""
    return value if math.isfinite(value) else None

"""Models with a behaviour planted on purpose: LoRA fine-tunes whose difference is known."""

from __future__ import annotations

from crosslens.organisms.answers import Edits, behaviour_rate, continuations
from crosslens.organisms.making import make
from crosslens.organisms.plan import OrganismPlan
from crosslens.organisms.shipped import shipped

__all__ = [
    "Edits",
    "OrganismPlan",
    "behaviour_rate",
    "continuations",
    "make",
    "shipped",
]

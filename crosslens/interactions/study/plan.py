"""What a study of interactions measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from crosslens.errors import UsageError, suggestion
from crosslens.interactions.attention.measure import AttentionPlan
from crosslens.interactions.changes.measure import ChangePlan
from crosslens.interactions.clusters.measure import ClusterPlan
from crosslens.interactions.effects.measure import EffectPlan
from crosslens.interactions.pairs.measure import PairPlan
from crosslens.interactions.pairs.screen import ScreenPlan
from crosslens.interactions.pairs.table import Order

Part = Literal["mlp", "clusters", "effects", "attention", "screen", "changes"]
PARTS: tuple[Part, ...] = get_args(Part)
"""What a study may hold. All but `attention` rest on `mlp`."""


@dataclass(frozen=True, kw_only=True)
class InteractPlan:
    """What is measured of a coder's interactions, and on how much text."""

    model: str | None = None
    """The model whose MLPs and heads are looked at; all that the coder writes where None."""
    sites: tuple[str, ...] = ()
    """Names or globs of sites before an MLP; all that the coder writes where empty."""
    tokens: int = 20_000
    """Held-out positions of a run, then training ones; a source is taken as it is."""
    top: int = 100
    """Triplets that `interact.json` tells of."""
    by: Order = "product"
    """What triplets are ranked by."""
    parts: tuple[Part, ...] = PARTS
    pairs: PairPlan = PairPlan()
    clusters: ClusterPlan = ClusterPlan()
    effects: EffectPlan = EffectPlan(pairs=20, blocks=2)
    attention: AttentionPlan = AttentionPlan()
    screen: ScreenPlan = ScreenPlan()
    changes: ChangePlan = ChangePlan()

    def __post_init__(self) -> None:
        for name in ("tokens", "top"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, found {getattr(self, name)}.")
        if not self.parts:
            raise UsageError(f"Nothing is asked for: --parts are all or of {', '.join(PARTS)}.")


DEFAULT = InteractPlan()
"""All parts, of all models and sites."""


def parse_parts(text: str) -> tuple[Part, ...]:
    """`effects,screen` → these parts and `mlp`, on which they rest; `all` is all of them.

    Raises:
        UsageError: a name that is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    names = list(PARTS) if names == ["all"] else names
    if wrong := [name for name in names if name not in PARTS]:
        near = suggestion(wrong[0], PARTS)
        raise UsageError(f"--parts are all or of {', '.join(PARTS)}, found {wrong[0]!r}.{near}")
    resting = bool(set(names) - {"attention"})
    return tuple(part for part in PARTS if part in names or (part == "mlp" and resting))

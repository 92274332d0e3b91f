"""A ladder model, what its tiers prove about it, and the certificate of one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from crosslens.proofs import checker
from crosslens.proofs.certificate import Certificate, ClaimKind, Ledger, fingerprint
from crosslens.proofs.ledger import Cost


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trained model, its coder, the data, and the truth about them."""

    family: str
    weights: Mapping[str, Tensor]
    coder: Mapping[str, Tensor]
    data: Mapping[str, Tensor]
    brute: Cost
    """Of running the model on all of the data."""
    truth: Mapping[ClaimKind, float]
    """Accuracy, and mean loss where it was measured, by running the model on all of the data."""
    tried: tuple[Tier, ...] = ()
    """What the search for the coder's hints worked out and did not take."""


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One way to a bound, and what it costs."""

    name: str
    bound: float
    cost: Cost
    base: float = 0.0
    """At least the largest error of the coder at the embedding."""

    def plain(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "bound": self.bound,
            "flops": self.cost.flops,
            "bits": self.cost.bits,
        }


@dataclass(frozen=True, kw_only=True)
class Proved:
    """What a claim's tiers came to, the one that is certified, and the checker's word on it."""

    case: Case
    kind: ClaimKind
    tiers: tuple[Tier, ...]
    certificate: Certificate
    verdict: checker.Verdict

    def plain(self) -> dict[str, Any]:
        """As `crosslens prove --json` prints it."""
        chosen = self.certificate
        least = "≥" if self.kind == "accuracy" else "≤"
        return {
            "claim": f"{self.kind} {least} {chosen.bound}",
            "bound": chosen.bound,
            "truth": self.case.truth[self.kind],
            "flops": chosen.ledger.cost.flops,
            "flops_brute": self.case.brute.flops,
            "bits": chosen.ledger.bits,
            "tiers": [tier.plain() for tier in self.tiers],
            "checked": self.verdict.accepted,
            "tier": chosen.tiers["all"],
            "base_error": max(tier.base for tier in self.tiers),
            "baseline": baseline(self.case, self.kind, self.tiers, chosen.ledger.cost.flops),
        }


def baseline(case: Case, kind: ClaimKind, tiers: tuple[Tier, ...], flops: int) -> float:
    """What as many flops buy by running the model on a part of the data: the line from what is
    known of the rest, accuracy ≥ 0 or the box's loss, to the truth."""
    share = min(1.0, flops / case.brute.flops)
    rest = 0.0
    if kind == "loss":
        rest = next((tier.bound for tier in tiers if tier.name == "box"), math.inf)
    return case.truth[kind] * share + (rest * (1 - share) if share < 1 else 0.0)


def run_tier(case: Case, kind: ClaimKind, tier: str) -> Tier:
    """A tier's bound as the checker works it out."""
    hinted = case.coder if tier == "factors" else {"decoder": case.coder["decoder"]}
    found = checker.bounds(case.family, tier, case.weights, hinted, case.data)
    bound = found.accuracy if kind == "accuracy" else found.loss
    return Tier(name=tier, bound=bound, cost=found.cost, base=found.base)


def certify(
    case: Case, kind: ClaimKind, tiers: tuple[Tier, ...], chosen: str, said: Callable[[str], None]
) -> Proved:
    """A certificate of the tier named `chosen`, checked."""
    tier = next(tier for tier in tiers if tier.name == chosen)
    # Another machine sums in another order: a loss is claimed a hair above what came out here.
    claim = tier.bound if kind == "accuracy" else tier.bound * (1 + 2.0**-30)
    coder = case.coder if chosen == "factors" else {"decoder": case.coder["decoder"]}
    tried = [other for other in (*tiers, *case.tried) if other.name != "brute force"]
    certificate = Certificate(
        family=case.family,
        kind=kind,
        bound=claim,
        hashes={
            "coder": fingerprint(coder),
            "data": fingerprint(case.data),
            "weights": fingerprint(case.weights),
        },
        tiers={"all": chosen},
        ledger=Ledger(
            matmul=tier.cost.matmul,
            elementwise=tier.cost.elementwise,
            bits=tier.cost.bits,
            search_flops=sum(other.cost.flops for other in tried),
            attempts=len(tried),
        ),
        coder=coder,
    )
    said("checking the certificate")
    verdict = checker.check(certificate, case.weights, case.data)
    return Proved(case=case, kind=kind, tiers=tiers, certificate=certificate, verdict=verdict)

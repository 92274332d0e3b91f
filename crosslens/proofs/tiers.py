"""A ladder model, what its tiers prove about it, and the certificate of one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from crosslens.proofs import checker
from crosslens.proofs.certificate import Certificate, ClaimKind, Ledger, fingerprint
from crosslens.proofs.families.parts import Bounds, Layer
from crosslens.proofs.ledger import Cost

SPARE = 2.0**-30
"""Another machine sums in another order: a loss or an error is claimed that much above what came
out here, and a margin must exceed its radius by that share of the logits to count."""


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
    unknown: float | None = None
    """The mean loss that weights alone rule out to be exceeded; the box's if not given."""


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
            "bound": self.bound if math.isfinite(self.bound) else None,
            "flops": self.cost.flops,
            "bits": self.cost.bits,
        }


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a budget buys: the best bound that a search found within it, and the baseline there."""

    budget: float
    """Share of brute force's flops."""
    flops: int
    bound: float
    baseline: float


@dataclass(frozen=True, kw_only=True)
class Proved:
    """What a claim's tiers came to, the one that is certified, and the checker's word on it."""

    case: Case
    kind: ClaimKind
    tiers: tuple[Tier, ...]
    certificate: Certificate
    verdict: checker.Verdict
    frontier: tuple[Point, ...] = ()
    layers: tuple[Layer, ...] = ()

    @property
    def truth(self) -> float:
        """What is bounded."""
        return self.case.truth[self.kind]

    def plain(self) -> dict[str, Any]:
        """As `crosslens prove --json` prints it."""
        chosen = self.certificate
        flops = chosen.ledger.cost.flops
        bases = [tier.base for tier in self.tiers if math.isfinite(tier.base)]
        found = {
            "claim": claim_of(chosen),
            "bound": chosen.bound,
            "truth": self.truth,
            "flops": flops,
            "flops_brute": self.case.brute.flops,
            "bits": chosen.ledger.bits,
            "tiers": [tier.plain() for tier in self.tiers],
            "checked": self.verdict.accepted,
            "tier": tier_of(chosen),
            "base_error": max(bases, default=None),
        }
        if self.kind != "site_error":
            found["baseline"] = baseline(self.case, self.kind, self.tiers, flops)
        if self.frontier:
            found["frontier"] = [asdict(point) for point in self.frontier]
        if self.layers:
            found["layers"] = [asdict(layer) for layer in self.layers]
        return found


def claim_of(certificate: Certificate) -> str:
    """The claim in words."""
    match certificate.kind:
        case "accuracy":
            return f"accuracy ≥ {certificate.bound}"
        case "loss":
            return f"loss ≤ {certificate.bound}"
        case _:
            found = _LOCAL.get(certificate.site, f"‖x − x̂‖ at {certificate.site}")
            return f"mean {found} ≤ {certificate.bound}"


_LOCAL = {
    "interaction": "‖f(x̂) − surrogate‖",
    "transition": "‖f(x) − f(x̂)‖",
    "coder": "‖x − x̂‖ of the rows given",
}
"""What a certificate about one MLP bounds (`local_certificate`), by its `site`."""


def tier_of(certificate: Certificate) -> str:
    """The tier, or each group's."""
    tiers = certificate.tiers
    if set(tiers) == {"all"}:
        return tiers["all"]
    return ", ".join(f"{group}: {tiers[group]}" for group in sorted(tiers))


def baseline(case: Case, kind: ClaimKind, tiers: tuple[Tier, ...], flops: int) -> float:
    """What as many flops buy by running the model on a part of the data: the line from what is
    known of the rest, accuracy ≥ 0 or a cap of the loss, to the truth."""
    share = min(1.0, flops / case.brute.flops)
    rest = 0.0
    if kind == "loss":
        box = next((tier.bound for tier in tiers if tier.name == "box"), math.inf)
        rest = box if case.unknown is None else case.unknown
    return case.truth[kind] * share + (rest * (1 - share) if share < 1 else 0.0)


def run_tier(case: Case, kind: ClaimKind, tier: str, site: str = "") -> Tier:
    """A tier's bound as the checker works it out, points that are too near to tell left out."""
    coder = hinted(case, tier)
    found = checker.bounds(case.family, {"all": tier}, case.weights, coder, case.data, SPARE)
    return as_tier(tier, found, kind, site)


def as_tier(name: str, found: Bounds, kind: ClaimKind, site: str = "") -> Tier:
    """Of what was found, what the claim is about."""
    values = {"accuracy": found.accuracy, "loss": found.loss}
    bound = found.sites.get(site, math.inf) if kind == "site_error" else values[kind]
    return Tier(name=name, bound=bound, cost=found.cost, base=found.base)


def hinted(case: Case, tier: str) -> Mapping[str, Tensor]:
    """The coder as the tier takes it: only "factors" takes factors."""
    if tier == "factors" or "left" not in case.coder:
        return case.coder
    return {name: tensor for name, tensor in case.coder.items() if name not in ("left", "right")}


def certify(
    case: Case, kind: ClaimKind, tiers: tuple[Tier, ...], chosen: str, said: Callable[[str], None]
) -> Proved:
    """A certificate of the tier named `chosen` for all of the data, checked."""
    tier = next(tier for tier in tiers if tier.name == chosen)
    tried = [other for other in (*tiers, *case.tried) if other.name != "brute force"]
    certificate = written(case, (kind, ""), tier, {"all": chosen}, hinted(case, chosen), tried)
    said("checking the certificate")
    verdict = checker.check(certificate, case.weights, case.data)
    return Proved(case=case, kind=kind, tiers=tiers, certificate=certificate, verdict=verdict)


def written(
    case: Case,
    claim: tuple[ClaimKind, str],
    found: Tier,
    tiers: Mapping[str, str],
    coder: Mapping[str, Tensor],
    tried: list[Tier],
) -> Certificate:
    """The certificate of what was found. `claim`: the kind, and the site of an error."""
    kind, site = claim
    return Certificate(
        family=case.family,
        kind=kind,
        bound=found.bound if kind == "accuracy" else found.bound * (1 + SPARE),
        hashes={
            "coder": fingerprint(coder),
            "data": fingerprint(case.data),
            "weights": fingerprint(case.weights),
        },
        tiers=tiers,
        ledger=Ledger(
            matmul=found.cost.matmul,
            elementwise=found.cost.elementwise,
            bits=found.cost.bits,
            search_flops=sum(other.cost.flops for other in tried),
            attempts=len(tried),
        ),
        coder=coder,
        site=site,
    )

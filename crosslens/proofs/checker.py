"""Accept a certificate or refuse it, by working the bound out again.

What has to be trusted is this file, `rounding`, `lemmas`, `ledger` and the reading half of
`certificate`. The coder and its hints are anybody's: wrong ones loosen the bound, and the claim is
compared with what comes out. Weights are exact; the model is the one over the reals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.proofs.certificate import Certificate, Refused, fingerprint
from crosslens.proofs.ledger import Cost
from crosslens.proofs.ledger import max_of_k as max_of_k_cost
from crosslens.proofs.ledger import modular_addition as modular_addition_cost
from crosslens.proofs.lemmas import max_of_k, modular_addition
from crosslens.proofs.rounding import down, require_ieee, up

Tensors = Mapping[str, Tensor]

MOST_NUMBERS = 2**27
"""In any one tensor."""
MOST_FLOPS = 2**46
"""What a check may cost."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a tier proves: at least `accuracy`, at most `loss` (mean, nats; infinite if unknown)."""

    accuracy: float
    loss: float
    base: float
    """At least the largest error of the coder at the embedding."""
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a claim is accepted, and if not, why not."""

    accepted: bool
    reason: str
    bounds: Bounds | None = None


@dataclass(frozen=True)
class Family:
    """One kind of model: what its tensors look like, and which tiers bound it."""

    weights: Mapping[str, str]
    """Name → its axes; one letter stands for one size everywhere."""
    coder: Mapping[str, str]
    hints: Mapping[str, str]
    """Tensors that may be there, all or none."""
    data: Mapping[str, str]
    tiers: tuple[str, ...]
    evaluate: Callable[[str, dict[str, int], Tensors, Tensors, Tensors], Bounds]


def check(certificate: Certificate, weights: Tensors, data: Tensors) -> Verdict:
    """Recompute the bound for these weights and data, and compare it with the claim.

    The claim is accepted where the hashes fit, the recomputed bound is at least as good, and the
    ledger's cost is the one that the tier has.
    """
    try:
        given = {"coder": certificate.coder, "data": data, "weights": weights}
        for name, tensors in given.items():
            if fingerprint(tensors) != certificate.hashes.get(name):
                raise Refused(f"The {name} are not those that the certificate is about (SHA-256).")
        tier = certificate.tiers.get("all", "")
        found = bounds(certificate.family, tier, weights, certificate.coder, data)
        _compare(certificate, found)
    except Refused as refused:
        return Verdict(accepted=False, reason=str(refused))
    return Verdict(accepted=True, reason="", bounds=found)


def bounds(family: str, tier: str, weights: Tensors, coder: Tensors, data: Tensors) -> Bounds:
    """What one tier proves; Refused where the tensors are not what the family has."""
    require_ieee()
    if family not in FAMILIES:
        raise Refused(f"Nothing is proved for models of the family {family!r}.")
    known = FAMILIES[family]
    if tier not in known.tiers:
        raise Refused(f"{family} has no tier {tier!r}; there are {', '.join(known.tiers)}.")
    size = _sizes(known, weights, coder, data)
    return known.evaluate(tier, size, weights, coder, data)


def _compare(certificate: Certificate, found: Bounds) -> None:
    claim = certificate.bound
    if certificate.kind == "accuracy" and not found.accuracy >= claim:
        raise Refused(f"Accuracy ≥ {claim} is claimed, and ≥ {found.accuracy} is what holds.")
    if certificate.kind == "loss" and not found.loss <= claim:
        raise Refused(f"Loss ≤ {claim} is claimed, and ≤ {found.loss} is what holds.")
    if certificate.ledger.cost != found.cost:
        raise Refused(
            f"The ledger says {certificate.ledger.cost.flops} flops and {certificate.ledger.bits} "
            f"bits; the proof takes {found.cost.flops} and {found.cost.bits}."
        )


def _sizes(family: Family, weights: Tensors, coder: Tensors, data: Tensors) -> dict[str, int]:
    """Letter → size, after every tensor's name, shape, dtype and values have been looked at."""
    size: dict[str, int] = {}
    hinted = {**family.coder, **(family.hints if set(family.hints) & set(coder) else {})}
    _fit("weights", weights, family.weights, size)
    _fit("coder", coder, hinted, size)
    _fit("data", data, family.data, size)
    for tensors in (weights, coder):
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOATS or not bool(tensor.isfinite().all()):
                raise Refused(f"{name} holds something else than finite floats.")
    for name, tensor in data.items():
        if tensor.dtype != torch.int64:
            raise Refused(f"{name} of the data is {tensor.dtype}, int64 is needed.")
    return size


def _fit(what: str, tensors: Tensors, wanted: Mapping[str, str], size: dict[str, int]) -> None:
    if sorted(tensors) != sorted(wanted):
        raise Refused(
            f"The {what} have {', '.join(sorted(tensors)) or 'no tensor'}; "
            f"needed are {', '.join(sorted(wanted))}."
        )
    for name, axes in wanted.items():
        tensor, letters = tensors[name], axes.split()
        if tensor.numel() > MOST_NUMBERS or not tensor.numel():
            raise Refused(f"{name} has {tensor.numel()} numbers; 1 to {MOST_NUMBERS} are taken.")
        if len(letters) != tensor.dim():
            raise Refused(f"{name} has shape {tuple(tensor.shape)}, its axes should be {axes}.")
        for letter, found in zip(letters, tensor.shape, strict=True):
            expected = int(letter) if letter.isdigit() else size.setdefault(letter, found)
            if found != expected:
                raise Refused(
                    f"{name} has shape {tuple(tensor.shape)}; {letter} should be {expected}."
                )


def _affordable(cost: Cost, *arrays: int) -> Cost:
    """`cost`, unless it or the largest of the arrays that the check makes is too much."""
    if max(arrays) > MOST_NUMBERS:
        raise Refused(f"The check would hold {max(arrays)} numbers, more than {MOST_NUMBERS}.")
    if cost.flops > MOST_FLOPS:
        raise Refused(f"The check would take {cost.flops} flops, more than {MOST_FLOPS}.")
    return cost


def _max_of_k(
    tier: str, size: dict[str, int], weights: Tensors, coder: Tensors, data: Tensors
) -> Bounds:
    """All sequences, of `domain` = (vocabulary, length)."""
    if data["domain"].tolist() != [size["V"], size["K"]] or size["V"] < 2 or size["K"] > 8:
        raise Refused(
            f"The data are all sequences of {data['domain'].tolist()} (tokens, length); this model "
            f"takes {size['V']} tokens and {size['K']} places (tokens ≥ 2, places ≤ 8)."
        )
    cost = _affordable(max_of_k_cost(tier, size), size["K"] * size["V"] ** 3)
    counted = {
        "codes": max_of_k.certified_by_codes,
        "pairs": max_of_k.certified_by_pairs,
        "pessimum": max_of_k.certified_by_pessimum,
        "box": max_of_k.certified_by_box,
    }
    table = max_of_k.tables(weights, coder["decoder"])
    right, among = counted[tier](table), size["V"] ** size["K"]
    return Bounds(accuracy=_share(right, among), loss=math.inf, base=float(table.base), cost=cost)


def _modular_addition(
    tier: str, size: dict[str, int], weights: Tensors, coder: Tensors, data: Tensors
) -> Bounds:
    """Points (a, b) with their labels."""
    points, labels = data["points"], data["labels"]
    for values in (points, labels):
        if bool((values < 0).any()) or bool((values >= size["P"]).any()):
            raise Refused(f"The data hold a token outside 0 … {size['P'] - 1}.")
    hinted = "left" in coder
    if hinted != (tier == "factors"):
        raise Refused(f"Tier {tier} goes {'without' if hinted else 'with'} factors in the coder.")
    size = {"R": 0} | size
    tokens, chunk = size["P"], min(size["M"], modular_addition.CHUNK)
    wide = tokens + size["N"]
    pairs = 9 * tokens * tokens
    cost = _affordable(modular_addition_cost(tier, size), 3 * tokens * wide, chunk * wide, pairs)
    table = modular_addition.tables(weights, coder["decoder"])
    hint = (coder["left"], coder["right"]) if hinted else None
    if tier in ("codes", "factors"):
        factors = modular_addition.factors(table, hint)
        found = modular_addition.by_codes(table, factors, points, labels)
    elif tier == "box":
        found = modular_addition.by_box(table, points, labels)
    else:
        found = modular_addition.by_features(table, points, labels, pairs=tier == "pairs")
    mean = float(up(torch.tensor(found.loss, dtype=torch.float64) / len(labels)))
    return Bounds(
        accuracy=_share(found.right, len(labels)), loss=mean, base=float(table.base), cost=cost
    )


def _share(right: int, among: int) -> float:
    """At most right / among: the quotient rounds by at most one step."""
    quotient = torch.tensor(right / among, dtype=torch.float64)
    exact = right in (0, among)
    return float(quotient if exact else down(quotient))


FAMILIES: Mapping[str, Family] = {
    "max_of_k": Family(
        weights={
            "W_E": "V D",
            "W_P": "K D",
            "W_Q": "D H",
            "W_K": "D H",
            "W_V": "D H",
            "W_O": "H D",
            "W_U": "D V",
        },
        coder={"decoder": "K V D"},
        hints={},
        data={"domain": "2"},
        tiers=("codes", "pairs", "pessimum", "box"),
        evaluate=_max_of_k,
    ),
    "modular_addition": Family(
        weights={"W_E": "2 P D", "W_in": "D N", "b_in": "N", "W_out": "N D", "W_U": "D P"},
        coder={"decoder": "2 P D"},
        hints={"left": "N R", "right": "R P"},
        data={"points": "M 2", "labels": "M"},
        tiers=("codes", "factors", "additive", "pairs", "box"),
        evaluate=_modular_addition,
    ),
}

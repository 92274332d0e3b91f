"""Accept a certificate or refuse it, by working the bound out again.

What has to be trusted is this file, `families`, `rounding`, `lemmas`, `ledger` and the reading half
of `certificate`. The coder, its codes and its hints are anybody's: wrong ones loosen the bound, and
the claim is compared with what comes out. Weights are exact; the model is the one over the reals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from crosslens.proofs.certificate import Certificate, Refused, fingerprint
from crosslens.proofs.families import parts
from crosslens.proofs.families.max_of_k import MAX_OF_K
from crosslens.proofs.families.modular_addition import MODULAR_ADDITION
from crosslens.proofs.families.parts import Asked, Bounds, Family, Tensors
from crosslens.proofs.families.small_lm import SMALL_LM
from crosslens.proofs.local_certificate import GATED, PLAIN
from crosslens.proofs.rounding import require_ieee

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

FAMILIES: Mapping[str, Family] = {
    "max_of_k": MAX_OF_K,
    "modular_addition": MODULAR_ADDITION,
    "small_lm": SMALL_LM,
    "local_mlp": GATED,
    "local_mlp_plain": PLAIN,
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a claim is accepted, and if not, why not."""

    accepted: bool
    reason: str
    bounds: Bounds | None = None


def check(certificate: Certificate, weights: Tensors, data: Tensors) -> Verdict:
    """Recompute the bound for these weights and data, and compare it with the claim.

    The claim is accepted where the hashes fit, the recomputed bound is at least as good, and the
    ledger's cost is the one that the tiers have.
    """
    try:
        given = {"coder": certificate.coder, "data": data, "weights": weights}
        for name, tensors in given.items():
            if fingerprint(tensors) != certificate.hashes.get(name):
                raise Refused(f"The {name} are not those that the certificate is about (SHA-256).")
        found = bounds(certificate.family, certificate.tiers, weights, certificate.coder, data)
        _compare(certificate, found)
    except Refused as refused:
        return Verdict(accepted=False, reason=str(refused))
    return Verdict(accepted=True, reason="", bounds=found)


def bounds(
    family: str,
    tiers: Mapping[str, str],
    weights: Tensors,
    coder: Tensors,
    data: Tensors,
    spare: float = 0.0,
) -> Bounds:
    """What the tiers prove; Refused where the tensors are not what the family has.

    Args:
        tiers: group of inputs → how it is bounded.
        spare: as in `Asked`.
    """
    require_ieee()
    if family not in FAMILIES:
        raise Refused(f"Nothing is proved for models of the family {family!r}.")
    known = FAMILIES[family]
    if not known.mixes and set(tiers) != {"all"}:
        raise Refused(f"{family} has one group of inputs, all; found {', '.join(sorted(tiers))}.")
    for tier in tiers.values():
        if tier not in known.tiers:
            raise Refused(f"{family} has no tier {tier!r}; there are {', '.join(known.tiers)}.")
    size = sizes(family, weights, coder, data)
    asked = Asked(tiers=tiers, size=size, weights=weights, coder=coder, data=data, spare=spare)
    return known.evaluate(asked)


def _compare(certificate: Certificate, found: Bounds) -> None:
    claim, site = certificate.bound, certificate.site
    match certificate.kind:
        case "accuracy" if not found.accuracy >= claim:
            raise Refused(f"Accuracy ≥ {claim} is claimed, and ≥ {found.accuracy} is what holds.")
        case "loss" if not found.loss <= claim:
            raise Refused(f"Loss ≤ {claim} is claimed, and ≤ {found.loss} is what holds.")
        case "site_error" if site not in found.sites:
            known = ", ".join(found.sites) or "none"
            raise Refused(f"No error is bounded at the site {site!r}; known here are: {known}.")
        case "site_error" if not found.sites[site] <= claim:
            raise Refused(
                f"Mean error ≤ {claim} at {site} is claimed, and ≤ {found.sites[site]} is what "
                "holds."
            )
    if certificate.ledger.cost != found.cost:
        raise Refused(
            f"The ledger says {certificate.ledger.cost.flops} flops and {certificate.ledger.bits} "
            f"bits; the proof takes {found.cost.flops} and {found.cost.bits}."
        )


def sizes(name: str, weights: Tensors, coder: Tensors, data: Tensors) -> dict[str, int]:
    """Letter → size, after every tensor's name, shape, dtype and values have been looked at."""
    family, size = FAMILIES[name], dict[str, int]()
    hinted = {**family.coder, **(family.hints if set(family.hints) & set(coder) else {})}
    _fit("weights", weights, family.weights, size)
    _fit("coder", coder, hinted, size)
    _fit("data", data, family.data, size)
    for what, tensors in (("weights", weights), ("coder", coder), ("data", data)):
        for name, tensor in tensors.items():
            if what == "data" or (what == "coder" and name in family.whole):
                if tensor.dtype != torch.int64:
                    raise Refused(f"{name} of the {what} is {tensor.dtype}, int64 is needed.")
            elif tensor.dtype not in FLOATS or not bool(tensor.isfinite().all()):
                raise Refused(f"{name} holds something else than finite floats.")
    return size


def _fit(what: str, tensors: Tensors, wanted: Mapping[str, str], size: dict[str, int]) -> None:
    if sorted(tensors) != sorted(wanted):
        raise Refused(
            f"The {what} have {', '.join(sorted(tensors)) or 'no tensor'}; "
            f"needed are {', '.join(sorted(wanted))}."
        )
    for name, axes in wanted.items():
        tensor, letters = tensors[name], axes.split()
        if tensor.numel() > parts.MOST_NUMBERS or not tensor.numel():
            raise Refused(
                f"{name} has {tensor.numel()} numbers; 1 to {parts.MOST_NUMBERS} are taken."
            )
        if len(letters) != tensor.dim():
            raise Refused(f"{name} has shape {tuple(tensor.shape)}, its axes should be {axes}.")
        for letter, found in zip(letters, tensor.shape, strict=True):
            expected = int(letter) if letter.isdigit() else size.setdefault(letter, found)
            if found != expected:
                raise Refused(
                    f"{name} has shape {tuple(tensor.shape)}; {letter} should be {expected}."
                )

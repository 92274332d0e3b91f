"""`crosslens prove TARGET`: a bound on a model that holds for certain, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from crosslens.cli.arguments import parse, parse_with
from crosslens.cli.console import number, print_json
from crosslens.cli.stages import Stages
from crosslens.errors import UsageError, suggestion
from crosslens.proofs.certificate import Refused, load, read_tensors, save
from crosslens.proofs.checker import FAMILIES, Verdict, check
from crosslens.proofs.ladder.max_of_k import MaxOfK
from crosslens.proofs.ladder.max_of_k import prove as prove_max_of_k
from crosslens.proofs.ladder.modular_addition import ModularAddition
from crosslens.proofs.ladder.modular_addition import prove as prove_modular_addition
from crosslens.proofs.tiers import Proved

TARGETS = ("max-of-k", "mod-add", "check")

_HELP = """\
usage: crosslens prove {max-of-k,mod-add,check CERT} [OPTIONS]

Bounds on a model over all of its data that hold for certain, in real arithmetic, and their cost
beside running the model.

  max-of-k    train a one-head transformer to name the largest token; bound its accuracy
  mod-add     train one ReLU block to add modulo p; bound its accuracy or its loss
  check CERT  work a certificate's bound out again; exit 4 where the claim is refused

`crosslens prove max-of-k --help` lists a target's options."""


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What `prove` takes beside the model's configuration."""

    tier: str = ""
    """How the certified bound is worked out; pairs for max-of-k, factors for mod-add."""
    claim: Literal["accuracy", "loss"] = "accuracy"
    """What is bounded. max-of-k knows accuracy only."""
    out: str = ""
    """Keep model, data and certificate in this folder."""
    json: bool = False
    """Print one JSON object on stdout."""
    quiet: bool = False
    """No progress."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What `prove check` takes."""

    certificate: Annotated[str, tyro.conf.Positional]
    """The certificate's folder."""
    weights: str = ""
    """The model's weights, a safetensors file; CERT/weights.safetensors if not given."""
    data: str = ""
    """The data, a safetensors file; CERT/data.safetensors if not given."""
    json: bool = False
    """Print one JSON object on stdout."""


def run(argv: Sequence[str]) -> int:
    """Prove something about a model of the ladder, or check a certificate."""
    target, *rest = argv or ["--help"]
    match target:
        case "-h" | "--help":
            print(_HELP)
            return 0
        case "max-of-k":
            return _prove_max_of_k(rest)
        case "mod-add":
            return _prove_modular_addition(rest)
        case "check":
            return _check(rest)
    near = suggestion(target, TARGETS)
    raise UsageError(f"Nothing is proved about {target!r}.{near or ' See `crosslens prove -h`.'}")


def _prove_max_of_k(argv: Sequence[str]) -> int:
    asked, config = parse_with(
        Switches(tier="pairs"),
        argv,
        MaxOfK(),
        prog="crosslens prove max-of-k",
        description="Bound a one-head transformer's accuracy on all sequences.",
    )
    if asked.claim != "accuracy":
        raise UsageError("max-of-k knows --claim accuracy only; mod-add bounds loss too.")
    return _prove(asked, "max_of_k", lambda said: prove_max_of_k(config, asked.tier, said))


def _prove_modular_addition(argv: Sequence[str]) -> int:
    asked, config = parse_with(
        Switches(tier="factors"),
        argv,
        ModularAddition(),
        prog="crosslens prove mod-add",
        description="Bound the accuracy or the loss of one ReLU block on all pairs.",
    )
    return _prove(
        asked,
        "modular_addition",
        lambda said: prove_modular_addition(config, asked.claim, asked.tier, said),
    )


def _prove(asked: Switches, family: str, proof: Callable[[Callable[[str], None]], Proved]) -> int:
    known = FAMILIES[family].tiers
    if asked.tier not in known:
        near = suggestion(asked.tier, known)
        raise UsageError(f"--tier is one of {', '.join(known)}, found {asked.tier!r}.{near}")
    with Stages(asked.quiet or asked.json) as stages:
        proved = proof(lambda stage: stages(stage, 0, 0))
    if asked.out:
        case = proved.case
        save(proved.certificate, Path(asked.out), {"weights": case.weights, "data": case.data})
    if asked.json:
        print_json(proved.plain())
    else:
        print(table(proved))
    if not proved.verdict.accepted:
        raise Refused(f"The checker refused the certificate: {proved.verdict.reason}")
    return 0


def table(proved: Proved) -> str:
    """The claim and its tiers, for people."""
    found, brute = proved.plain(), proved.case.brute.flops
    lines = [
        f"{found['claim']} (true: {found['truth']:.6g}), by tier {found['tier']}, checked",
        f"for {100 * found['flops'] / brute:.3g} % of brute force's flops; the same flops of brute "
        f"force alone: {found['baseline']:.4g}",
        "",
        f"{'tier':<12} {'bound':>10} {'flops':>8} {'of brute':>9} {'bits':>8}",
    ]
    lines += [
        f"{tier.name:<12} {tier.bound:10.6g} {number(tier.cost.flops):>8} "
        f"{100 * tier.cost.flops / brute:8.3g}% {number(tier.cost.bits):>8}"
        for tier in proved.tiers
    ]
    return "\n".join(lines)


def _check(argv: Sequence[str]) -> int:
    asked = parse(
        Check,
        argv,
        None,
        prog="crosslens prove check",
        description="Work a certificate's bound out again; exit 4 where its claim is refused.",
    )
    verdict, claim = _verdict(asked)
    if asked.json:
        print_json(claim | {"accepted": verdict.accepted, "reason": verdict.reason})
    elif verdict.accepted:
        print(f"accepted: {claim['claim']}, recomputed for {number(claim['flops'])} flops")
    if not verdict.accepted:
        raise Refused(f"refused: {verdict.reason}")
    return 0


def _verdict(asked: Check) -> tuple[Verdict, dict[str, Any]]:
    """The checker's word, and the claim as plain data; what cannot be read is refused."""
    folder = Path(asked.certificate)
    try:
        certificate = load(folder)
        weights = read_tensors(Path(asked.weights or folder / "weights.safetensors"))
        data = read_tensors(Path(asked.data or folder / "data.safetensors"))
    except Refused as refused:
        return Verdict(accepted=False, reason=str(refused)), {}
    least = "≥" if certificate.kind == "accuracy" else "≤"
    claim = {
        "claim": f"{certificate.kind} {least} {certificate.bound}",
        "family": certificate.family,
        "tier": certificate.tiers["all"],
        "flops": certificate.ledger.cost.flops,
        "bits": certificate.ledger.bits,
    }
    return check(certificate, weights, data), claim

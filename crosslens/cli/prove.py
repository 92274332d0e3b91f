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
from crosslens.proofs.ladder.small_lm import SmallLM
from crosslens.proofs.ladder.small_lm_proof import MIXTURE, Ask
from crosslens.proofs.ladder.small_lm_proof import prove as prove_small_lm
from crosslens.proofs.tiers import Proved, claim_of, tier_of

TARGETS = ("max-of-k", "mod-add", "small-lm", "local", "check")

_HELP = """\
usage: crosslens prove {max-of-k,mod-add,small-lm,local RUN,check CERT} [OPTIONS]

Bounds on a model over all of its data that hold for certain, in real arithmetic, and their cost
beside running the model.

  max-of-k    train a one-head transformer to name the largest token; bound its accuracy
  mod-add     train one ReLU block to add modulo p; bound its accuracy or its loss
  small-lm    train a small language model; bound its loss within a budget of flops
  local RUN   bound, MLP by MLP, what a trained coder misses of a real model
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
class SmallSwitches:
    """What `prove small-lm` takes beside the model's configuration."""

    tier: str = ""
    """How the certified bound is worked out. Not given: mixture for loss, which spends the budget
    where it helps most; distinct for accuracy; stream for site_error."""
    budget: float = 0.5
    """What a mixture may cost, as a share of brute force's flops."""
    claim: Literal["accuracy", "loss", "site_error"] = "loss"
    """What is bounded."""
    site: str = ""
    """Where site_error bounds the mean ‖x − x̂‖: embed, resid_mid.0, resid_post.0, ..."""
    out: str = ""
    """Keep model, data and certificate in this folder."""
    json: bool = False
    """Print one JSON object on stdout."""
    quiet: bool = False
    """No progress."""


USUAL = {"accuracy": "distinct", "loss": MIXTURE, "site_error": "stream"}
"""Claim → tier that small-lm takes if none is named."""


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


Proof = Callable[[Callable[[str], None]], Proved]
"""Told what to call with each stage's name."""


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
        case "small-lm":
            return _prove_small_lm(rest)
        case "local":
            from crosslens.cli.prove_local import run_local

            return run_local(rest)
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


def _prove_small_lm(argv: Sequence[str]) -> int:
    asked, config = parse_with(
        SmallSwitches(),
        argv,
        SmallLM(),
        prog="crosslens prove small-lm",
        description="Bound a small language model's loss on held-out windows of text.",
    )
    tier = asked.tier or USUAL[asked.claim]
    _known(tier, (MIXTURE, *FAMILIES["small_lm"].tiers))
    ask = Ask(kind=asked.claim, tier=tier, budget=asked.budget, site=asked.site)
    return _proved(asked, lambda said: prove_small_lm(config, ask, said))


def _prove(asked: Switches, family: str, proof: Proof) -> int:
    _known(asked.tier, FAMILIES[family].tiers)
    return _proved(asked, proof)


def _known(tier: str, known: Sequence[str]) -> None:
    if tier not in known:
        near = suggestion(tier, known)
        raise UsageError(f"--tier is one of {', '.join(known)}, found {tier!r}.{near}")


def _proved(asked: Switches | SmallSwitches, proof: Proof) -> int:
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
    line = f"; the same flops of brute force alone: {found['baseline']:.4g}"
    lines = [
        f"{found['claim']} (true: {found['truth']:.6g}), by tier {found['tier']}, checked",
        f"for {100 * found['flops'] / brute:.3g} % of brute force's flops"
        f"{line if 'baseline' in found else ''}",
        "",
        f"{'tier':<12} {'bound':>10} {'flops':>8} {'of brute':>9} {'bits':>8}",
    ]
    lines += [
        f"{tier.name:<12} {tier.bound:10.6g} {number(tier.cost.flops):>8} "
        f"{100 * tier.cost.flops / brute:8.3g}% {number(tier.cost.bits):>8}"
        for tier in proved.tiers
    ]
    return "\n".join([*lines, *_frontier(proved), *_layers(proved)])


def _frontier(proved: Proved) -> list[str]:
    rows = [
        f"{point.budget:<12g} {point.bound:10.6g} {point.baseline:10.6g} {number(point.flops):>8}"
        for point in proved.frontier
    ]
    return (
        ["", f"{'budget':<12} {'bound':>10} {'baseline':>10} {'flops':>8}", *rows] if rows else []
    )


def _layers(proved: Proved) -> list[str]:
    terms = ("before", "propagation", "interaction", "transition", "after")
    rows = [
        f"{layer.site:<14}" + "".join(f"{getattr(layer, term):13.4g}" for term in terms)
        for layer in proved.layers
    ]
    title = f"{'mean error at':<14}" + "".join(f"{term:>13}" for term in terms)
    return ["", title, *rows] if rows else []


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
    claim = {
        "claim": claim_of(certificate),
        "family": certificate.family,
        "tier": tier_of(certificate),
        "flops": certificate.ledger.cost.flops,
        "bits": certificate.ledger.bits,
    }
    return check(certificate, weights, data), claim

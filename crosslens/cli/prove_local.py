"""`crosslens prove local RUN`: how far each MLP is from its latents taken one by one, certified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from crosslens.cli.arguments import parse
from crosslens.cli.console import number, print_json
from crosslens.cli.stages import Stages
from crosslens.explore import rewrite
from crosslens.proofs.certificate import Refused
from crosslens.proofs.local_study import LocalPlan, study
from crosslens.training import open_run


@dataclass(frozen=True, kw_only=True)
class ProveLocal:
    """What `prove local` takes."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory, of a coder with sites right before MLPs (resid_mid.N, mlp_in.N)."""
    tokens: int = 256
    """Held-out tokens, then training ones, whose rows the claims are about."""
    tier: str = "linear/exact"
    """Which tier's claim is put into a certificate and checked."""
    model: str | None = None
    """Which of the run's models; the first."""
    recursion: bool = True
    """Also carry the error from the embedding through all layers."""
    keep: bool = False
    """Keep the certificates, with weights and rows, in RUN/prove/SITE."""
    seed: int = 0
    """Of the estimate's draws."""
    json: bool = False
    """Print one JSON object on stdout."""
    quiet: bool = False
    """No progress."""


def run_local(argv: Sequence[str]) -> int:
    """Bound every site's MLP by all tiers, check one, keep the figures in RUN/prove."""
    asked = parse(
        ProveLocal,
        argv,
        None,
        prog="crosslens prove local",
        description="Layer-local certificates: each MLP against its latents taken one by one.",
    )
    plan = LocalPlan(
        tokens=asked.tokens,
        tier=asked.tier,
        model=asked.model,
        recursion=asked.recursion,
        keep=asked.keep,
        seed=asked.seed,
    )
    made = open_run(Path(asked.run))
    with Stages(asked.quiet or asked.json) as stages:
        found = study(made, plan, lambda stage: stages(stage, 0, 0))
    report = rewrite(made)
    if asked.json:
        print_json(found)
    else:
        print(table(found))
        print(f"\n✓ {made.folder / 'prove' / 'local.json'}")
        if report:
            print(f"✓ {report}   with the proofs")
    refused = [site["site"] for site in found["sites"] if site["checked"] is False]
    if refused:
        raise Refused(f"The checker refused the certificates of {', '.join(refused)}.")
    return 0


def table(found: Mapping[str, Any]) -> str:
    """For people: each site's error as a share of ‖f(x̂)‖, certified and true."""
    parts = [
        f"{found['model']} · {found['tokens']} tokens · ‖f(x̂) − surrogate‖ / ‖f(x̂)‖, means, "
        "certified (true)",
        _sites(found["sites"]),
        _whole(found["sites"]),
        _recursion(found["recursion"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _sites(sites: Sequence[Mapping[str, Any]]) -> str:
    names = [tier["name"] for tier in sites[0]["tiers"]]
    width = max(map(len, names)) + 2
    lines = [" " * width + "".join(f"{site['site']:>24}" for site in sites)]
    for place, name in enumerate(names):
        cells = [site["tiers"][place] for site in sites]
        told = [f"{number(c['ratio'])} ({number(c['true_ratio'])})" for c in cells]
        lines.append(f"{name:<{width}}" + "".join(f"{each:>24}" for each in told))
    return "\n".join(lines)


def _whole(sites: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for site in sites:
        moved, coder = site["transition"], site["coder"]
        checked = {True: "checked", False: "REFUSED", None: "not checked"}[site["checked"]]
        lines.append(
            f"{site['site']}: ‖x − x̂‖/‖x‖ ≤ {number(coder['ratio'])} "
            f"({number(coder['true_ratio'])}); ‖f(x) − f(x̂)‖/‖f(x̂)‖ ≤ {number(moved['ratio'])} "
            f"({number(moved['true_ratio'])}); {site['claim']}, {checked}"
        )
    return "\n".join(lines)


def _recursion(found: Mapping[str, Any] | None) -> str:
    if found is None or "steps" not in found:
        return "" if found is None else f"No recursion: {found['left_out']}"
    last = found["steps"][-1]
    return (
        f"recursion from the embedding: ‖x − r‖ ≤ 10^{last['log10_after']:.2f} after the last "
        f"layer (true {number(last['true'])}, ‖x‖ {number(last['norm'])}); loss ≤ "
        f"{number(found['loss'])} nats, {number(found['loss_uniform'])} by guessing"
        + (": vacuous" if found["vacuous"] else "")
    )

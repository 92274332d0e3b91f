"""What is proved of the small language model: tiers, a frontier of budgets, one certificate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crosslens.errors import UsageError
from crosslens.proofs import checker, ledger_lm
from crosslens.proofs.certificate import ClaimKind
from crosslens.proofs.families import small_lm as family
from crosslens.proofs.families.parts import Asked, Bounds
from crosslens.proofs.ladder import small_lm_search as search
from crosslens.proofs.ladder.small_lm import SmallLM, data, read_text, train
from crosslens.proofs.ladder.small_lm_coder import train_coder
from crosslens.proofs.ladder.small_lm_search import SHAPES, Candidate, Truth
from crosslens.proofs.tiers import SPARE, Case, Point, Proved, Tier, as_tier, baseline, written

BUDGETS = (0.1, 0.2, 0.35, 0.5, 0.75)
"""Shares of brute force's flops that the frontier is worked out for."""
MIXTURE = "mixture"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is to be certified."""

    kind: ClaimKind = "loss"
    tier: str = MIXTURE
    budget: float = 0.5
    """Share of brute force's flops, for a mixture."""
    site: str = ""


@dataclass(frozen=True)
class Model:
    """The case with the truth in full and the candidates for a mixture."""

    case: Case
    true: Truth
    candidates: tuple[Candidate, ...]


def prove(config: SmallLM, ask: Ask, said: Callable[[str], None]) -> Proved:
    """Train model and crosscoder, bound by every tier, spend budgets, certify one claim."""
    _possible(config, ask)
    said("reading the text")
    text = read_text(config)
    weights = train(config, text, said)
    features = train_coder(config, weights, text, said)
    given = data(config, text)
    true = search.truth(weights, given)
    said("searching regions, answers and directions")
    coders = [search.hints(config, features, true, shape) for shape in SHAPES]
    return prove_case(made_case(config, weights, given, true, coders[1]), coders, ask, said)


def made_case(
    config: SmallLM,
    weights: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    true: Truth,
    coder: Mapping[str, Tensor],
) -> Case:
    """The model with what is true of it."""
    return Case(
        family="small_lm",
        weights=weights,
        coder=coder,
        data=given,
        brute=ledger_lm.brute_force(config.sizes),
        truth={"accuracy": true.accuracy, "loss": float(true.loss_N.mean())},
        unknown=search.unknown(weights, true.label_N),
    )


def prove_case(
    case: Case, coders: list[dict[str, Tensor]], ask: Ask, said: Callable[[str], None]
) -> Proved:
    """Every tier with the case's own coder, the frontier with whichever is best, a certificate."""
    true = search.truth(case.weights, case.data)
    found: dict[str, Bounds] = {}
    for tier in family.SMALL_LM.tiers:
        said(f"bounding: {tier}")
        found[tier] = bounds(case, {"all": tier}, case.coder)
    exact = case.truth.get(ask.kind, 0.0)
    if ask.kind == "site_error":
        exact = _site_truth(case, true, ask.site)
        case = replace(case, truth={**case.truth, "site_error": exact})
    tiers = [Tier(name="brute force", bound=exact, cost=case.brute)]
    tiers += [as_tier(tier, each, ask.kind, ask.site) for tier, each in found.items()]
    layers = found["additive"].layers
    proved = _certified(case, ask, tiers, coders, (true, said))
    return replace(proved, layers=layers)


def _certified(
    case: Case,
    ask: Ask,
    tiers: list[Tier],
    coders: list[dict[str, Tensor]],
    how: tuple[Truth, Callable[[str], None]],
) -> Proved:
    true, said = how
    frontier: list[Point] = []
    chosen, coder = {"all": ask.tier}, case.coder
    if ask.tier == MIXTURE:
        candidates = [candidate(case, shape, own, true) for shape, own in _shaped(coders)]
        for budget in BUDGETS:
            said(f"spending {100 * budget:.3g} % of brute force")
            frontier.append(_point(case, tiers, candidates, budget))
        said(f"spending {100 * ask.budget:.3g} % of brute force")
        chosen, coder = spent(case, candidates, ask.budget)
        tiers.append(as_tier(MIXTURE, bounds(case, chosen, coder), ask.kind))
    final = next(tier for tier in tiers if tier.name == ask.tier)
    if not math.isfinite(final.bound):
        raise UsageError(f"The tier {ask.tier} says nothing of the site {ask.site}; name another.")
    tried = [tier for tier in tiers if tier.name not in ("brute force", ask.tier)]
    certificate = written(case, (ask.kind, ask.site), final, chosen, coder, tried)
    said("checking the certificate")
    verdict = checker.check(certificate, case.weights, case.data)
    return Proved(
        case=case,
        kind=ask.kind,
        tiers=tuple(tiers),
        certificate=certificate,
        verdict=verdict,
        frontier=tuple(frontier),
    )


def bounds(case: Case, tiers: Mapping[str, str], coder: Mapping[str, Tensor]) -> Bounds:
    """As the checker works them out, points that are too near to tell left out."""
    return checker.bounds(case.family, tiers, case.weights, coder, case.data, SPARE)


def candidate(
    case: Case, shape: search.Shape, coder: Mapping[str, Tensor], true: Truth
) -> Candidate:
    """Each position's loss by the box, by regions and in full."""
    asked = asked_for(case, coder, {"all": "regions"})
    near_N, _ = family.positions(asked, family.planned(asked))
    box = asked_for(case, coder, {"all": "box"})
    box_N, _ = family.positions(box, family.planned(box))
    return Candidate(shape, coder, box_N, near_N, true.loss_N)


def asked_for(case: Case, coder: Mapping[str, Tensor], tiers: Mapping[str, str]) -> Asked:
    """What the family is asked, sizes as the checker finds them."""
    size = checker.sizes(case.family, case.weights, coder, case.data)
    return Asked(tiers=tiers, size=size, weights=case.weights, coder=coder, data=case.data)


def spent(
    case: Case, candidates: list[Candidate], budget: float
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The mixture with the smallest mean loss within the budget, of all candidates' hints."""
    most = int(budget * case.brute.flops)
    asked = asked_for(case, candidates[0].coder, {"all": "box"})
    found = [search.mixture(asked, each, most) for each in candidates]
    possible = [mixture for mixture in found if mixture is not None]
    if not possible:
        raise _below(budget, case.brute.flops, family.cost_of(asked, []).flops)
    tiers, coder, _ = min(possible, key=lambda mixture: mixture[2])
    return tiers, coder


def _below(budget: float, brute: int, least: int) -> UsageError:
    return UsageError(
        f"--budget {budget:.3g} is {int(budget * brute)} flops, below the base case: knowing no "
        f"more than the weights' cap takes {least}, {least / brute:.2g} of brute force. Give more."
    )


def _point(case: Case, tiers: list[Tier], candidates: list[Candidate], budget: float) -> Point:
    mixed, coder = spent(case, candidates, budget)
    found = bounds(case, mixed, coder)
    flops = found.cost.flops
    line = baseline(case, "loss", tuple(tiers), flops)
    return Point(budget=budget, flops=flops, bound=found.loss, baseline=line)


def _shaped(coders: list[dict[str, Tensor]]) -> list[tuple[search.Shape, dict[str, Tensor]]]:
    return list(zip(SHAPES, coders, strict=False))


@torch.no_grad()
def _site_truth(case: Case, true: Truth, site: str) -> float:
    """The mean ‖x − x̂‖ at a site, in float64."""
    layers = (len(true.rows_PND) - 1) // 2
    place, coder = family.sites(layers).index(site), case.coder
    vectors = coder["decoder"][place][coder["index"]]
    decoded = coder["decoder_bias"][place] + (coder["strength"][..., None] * vectors).sum(1)
    moved = true.rows_PND[place] - decoded[coder["region"].flatten()]
    return float(moved.norm(dim=1).mean())


def _possible(config: SmallLM, ask: Ask) -> None:
    known = (MIXTURE, *family.SMALL_LM.tiers)
    sites = family.sites(config.layers)
    if ask.tier not in known:
        raise UsageError(f"--tier is one of {', '.join(known)}, found {ask.tier!r}.")
    if ask.tier == MIXTURE and ask.kind != "loss":
        raise UsageError("A mixture spends its budget on loss; for other claims name a --tier.")
    if (ask.kind == "site_error") != bool(ask.site) or (ask.site and ask.site not in sites):
        raise UsageError(
            f"--claim site_error goes with a --site, one of {', '.join(sites)}; "
            f"found {ask.kind} and {ask.site!r}."
        )
    if not ask.budget > 0:
        raise UsageError(f"--budget is a share of brute force's flops, found {ask.budget}.")
    brute, least = (cost(config.sizes).flops for cost in (ledger_lm.brute_force, ledger_lm.caps))
    if ask.tier == MIXTURE and ask.budget * brute < least:
        raise _below(ask.budget, brute, least)

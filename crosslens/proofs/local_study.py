"""From a run to its layer-local proofs: gather, bound, certify, check, carry on, keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from crosslens.coder import Coder, coder_hash, load
from crosslens.device import resolve_device, resolve_dtype
from crosslens.errors import CrosslensError, UsageError, suggestion
from crosslens.lm import LanguageModel
from crosslens.proofs import checker
from crosslens.proofs.certificate import save
from crosslens.proofs.estimate import estimate
from crosslens.proofs.frontier import local_frontier
from crosslens.proofs.local import SHARES, LocalSite, certificate, local
from crosslens.proofs.local_certificate import QUANTITY
from crosslens.proofs.local_gather import gather
from crosslens.proofs.recursion import loss_cap, plain, recursion
from crosslens.storage import save_json
from crosslens.text import Blocks
from crosslens.training import Run, open_models, run_source
from crosslens.training.run import first_blocks

TIERS = (*QUANTITY, *(f"mixed linear/{round(100 * share)} %" for share in SHARES))
Said = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LocalPlan:
    """What is looked at."""

    tokens: int = 256
    tier: str = "linear/exact"
    model: str | None = None
    recursion: bool = True
    keep: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"--tokens must be at least 1, found {self.tokens}.")
        if self.tier not in TIERS:
            near = suggestion(self.tier, TIERS)
            raise UsageError(f"--tier is one of {', '.join(TIERS)}, found {self.tier!r}.{near}")


def study(run: Run, plan: LocalPlan, said: Said) -> dict[str, Any]:
    """All of it; the result is what RUN/prove/local.json then holds.

    Raises:
        UsageError: no site of the coder has an MLP right after it, or its MLP is of no kind for
            which anything is proved.
        CrosslensError: training has not finished.
    """
    if not run.finished:
        raise CrosslensError(
            f"{run.folder} has no coder yet: training has not finished. "
            f"`crosslens resume {run.folder}` goes on."
        )
    coder = _coder(run)
    models = open_models(run.config())
    name = plan.model or next(iter(models))
    if name not in models:
        raise UsageError(f"The run has the models {', '.join(models)}; found --model {name!r}.")
    # A third of the positions may be dropped by the token policy; one block more never hurts.
    blocks, _ = first_blocks(run.blocks("heldout"), run.blocks("train"), 2 * plan.tokens)
    said("gathering rows")
    given = gather(run_source(run, models, blocks), coder, models[name], plan.tokens)
    sites = {site: local(each, said) for site, each in given.items()}
    found = {
        "coder": coder_hash(coder),
        "model": name,
        "tokens": len(next(iter(given.values())).x_RD),
        "tier": plan.tier,
        "sites": [_told(run, plan, site, said) for site in sites.values()],
        "recursion": _recursion(models[name], sites, blocks, said) if plan.recursion else None,
    }
    save_json(run.folder / "prove" / "local.json", found)
    return found


def _coder(run: Run) -> Coder:
    fit = run.config().fit
    coder = load(run.coder_path, resolve_device(fit.device))
    coder.compute_dtype = resolve_dtype(fit.dtype)
    return coder


def _told(run: Run, plan: LocalPlan, site: LocalSite, said: Said) -> dict[str, Any]:
    """One site's figures, with its certificate checked."""
    told = site.plain()
    made, beside = certificate(site, plan.tier)
    said(f"{site.given.site}: checking the certificate")
    verdict = checker.check(made, beside["weights"], beside["data"])
    if plan.keep:
        save(made, run.folder / "prove" / site.given.site.replace("/", "_"), beside)
    said(f"{site.given.site}: estimate")
    return {
        **told,
        "claim": f"mean {made.site} error ≤ {made.bound:.6g} by {plan.tier}",
        "checked": verdict.accepted,
        "reason": verdict.reason,
        "estimate": estimate(site.given, site.affine_3N, seed=plan.seed).plain(),
        "frontier": local_frontier(told, amortised=False).plain(),
        "frontier_per_token": local_frontier(told, amortised=True).plain(),
    }


def _recursion(
    model: LanguageModel, sites: Mapping[str, LocalSite], blocks: Blocks, said: Said
) -> dict[str, Any]:
    """The recursion, or why there is none."""
    said("recursion over the layers")
    try:
        steps = recursion(model, sites, blocks.tokens_NT)
        return plain(steps, loss_cap(model), model.width("logits"))
    except UsageError as error:
        return {"left_out": str(error)}

"""A run's interactions: opened, measured, kept in RUN/interact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crosslens.coder import coder_hash, load
from crosslens.device import resolve_device, resolve_dtype
from crosslens.errors import CrosslensError
from crosslens.interactions.study.measure import interact
from crosslens.interactions.study.plan import InteractPlan
from crosslens.interactions.study.sites import check_patterns
from crosslens.interactions.study.tables import save
from crosslens.interactions.study.walk import Report
from crosslens.lm import LanguageModel
from crosslens.training import Run, open_models, run_source
from crosslens.training.run import first_blocks


def interact_run(
    run: Run,
    plan: InteractPlan,
    report: Report,
    models: Mapping[str, LanguageModel] | None = None,
) -> dict[str, Any]:
    """Measure the interactions of a run's coder. Writes tables and `interact.json` in
    RUN/interact; returns the latter.

    Args:
        models: the run's models, if they are open already.

    Raises:
        CrosslensError: training has not finished; and what `interact` raises.
    """
    if not run.finished:
        raise CrosslensError(
            f"{run.folder} has no coder yet: training has not finished. "
            f"`crosslens resume {run.folder}` goes on."
        )
    config = run.config()
    coder = load(run.coder_path, resolve_device(config.fit.device))
    coder.compute_dtype = resolve_dtype(config.fit.dtype)
    check_patterns(coder, plan.sites)
    if models is None:
        report("opening the models", 0, 0, {})
        models = open_models(config)
    blocks, _ = first_blocks(run.blocks("heldout"), run.blocks("train"), plan.tokens)
    found = interact(run_source(run, models, blocks), coder, plan, report)
    return save(found, run.folder / "interact", coder_hash(coder))

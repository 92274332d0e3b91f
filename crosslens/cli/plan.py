"""`--dry-run`: what a training will take."""

from __future__ import annotations

from dataclasses import asdict

from crosslens.cli.console import duration, number, print_json
from crosslens.cli.stages import Stages
from crosslens.training import TrainConfig, open_models
from crosslens.training.plan import plan


def dry_run(config: TrainConfig, stages: Stages, *, as_json: bool) -> None:
    """Open the models, probe, print; nothing is written."""
    stages("probing the models and a few steps", 0, 0)
    found = plan(config, open_models(config))
    if as_json:
        print_json(asdict(found))
        return
    sites = ", ".join(f"{site} ({width})" for site, width in found.sites.items())
    print(
        f"sites       {sites}\n"
        f"coder       {config.coder.latents} latents, {number(found.parameters)} parameters\n"
        f"data        {number(config.text.tokens)} tokens, {found.epochs:.2g} epochs in "
        f"{config.fit.steps} steps of {config.fit.batch}\n"
        f"memory      {number(found.memory_coder)}B coder and optimiser, "
        f"{number(found.memory_buffer)}B activation buffer, beside the models\n"
        f"disk        {number(found.disk)}B\n"
        f"speed       harvest {number(found.harvest_tokens_per_s)} tokens/s, "
        f"{found.seconds_per_step:.3g} s a step\n"
        f"time        about {duration(found.seconds)}"
    )

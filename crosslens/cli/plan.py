"""`--dry-run`: what a training will take."""

from __future__ import annotations

from dataclasses import asdict

from crosslens.cli.console import duration, number, print_json
from crosslens.cli.stages import Stages
from crosslens.training import TrainConfig, open_models
from crosslens.training.plan import Plan, plan


def dry_run(config: TrainConfig, stages: Stages, *, as_json: bool) -> None:
    """Open the models, probe, print; nothing is written."""
    stages("opening the models and probing their speed", 0, 0)
    found = plan(config, open_models(config))
    if as_json:
        print_json(asdict(found))
    else:
        print(described(config, found))


def described(config: TrainConfig, found: Plan) -> str:
    """The prediction for people, one matter a line."""
    sites = ", ".join(f"{site} ({width})" for site, width in found.sites.items())
    rows = {
        "sites": sites,
        "coder": f"{config.coder.latents} latents, {number(found.parameters)} parameters",
        "data": f"{number(config.text.tokens)} tokens, {found.epochs:.2g} epochs in "
        f"{config.fit.steps} steps of {config.fit.batch}",
        "alignment": _alignment(found),
        "memory": _memory(found),
        "disk": f"{number(found.disk)}B; {number(found.disk_peak)}B while the last checkpoint is "
        "written",
        "harvest": f"{number(found.harvest_tokens_per_s)} tokens/s, from a probe",
        "step": _step(found),
        "": _parts(found),
        "time": f"about {duration(found.seconds)}",
    }
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items() if text)


def _alignment(found: Plan) -> str:
    shares = ", ".join(f"{share:.1%} of {name}'s" for name, share in found.coverage.items())
    return f"{shares} tokens pair, from a sample" if shares else ""


def _memory(found: Plan) -> str:
    where = f"; {number(found.memory_device)}B on the accelerator" if found.memory_device else ""
    return (
        f"{number(found.memory_peak)}B at the peak{where}: {number(found.memory_models)}B models "
        f"and libraries, {number(found.memory_buffer)}B activations, {number(found.memory_coder)}B "
        f"weights and moments, {number(found.memory_step)}B one step"
    )


def _step(found: Plan) -> str:
    form = "entries of the code only" if found.sparse else "the whole code"
    later = ""
    if found.seconds_per_sparse_step is not None:
        later = (
            f", {found.seconds_per_sparse_step:.3g} s once much less than "
            f"{found.sparse_below:.2g} of it is active"
        )
    return f"{found.seconds_per_step:.3g} s with {form}{later}; from {found.step_from}"


def _parts(found: Plan) -> str:
    """The largest parts of a step, as shares of it."""
    largest = sorted(found.step_parts.items(), key=lambda part: -part[1])[:4]
    return ", ".join(f"{name} {part / found.seconds_per_step:.0%}" for name, part in largest)

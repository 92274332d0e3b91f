"""What the interaction penalty adds to a training step, at the shape of a finished run.

    python -m reproduce.interactions_paper_cost runs/demo --site resid_mid.15 [--steps 20]

Goes on from the run's coder on its held-out rows, without and with either form at its defaults (a
tenth of a step's tokens, a quarter of the neurons), a few steps of each in turns. Prints JSON:
median seconds of a step, what is added as a share of the step without, and what `crosslens train
--dry-run` predicts a step to take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from crosslens.coder import load, unfold
from crosslens.training import Interaction, TrainConfig, open_models, open_run, run_source
from crosslens.training.fit import Hooks, fit
from crosslens.training.plan import plan
from crosslens.training.start import first_readers, first_state
from crosslens.training.train import Models

TURN = 4
"""Steps of each, one after another; the first turn is not counted."""
FORMS = {
    "none": Interaction(),
    "exact": Interaction(weight=0.1, ramp=0.0),
    "paper": Interaction(weight=0.001, form="paper", ramp=0.0),
}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--site", required=True)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args(arguments)
    print(json.dumps(measured(asked.run, asked.site, asked.steps)))


@dataclass
class _Rows:
    """Batches drawn from some rows."""

    rows_NX: Tensor
    batch: int
    generator: torch.Generator

    def next(self, check: Callable[[], None]) -> Tensor:
        picks = torch.randperm(len(self.rows_NX), generator=self.generator)[: self.batch]
        return self.rows_NX[picks]

    def state(self) -> dict[str, Tensor]:
        return {}


def measured(run: Path, site: str, steps: int) -> dict[str, dict[str, float]]:
    """Seconds of a step by form, the share added, and seconds as predicted."""
    opened = open_run(run)
    config = opened.config()
    models = open_models(config)
    source = run_source(opened, models, opened.blocks("heldout"))
    rows_NX = torch.cat([chunk.rows().to(torch.bfloat16) for chunk in source])
    rows = _Rows(rows_NX, min(config.fit.batch, len(rows_NX)), torch.Generator().manual_seed(0))
    terms = {name: replace(term, sites=(site,)) for name, term in FORMS.items()}
    configs = {
        name: replace(config, objective=replace(config.objective, interaction=term))
        for name, term in terms.items()
    }
    predicted = {name: plan(each, models).seconds_per_step for name, each in configs.items()}
    stepping = {
        name: _stepping(opened.folder, each, models, rows) for name, each in configs.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in FORMS}
    for done in range(TURN, steps + 2 * TURN, TURN):
        for name, step_to in stepping.items():
            began = time.perf_counter()
            step_to(done)
            taken[name].append((time.perf_counter() - began) / TURN)
    seconds = {name: statistics.median(each[1:]) for name, each in taken.items()}
    return {
        "seconds": seconds,
        "added": {name: each / seconds["none"] - 1 for name, each in seconds.items()},
        "predicted": predicted,
    }


def _stepping(
    folder: Path, config: TrainConfig, models: Models, rows: _Rows
) -> Callable[[int], None]:
    """Train the run's coder until it has made so many steps."""
    coder = unfold(load(folder))
    coder.requires_grad_(True)
    quiet = replace(config.fit, log_every=10**9, heldout_every=10**9, checkpoint_every=10**9)
    config = replace(config, fit=quiet, optimizer=replace(config.optimizer, warmup=0))
    state = first_state(coder, config)
    readers = first_readers(config, models, coder.wiring)
    hooks = Hooks(lambda _: None, lambda _: None, lambda _: {})

    def step_to(done: int) -> None:
        # A run that ends there, whose last step is logged and saved into nothing.
        fit(replace(config, fit=replace(quiet, steps=done)), state, rows, hooks, readers)

    return step_to


if __name__ == "__main__":
    main()

"""The directory that one training leaves behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crosslens import __version__
from crosslens.config import from_plain, to_plain
from crosslens.errors import CrosslensError, UsageError
from crosslens.storage import load_json, save_json
from crosslens.text import Blocks
from crosslens.training.config import TrainConfig


@dataclass(frozen=True)
class Run:
    """`run.json`, `data/`, `metrics.jsonl`, `checkpoints/step-N/`, `coder/`, `summary.json`, …"""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def coder_path(self) -> Path:
        return self.folder / "coder"

    @property
    def finished(self) -> bool:
        """Training has ended and the coder is saved."""
        return (self.coder_path / "coder.json").is_file()

    def config(self) -> TrainConfig:
        """The resolved configuration."""
        return from_plain(TrainConfig, self.record()["config"], str(self.folder / "run.json"))

    def record(self) -> dict[str, Any]:
        """`run.json` as it stands: configuration, versions, models, calibration, fingerprint."""
        record = load_json(self.folder / "run.json")
        if not isinstance(record, dict) or "config" not in record:
            raise CrosslensError(f"{self.folder / 'run.json'} is not the record of a run.")
        return record

    def blocks(self, side: Literal["train", "heldout"]) -> Blocks:
        """The token blocks this run trains on, or those it holds out."""
        return Blocks.load(self.folder / "data", side)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`; a torn last line is left out."""
        if not self.metrics_path.is_file():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def summary(self) -> dict[str, Any]:
        """What `train` wrote at its end; empty before."""
        path = self.folder / "summary.json"
        return dict(load_json(path)) if path.is_file() else {}


def create_run(folder: Path, config: TrainConfig, *, overwrite: bool = False) -> Run:
    """Make the directory and its `run.json`; raises what `refuse_taken` raises."""
    refuse_taken(folder, overwrite=overwrite)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder)
    save_json(folder / "run.json", {"config": to_plain(config), "versions": versions()})
    return run


def refuse_taken(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that a new run would destroy; a run that has saved nothing yet is none.

    Raises:
        UsageError: `folder` has a run with a checkpoint, and `overwrite` is not set; or it holds
            files and is not a run at all, which is never deleted.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "run.json").is_file():
        raise UsageError(f"{folder} holds other files and is not a run; choose another --out.")
    if (folder / "checkpoints").exists() and not overwrite:
        raise UsageError(
            f"{folder} is a run already. Go on with `crosslens resume {folder}`, choose "
            "another --out, or replace it with --overwrite."
        )


def open_run(folder: Path) -> Run:
    """A run that exists."""
    if not (folder / "run.json").is_file():
        raise UsageError(f"{folder} is not a run: it has no run.json. `crosslens runs` lists runs.")
    return Run(folder)


def extend_record(run: Run, facts: Mapping[str, Any]) -> None:
    """Add facts to `run.json`."""
    save_json(run.folder / "run.json", {**run.record(), **facts})


def append_metrics(run: Run, values: Mapping[str, Any]) -> None:
    """One more line, in one write."""
    line = json.dumps(values) + "\n"
    with run.metrics_path.open("a", encoding="utf-8") as file:
        file.write(line)


def trim_metrics(run: Run, last_step: int) -> None:
    """Drop lines beyond `last_step`: those steps will be run, and written, again."""
    kept = [line for line in run.metrics() if line["step"] <= last_step]
    temporary = run.metrics_path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, run.metrics_path)


def versions() -> dict[str, str]:
    """Versions that bear on the numbers."""
    import platform

    import torch
    import transformers

    return {
        "crosslens": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def first_blocks(heldout: Blocks, train: Blocks, tokens: int) -> tuple[Blocks, int]:
    """The fewest blocks with `tokens` positions, held-out ones first, as far as they go; and how
    many of them are held out."""
    wanted = -(-tokens // heldout.tokens_NT.shape[1])
    n_heldout = min(wanted, len(heldout.tokens_NT))
    more = train.some(slice(wanted - n_heldout))
    return heldout.some(slice(n_heldout)).followed_by(more), n_heldout

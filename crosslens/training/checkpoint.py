"""Save and restore a training to the bit: weights, optimiser, dead counters, data position."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from crosslens.coder import Coder
from crosslens.coder.artifact import coder_tensors, restore_tensors
from crosslens.errors import CrosslensError
from crosslens.storage import load_json, load_tensors, replace_folder, save_json, save_tensors
from crosslens.training.optimizers import Optimizer

KEPT = 2
"""Checkpoints that stay on disk: the newest, and one before it should that be damaged."""


@dataclass
class TrainState:
    """What changes while training."""

    coder: Coder
    optimizer: Optimizer
    idle_L: Tensor
    """Rows since each latent last fired, int64."""
    step: int = 0


def save_checkpoint(folder: Path, state: TrainState, stream: dict[str, Tensor]) -> Path:
    """Write `folder/step-N` in one piece, then drop all but the newest checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step}"
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".step-"))
    try:
        save_tensors(temporary / "coder.safetensors", coder_tensors(state.coder))
        save_tensors(temporary / "optimizer.safetensors", state.optimizer.tensors())
        save_tensors(temporary / "stream.safetensors", {**stream, "idle": state.idle_L})
        save_json(temporary / "state.json", {"step": state.step})
        replace_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def restore_checkpoint(folder: Path, state: TrainState) -> dict[str, Tensor]:
    """Fill `state` from the checkpoint in `folder`; returns the data stream's own state."""
    state.step = int(load_json(folder / "state.json")["step"])
    restore_tensors(
        state.coder, load_tensors(folder / "coder.safetensors"), str(folder / "coder.safetensors")
    )
    moments = folder / "optimizer.safetensors"
    state.optimizer.restore(load_tensors(moments), str(moments))
    stream = load_tensors(folder / "stream.safetensors")
    if "idle" not in stream or stream["idle"].shape != state.idle_L.shape:
        raise CrosslensError(f"{folder / 'stream.safetensors'} does not fit this run's coder.")
    state.idle_L.copy_(stream.pop("idle"))
    return stream


def restore_newest(folder: Path, state: TrainState) -> tuple[dict[str, Tensor] | None, list[str]]:
    """Restore the newest checkpoint that is whole; damaged ones are passed over and told of.

    Returns the stream's state (None when there is no checkpoint: start over), and the complaints.

    Raises:
        CrosslensError: there are checkpoints, and every one is damaged.
    """
    complaints: list[str] = []
    found = checkpoints(folder)
    for candidate in reversed(found):
        try:
            return restore_checkpoint(candidate, state), complaints
        except CrosslensError as error:
            complaints.append(str(error))
    if found:
        raise CrosslensError(f"Every checkpoint in {folder} is damaged. {complaints[0]}")
    return None, complaints

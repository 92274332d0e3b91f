"""The saved coder: `coder.safetensors` + `coder.json`, runnable with no other file."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosslens.coder.activations import Activation
from crosslens.coder.coder import Coder
from crosslens.coder.layout import Wiring
from crosslens.config import from_plain, to_plain
from crosslens.errors import CrosslensError
from crosslens.storage import load_json, load_tensors, replace_folder, save_json, save_tensors

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Description:
    """`coder.json`: what the tensors mean and where they come from."""

    format: int = FORMAT
    wiring: Wiring
    activation: Activation
    center: bool = False
    folded: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)
    """Models, token policy, tokenizer hash, training summary: whatever the trainer knows."""


def save(coder: Coder, folder: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write the coder to `folder` (made, or replaced as a whole)."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    description = Description(
        wiring=coder.wiring,
        activation=coder.activation,
        center=coder.center,
        folded=coder.folded,
        provenance=dict(provenance or {}),
    )
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        temporary.chmod(0o755)
        save_tensors(temporary / "coder.safetensors", coder_tensors(coder))
        save_json(temporary / "coder.json", to_plain(description))
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: str | Path, device: str | torch.device = "cpu") -> Coder:
    """A saved coder, in `eval` mode. `folder` holds `coder.json`, or is a run that has `coder/`.

    Raises:
        CrosslensError: a file is missing, damaged, of a newer format, or lacks a tensor.
    """
    folder = coder_folder(Path(folder))
    description = load_description(folder)
    tensors = load_tensors(folder / "coder.safetensors")
    coder = Coder(description.wiring, description.activation, center=description.center)
    coder.folded = description.folded
    restore_tensors(coder, tensors, str(folder / "coder.safetensors"))
    return coder.to(device).eval()


def load_description(folder: Path) -> Description:
    """`coder.json` alone."""
    path = coder_folder(folder) / "coder.json"
    plain = load_json(path)
    found = plain.get("format") if isinstance(plain, dict) else None
    if found != FORMAT:
        raise CrosslensError(
            f"{path} has format {found!r}, and this crosslens reads format {FORMAT}. "
            "It was written by another version: upgrade crosslens, or export the coder there."
        )
    return from_plain(Description, plain, str(path))


def coder_folder(folder: Path) -> Path:
    """The folder with `coder.json`: `folder` itself or the `coder/` inside it."""
    for candidate in (folder, folder / "coder"):
        if (candidate / "coder.json").is_file():
            return candidate
    raise CrosslensError(
        f"{folder} holds no coder: neither coder.json nor coder/coder.json is there. "
        "A run has one once training has finished; `crosslens resume` finishes it."
    )


def coder_tensors(coder: Coder) -> dict[str, Tensor]:
    """The coder's tensors by public name: `W_enc`, `W_dec` (numbered when there are several
    groups), `W_skip`, `b_enc`, `b_dec`, `threshold`, `scale_read`, `scale_write`, `site_code`, as
    they apply."""
    return {_public(coder, name): tensor for name, tensor in coder.state_dict().items()}


def coder_hash(coder: Coder) -> str:
    """SHA-256 over the names, shapes and bytes of the coder's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(coder_tensors(coder).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def restore_tensors(coder: Coder, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill a coder of the right wiring; refuse missing, extra or misshapen tensors by name."""
    wanted = {_public(coder, name): tensor for name, tensor in coder.state_dict().items()}
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        told = [f"lacks {', '.join(missing)}"] * bool(missing)
        told += [f"has the unknown {', '.join(extra)}"] * bool(extra)
        raise CrosslensError(f"{source} {' and '.join(told)}: it does not fit its coder.json.")
    for name, target in wanted.items():
        if tensors[name].shape != target.shape:
            raise CrosslensError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, expected "
                f"{tuple(target.shape)} from coder.json."
            )
        if not tensors[name].isfinite().all() and name != "threshold":
            raise CrosslensError(f"{source}: {name} has values that are not finite.")
        target.copy_(tensors[name])


def _public(coder: Coder, name: str) -> str:
    """`W_enc.0` → `W_enc` where there is one group."""
    return name.removesuffix(".0") if len(coder.wiring.groups) == 1 else name

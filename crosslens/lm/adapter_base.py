"""Is an adapter for the model that it is put on? Shapes cannot say."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from crosslens.errors import CrosslensError, UsageError

_log = logging.getLogger(__name__)

RECORD = "organism.json"
"""What `crosslens organism` leaves beside an adapter; its `base` says what model it is for."""
_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model beneath an adapter."""

    path: str
    revision: str | None
    weights: str | None
    """`weights_hash` of it without the adapter."""


def weights_hash(module: nn.Module) -> str | None:
    """SHA-256 over the names, the shapes and 16 values of each weight, rounded to bfloat16: the
    same for one model held in float32 and in bfloat16. None in float16, which rounds otherwise."""
    told = hashlib.sha256()
    for name, weight in module.named_parameters():
        if weight.dtype == torch.float16:
            return None
        at = torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64).long()
        values = weight.detach().flatten()[at.to(weight.device)].bfloat16().float().tolist()
        told.update(f"{name} {list(weight.shape)} {values}\n".encode())
    return f"sha256:{told.hexdigest()}"


def check_base(adapter: str, folder: Path, found: Base) -> None:
    """Refuse an adapter that is known to be for other weights; tell of one that may be.

    Known by the hashes in the record of an organism. Where there are none to compare, the names of
    the two models are; other names may mean the same model, so that is only said.

    Raises:
        UsageError: it is for another model.
        CrosslensError: the record is damaged.
    """
    made_for = _made_for(folder)
    name = made_for.get("path")
    both = _comparable(made_for, found)
    if both is None:
        _tell_of_names(adapter, name, found.path)
    elif both[0] != both[1]:
        raise UsageError(
            f"The adapter {adapter} was made for the model {name!r}, and {found.path!r} has other "
            f"weights ({both[1][:15]}…, not {both[0][:15]}…), if of the same shapes: what it would "
            "do there is not what it was made and measured to do. Open it on the model that it was "
            "made for, or make one for this one (`crosslens organism --help`)."
        )


def _comparable(made_for: Mapping[str, object], found: Base) -> tuple[str, str] | None:
    """The first hash that both have: of the weights, else of the file. A hub's commit is none:
    another one may hold the same weights."""
    for one, other in ((made_for.get(key), getattr(found, key)) for key in ("weights", "revision")):
        if str(one).startswith("sha256:") and str(other).startswith("sha256:"):
            return str(one), str(other)
    return None


def _tell_of_names(adapter: str, name: object, path: str) -> None:
    if isinstance(name, str) and name and PurePath(name).name != PurePath(path).name:
        _log.warning(
            "The adapter %s names %r as its base model, and is put on %r: if that is another model "
            "and not the same one by another name, what it does there means nothing.",
            adapter,
            name,
            path,
        )


def _made_for(folder: Path) -> dict[str, Any]:
    """The base model's identity as far as the adapter's folder has it; at least `path`."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    named = {"path": settings.get("base_model_name_or_path")}
    record = folder / RECORD
    if not record.is_file():
        return named
    try:
        return named | dict(json.loads(record.read_text(encoding="utf-8"))["base"])
    except (ValueError, KeyError, TypeError) as error:
        raise CrosslensError(f"{record} is damaged: {error!r}.") from error

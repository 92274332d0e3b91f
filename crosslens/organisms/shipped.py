"""The organisms that come with the package."""

from __future__ import annotations

from typing import Any

from crosslens.lm.adapter import built_in_adapters
from crosslens.lm.adapter_base import RECORD
from crosslens.storage import load_json


def shipped() -> dict[str, dict[str, Any]]:
    """Name -> what its organism.json says, and the adapter's size in bytes as `bytes`.

    Each opens with `ModelSpec(path="smollm2", adapter=NAME)`.
    """
    return {
        name: load_json(folder / RECORD)
        | {"bytes": (folder / "adapter_model.safetensors").stat().st_size}
        for name, folder in built_in_adapters().items()
    }

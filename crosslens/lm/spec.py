"""Which language model to open, and how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Where a language model comes from and the form it is held in."""

    path: str = "smollm2"
    """Built-in name (`smollm2`), Hugging Face hub id, local folder, or `.gguf` file."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None takes the newest."""
    adapter: str | None = None
    """PEFT adapter put on top, unmerged: a folder or a hub id."""
    dtype: str = "bfloat16"
    """Number format of weights and activations: float32, bfloat16 or float16."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

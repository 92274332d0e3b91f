"""Who reads a model's activations in benchmarks/harvest.py. One step is one chunk of tokens.

Everybody is given the same tokens, the same weights from a local folder, and the same sites, and
goes no deeper than the deepest of them. Nothing of crosslens is imported where peers run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is harvested."""

    folder: Path
    model: str
    """Folder of the model."""
    sites: tuple[str, ...]
    layers: int
    """Layers that the deepest site needs."""
    blocks: int
    """Blocks of a chunk."""

    @classmethod
    def read(cls, folder: str | None) -> Job:
        assert folder is not None
        plain = json.loads(Path(folder, "job.json").read_text())
        return cls(**{**plain, "folder": Path(folder), "sites": tuple(plain["sites"])})

    def tokens(self) -> Tensor:
        """All blocks [N, T], int64."""
        from safetensors.torch import load_file

        return load_file(self.folder / "tokens.safetensors")["tokens"].long()

    def chunks(self) -> Iterator[Tensor]:
        """Chunk after chunk [B, T], over and over."""
        chunks = self.tokens().split(self.blocks)
        while True:
            yield from chunks

    def note_norms(self, who: str, found: dict[str, Any]) -> None:
        """Leave the mean norm of the first chunk at each site, to see that all read the same."""
        norms = {site: float(x.float().norm(dim=-1).mean()) for site, x in found.items()}
        (self.folder / f"norms-{who}.json").write_text(json.dumps(norms))

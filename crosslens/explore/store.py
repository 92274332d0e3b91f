"""What is known of every latent of a coder, in memory and on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from crosslens.config import from_plain, to_plain
from crosslens.errors import CrosslensError, UsageError
from crosslens.explore.codes import Floats, Ints
from crosslens.explore.examples import ExamplePlan, ExampleTable
from crosslens.explore.logits import LogitTable
from crosslens.explore.statistics import Statistics
from crosslens.storage import load_json, load_tensors, replace_folder, save_json, save_tensors
from crosslens.text import Blocks, Vocabulary

SCHEMA = 1
Table = TypeVar("Table", Statistics, ExampleTable)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`: where the arrays come from."""

    schema: int = SCHEMA
    coder: str
    """SHA-256 of the coder's weights."""
    tokens: int
    """Tokens that count: what densities are shares of."""
    sites: tuple[str, ...]
    """Sites written, in the order of the norms."""
    logit_site: str | None
    plan: ExamplePlan
    provenance: dict[str, Any] = field(default_factory=dict)
    """Whatever the caller knows: step, seed, fingerprint of the text, versions."""


@dataclass(frozen=True)
class Example:
    """One activation of a latent and the tokens around it."""

    block: int
    position: int
    document: str
    section: int
    """0: one of the strongest; n: drawn from the n-th interval of activation, 1 the strongest."""
    value: float
    repeats: int
    token_ids: tuple[int, ...]
    activations: tuple[float, ...]
    """Of this latent on each of `token_ids`; 0 where the policy does not count the token."""
    peak: int
    """Which of `token_ids` the example is about."""


@dataclass(frozen=True)
class LatentStore:
    """Statistics, decoder norms, examples and direct logits of all latents of a coder."""

    manifest: Manifest
    statistics: Statistics
    norm_LP: Floats
    """‖decoder‖ per site written, in the scaled units in which sites compare."""
    examples: ExampleTable
    logits: LogitTable | None
    """None when the coder writes nothing on the residual stream."""
    blocks: Blocks
    vocabulary: Vocabulary

    @property
    def n_latents(self) -> int:
        """Latents of the coder, dead ones too."""
        return len(self.statistics.count_L)

    @property
    def density_L(self) -> Floats:
        """Share of counted tokens on which each latent is active."""
        return (self.statistics.count_L / self.manifest.tokens).astype(np.float32)

    @property
    def alive_L(self) -> Ints:
        """Numbers of the latents that are active somewhere."""
        return np.flatnonzero(self.statistics.count_L).astype(np.int32)

    def examples_of(self, latent: int) -> Iterator[Example]:
        """The latent's examples: the strongest, then those of each interval."""
        table = self.examples
        for index in range(int(table.start_L[latent]), int(table.start_L[latent + 1])):
            yield self._example(latent, index)

    def check_latent(self, latent: int) -> None:
        """Refuse a number that no latent has."""
        if not 0 <= latent < self.n_latents:
            raise UsageError(
                f"There is no latent {latent}: the coder has {self.n_latents}, numbered 0 to "
                f"{self.n_latents - 1}."
            )

    def window_of(self, index: int) -> tuple[int, int]:
        """First and last row (exclusive) of the window of example `index`, within its block."""
        plan, length = self.manifest.plan, self.blocks.tokens_NT.shape[1]
        row = int(self.examples.row_C[index])
        first = row - row % length
        return max(first, row - plan.before), min(first + length, row + plan.after + 1)

    def _example(self, latent: int, index: int) -> Example:
        plan, table = self.manifest.plan, self.examples
        row = int(table.row_C[index])
        start, end = self.window_of(index)
        block, position = divmod(row, self.blocks.tokens_NT.shape[1])
        document = int(self.blocks.docs_NT[block, position])
        shift = start - (row - plan.before)
        share_W = table.window_CW[index, shift : shift + end - start].astype(np.float64)
        return Example(
            block=block,
            position=position,
            document=self.blocks.documents[document] if document >= 0 else "",
            section=int(table.section_C[index]),
            value=float(table.value_C[index]),
            repeats=int(table.repeats_C[index]),
            token_ids=tuple(self.blocks.tokens_NT.flatten()[start:end].tolist()),
            activations=tuple((share_W * float(self.statistics.max_L[latent])).tolist()),
            peak=row - start,
        )

    def save(self, folder: Path) -> None:
        """Write the store to `folder` in one piece; one that is there is replaced."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            temporary.chmod(0o755)
            save_tensors(temporary / "latents.safetensors", self._tensors())
            self.blocks.save(temporary, "text")
            save_json(temporary / "vocabulary.json", self.vocabulary.to_plain())
            save_json(temporary / "manifest.json", to_plain(self.manifest))
            replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> LatentStore:
        """Read what `save` wrote.

        Raises:
            CrosslensError: there is no store, it is damaged, or of another version.
        """
        manifest = load_manifest(folder)
        tensors = load_tensors(folder / "latents.safetensors")
        try:
            return cls(
                manifest,
                _table(Statistics, tensors),
                tensors["norm_LP"].numpy(),
                _table(ExampleTable, tensors),
                _logits(manifest, tensors),
                Blocks.load(folder, "text"),
                Vocabulary.from_plain(load_json(folder / "vocabulary.json")),
            )
        except KeyError as error:
            raise CrosslensError(
                f"{folder / 'latents.safetensors'} lacks {error}: gather again with --refresh."
            ) from error

    def _tensors(self) -> dict[str, Tensor]:
        arrays = {"norm_LP": self.norm_LP}
        for table in (self.statistics, self.examples, self.logits):
            if table is not None:
                found = {f.name: getattr(table, f.name) for f in fields(table)}
                arrays.update({k: v for k, v in found.items() if isinstance(v, np.ndarray)})
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def load_manifest(folder: Path) -> Manifest:
    """`manifest.json` alone; another schema is refused."""
    path = folder / "manifest.json"
    plain = load_json(path)
    found = plain.get("schema") if isinstance(plain, dict) else None
    if found != SCHEMA:
        raise CrosslensError(
            f"{path} has schema {found!r}, and this crosslens reads {SCHEMA}: gather again with "
            "--refresh."
        )
    return from_plain(Manifest, plain, str(path))


def _table(kind: type[Table], tensors: dict[str, Tensor]) -> Table:
    return kind(**{f.name: tensors[f.name].numpy() for f in fields(kind)})


def _logits(manifest: Manifest, tensors: dict[str, Tensor]) -> LogitTable | None:
    if manifest.logit_site is None:
        return None
    return LogitTable(
        site=manifest.logit_site,
        top_id_LK=tensors["top_id_LK"].numpy(),
        top_LK=tensors["top_LK"].numpy(),
        bottom_id_LK=tensors["bottom_id_LK"].numpy(),
        bottom_LK=tensors["bottom_LK"].numpy(),
    )

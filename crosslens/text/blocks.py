"""Blocks of tokens: packed, saved, read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int32
from torch import Tensor

from crosslens import storage
from crosslens.errors import CrosslensError


@dataclass(frozen=True)
class Blocks:
    """N blocks of T positions, and where each position comes from."""

    tokens_NT: Int32[Tensor, "n t"]
    docs_NT: Int32[Tensor, "n t"]
    """Index into `documents`; -1 at BOS and at padding. A separator belongs to its document."""
    documents: tuple[str, ...]
    """Where each document is from: "stdlib/json/decoder.py", "data.jsonl:17"."""
    bos_id: int | None
    """The token each block begins with; None: blocks begin with text."""
    pad_id: int
    special_ids: tuple[int, ...]

    @property
    def bos_NT(self) -> Bool[Tensor, "n t"]:
        """True at a first position that packing put there, not wherever the same id occurs."""
        mask_NT = torch.zeros_like(self.tokens_NT, dtype=torch.bool)
        mask_NT[:, :1] = self.bos_id is not None
        return mask_NT

    @property
    def padding_NT(self) -> Bool[Tensor, "n t"]:
        """True at padding, and not at a real token of the same id (often EOS)."""
        return (self.docs_NT < 0) & ~self.bos_NT

    @property
    def special_NT(self) -> Bool[Tensor, "n t"]:
        """True at every special token's id: BOS, separators, chat turns, most padding."""
        return torch.isin(self.tokens_NT, torch.tensor(self.special_ids, dtype=torch.int32))

    def fingerprint(self) -> str:
        """SHA-256 over tokens, document indices, documents and the stored ids."""
        facts = [list(self.tokens_NT.shape), self.documents, *self._ids().values()]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for tensor in (self.tokens_NT, self.docs_NT):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, name: str) -> None:
        """Write `name`.safetensors, then `name`.json, each atomically."""
        tensors = {"tokens": self.tokens_NT, "docs": self.docs_NT}
        storage.save_tensors(folder / f"{name}.safetensors", tensors)
        facts = {"format": 1, "fingerprint": self.fingerprint(), **self._ids()}
        storage.save_json(folder / f"{name}.json", {**facts, "documents": self.documents})

    @classmethod
    def load(cls, folder: Path, name: str) -> Blocks:
        """Read back what `save` wrote; anything else is a CrosslensError."""
        tensors = storage.load_tensors(folder / f"{name}.safetensors")
        facts = storage.load_json(folder / f"{name}.json")
        try:
            blocks = cls(
                tokens_NT=tensors["tokens"],
                docs_NT=tensors["docs"],
                documents=tuple(facts["documents"]),
                bos_id=facts["bos_id"],
                pad_id=facts["pad_id"],
                special_ids=tuple(facts["special_ids"]),
            )
            whole = blocks.fingerprint() == facts["fingerprint"]
        except (KeyError, TypeError) as error:
            raise CrosslensError(f"{folder / name}.json is not a description of blocks.") from error
        if not whole:
            raise CrosslensError(
                f"{folder / name}.safetensors and .json do not belong together: one of them is "
                "damaged or from another run. Build the blocks again."
            )
        return blocks

    def _ids(self) -> dict[str, object]:
        return {"bos_id": self.bos_id, "pad_id": self.pad_id, "special_ids": self.special_ids}


def fingerprint(blocks: Iterable[Blocks]) -> str:
    """SHA-256 over the fingerprints of several."""
    return hashlib.sha256(" ".join(each.fingerprint() for each in blocks).encode()).hexdigest()

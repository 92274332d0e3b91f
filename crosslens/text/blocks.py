"""Blocks of tokens: packed, saved, read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor
from torch.nn import functional as F

from crosslens import storage
from crosslens.errors import CrosslensError


@dataclass(frozen=True)
class Other:
    """The text of some blocks as another model's tokenizer cuts it, S positions a block, and the
    tokens after which both tokenizers cut."""

    tokens_NS: Int32[Tensor, "n s"]
    docs_NS: Int32[Tensor, "n s"]
    """As `Blocks.docs_NT`."""
    place_NT: Int32[Tensor, "n t"]
    """For each position of the blocks: if a window of common text ends with its token, the position
    of the last token of that window here; else -1."""
    open_N: Int32[Tensor, " n"]
    """Windows of each block that had not closed when their text ended."""
    bos_id: int | None
    pad_id: int
    special_ids: tuple[int, ...]


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
    others: Mapping[str, Other] = field(default_factory=dict)
    """The same text for models with a tokenizer of their own, by their names."""

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

    @property
    def paired_NT(self) -> Bool[Tensor, "n t"]:
        """True where every model has a token that ends there; everywhere if all share one
        tokenizer."""
        mask_NT = torch.ones_like(self.tokens_NT, dtype=torch.bool)
        for other in self.others.values():
            mask_NT &= other.place_NT >= 0
        return mask_NT

    def of(self, model: str) -> Blocks:
        """The blocks that a model reads: its own, or these."""
        if model not in self.others:
            return self
        own = self.others[model]
        ids = own.bos_id, own.pad_id, own.special_ids
        return Blocks(own.tokens_NS, own.docs_NS, self.documents, *ids)

    def places(
        self, model: str, block_R: Int64[Tensor, " r"], position_R: Int64[Tensor, " r"]
    ) -> Int64[Tensor, " r"]:
        """Where in the blocks of `model` the tokens are that end with those at these positions."""
        if model not in self.others:
            return position_R
        return self.others[model].place_NT[block_R, position_R].long()

    def some(self, at: slice) -> Blocks:
        """A range of the blocks."""
        others = {name: _some(other, at) for name, other in self.others.items()}
        return replace(self, tokens_NT=self.tokens_NT[at], docs_NT=self.docs_NT[at], others=others)

    def followed_by(self, more: Blocks) -> Blocks:
        """These blocks, then `more` of the same kind, from documents of their own."""
        shift = len(self.documents)
        others = {
            name: _stacked(one, more.others[name], shift) for name, one in self.others.items()
        }
        return replace(
            self,
            tokens_NT=torch.cat([self.tokens_NT, more.tokens_NT]),
            docs_NT=torch.cat([self.docs_NT, _shifted(more.docs_NT, shift)]),
            documents=(*self.documents, *more.documents),
            others=others,
        )

    def fingerprint(self) -> str:
        """SHA-256 over tokens, document indices, documents and the stored ids."""
        facts = [list(self.tokens_NT.shape), self.documents, *_ids(self).values()]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for tensor in (self.tokens_NT, self.docs_NT):
            digest.update(tensor.contiguous().numpy().tobytes())
        for name, other in self.others.items():
            own = [name, list(other.tokens_NS.shape), *_ids(other).values()]
            digest.update(json.dumps(own).encode())
            for tensor in _tensors(other).values():
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, name: str) -> None:
        """Write `name`.safetensors, then `name`.json, each atomically."""
        tensors = {"tokens": self.tokens_NT, "docs": self.docs_NT}
        for model, other in self.others.items():
            tensors |= {f"{model}/{key}": tensor for key, tensor in _tensors(other).items()}
        storage.save_tensors(folder / f"{name}.safetensors", tensors)
        facts = {"format": 1, "fingerprint": self.fingerprint(), **_ids(self)}
        if self.others:
            facts["others"] = {model: _ids(other) for model, other in self.others.items()}
        storage.save_json(folder / f"{name}.json", {**facts, "documents": self.documents})

    @classmethod
    def load(cls, folder: Path, name: str) -> Blocks:
        """Read back what `save` wrote; anything else is a CrosslensError."""
        tensors = storage.load_tensors(folder / f"{name}.safetensors")
        facts = storage.load_json(folder / f"{name}.json")
        try:
            others = facts.get("others", {}).items()
            blocks = cls(
                tokens_NT=tensors["tokens"],
                docs_NT=tensors["docs"],
                documents=tuple(facts["documents"]),
                **_read_ids(facts),
                others={model: _read_other(model, ids, tensors) for model, ids in others},
            )
            whole = blocks.fingerprint() == facts["fingerprint"]
        except (AttributeError, KeyError, TypeError) as error:
            raise CrosslensError(f"{folder / name}.json is not a description of blocks.") from error
        if not whole:
            raise CrosslensError(
                f"{folder / name}.safetensors and .json do not belong together: one of them is "
                "damaged or from another run. Build the blocks again."
            )
        return blocks


def fingerprint(blocks: Iterable[Blocks]) -> str:
    """SHA-256 over the fingerprints of several."""
    return hashlib.sha256(" ".join(each.fingerprint() for each in blocks).encode()).hexdigest()


def _ids(part: Blocks | Other) -> dict[str, Any]:
    return {"bos_id": part.bos_id, "pad_id": part.pad_id, "special_ids": part.special_ids}


def _read_ids(facts: Mapping[str, Any]) -> dict[str, Any]:
    ids = {"bos_id": facts["bos_id"], "pad_id": facts["pad_id"]}
    return ids | {"special_ids": tuple(facts["special_ids"])}


def _tensors(other: Other) -> dict[str, Tensor]:
    return {
        "tokens": other.tokens_NS,
        "docs": other.docs_NS,
        "place": other.place_NT,
        "open": other.open_N,
    }


def _read_other(model: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Other:
    return Other(
        tokens_NS=tensors[f"{model}/tokens"],
        docs_NS=tensors[f"{model}/docs"],
        place_NT=tensors[f"{model}/place"],
        open_N=tensors[f"{model}/open"],
        **_read_ids(facts),
    )


def _some(other: Other, at: slice) -> Other:
    return replace(
        other,
        tokens_NS=other.tokens_NS[at],
        docs_NS=other.docs_NS[at],
        place_NT=other.place_NT[at],
        open_N=other.open_N[at],
    )


def _stacked(one: Other, more: Other, shift: int) -> Other:
    """Blocks of unequal length, the shorter ones filled up with padding."""
    length = max(one.tokens_NS.shape[1], more.tokens_NS.shape[1])

    def both(a_NS: Tensor, b_NS: Tensor, filler: int) -> Tensor:
        return torch.cat(
            [F.pad(x_NS, (0, length - x_NS.shape[1]), value=filler) for x_NS in (a_NS, b_NS)]
        )

    return replace(
        one,
        tokens_NS=both(one.tokens_NS, more.tokens_NS, one.pad_id),
        docs_NS=both(one.docs_NS, _shifted(more.docs_NS, shift), -1),
        place_NT=torch.cat([one.place_NT, more.place_NT]),
        open_N=torch.cat([one.open_N, more.open_N]),
    )


def _shifted(docs_NT: Tensor, shift: int) -> Tensor:
    return torch.where(docs_NT < 0, docs_NT, docs_NT + shift)

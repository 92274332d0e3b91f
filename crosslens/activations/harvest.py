"""Run the models over token blocks and hand out the activations that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from crosslens.activations.policy import Counts, TokenPolicy, token_mask, within_norms
from crosslens.coder import Layout
from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import LanguageModel, split_site, tokenizer_hash
from crosslens.text import Blocks


def site_layout(models: Mapping[str, LanguageModel], patterns: Sequence[str]) -> Layout:
    """The layout of all sites that match `patterns`, model by model, in order of depth.

    With one model a site has its plain name; with several, its model's name in front. A pattern
    that names no model applies to each of them.
    """
    _check_same_tokens(models)
    sites: list[str] = []
    widths: list[int] = []
    for name, model in models.items():
        wanted = [_plain(p, name, models) for p in patterns]
        for site in model.resolve([p for p in wanted if p is not None]):
            sites.append(site if len(models) == 1 else f"{name}/{site}")
            widths.append(model.width(site))
    return Layout(tuple(sites), tuple(widths))


def _plain(pattern: str, name: str, models: Mapping[str, LanguageModel]) -> str | None:
    model, site = split_site(pattern)
    if model is not None and model not in models:
        raise UsageError(
            f"The site {pattern!r} names the model {model!r}; the models are {', '.join(models)}."
        )
    return site if model in (None, name) else None


def _check_same_tokens(models: Mapping[str, LanguageModel]) -> None:
    hashes = {name: tokenizer_hash(model.tokenizer) for name, model in models.items()}
    if len(set(hashes.values())) > 1:
        told = ", ".join(f"{name} {digest[:8]}" for name, digest in hashes.items())
        raise UsageError(
            f"The models {' and '.join(models)} have different tokenizers ({told}), so their "
            "rows would not come from the same tokens. Pair models that share a tokenizer."
        )


@dataclass(frozen=True)
class Chunk:
    """The rows of some blocks that count: site by site [R, D], and where each comes from."""

    sites: tuple[Tensor, ...]
    row_R: Tensor
    """block · T + position, int64."""
    counts: Counts

    def rows(self) -> Tensor:
        """All sites side by side [R, X]."""
        return torch.cat(self.sites, -1)


@dataclass(frozen=True)
class Source:
    """Activations of `blocks` at the sites of `layout`, chunk by chunk, always in the same chunks:
    harvesting a chunk again gives the same numbers."""

    models: Mapping[str, LanguageModel]
    layout: Layout
    blocks: Blocks
    policy: TokenPolicy
    median_P: Tensor | None = None
    """Median norm per site; outliers are kept while it is not known."""
    blocks_per_chunk: int = 8

    @property
    def n_chunks(self) -> int:
        return -(-len(self.blocks.tokens_NT) // self.blocks_per_chunk)

    @property
    def block_length(self) -> int:
        return self.blocks.tokens_NT.shape[1]

    @property
    def rows_per_chunk(self) -> int:
        """At most so many rows come from one chunk."""
        return self.blocks_per_chunk * self.block_length

    @cached_property
    def _token_mask(self) -> Tensor:
        return token_mask(self.policy, self.blocks)[0]

    @property
    def n_positions(self) -> int:
        """All positions of the blocks, also those that do not count."""
        return self.blocks.tokens_NT.numel()

    @property
    def n_rows_at_most(self) -> int:
        """Rows that the token-level policy keeps; outliers may still fall."""
        return int(self._token_mask.sum())

    def block_range(self, index: int) -> slice:
        """The blocks of chunk `index`."""
        return slice(index * self.blocks_per_chunk, (index + 1) * self.blocks_per_chunk)

    def activations(self, tokens_BT: Tensor) -> tuple[Tensor, ...]:
        """All positions of some blocks: per site [B, T, D], in each model's own format."""
        found: dict[str, Tensor] = {}
        for name, model in self.models.items():
            prefix = "" if len(self.models) == 1 else f"{name}/"
            mine = [s for s in self.layout.sites if s.startswith(prefix)]
            captured = model.capture(tokens_BT, [s.removeprefix(prefix) for s in mine])
            found.update({s: captured[s.removeprefix(prefix)] for s in mine})
        return tuple(found[s] for s in self.layout.sites)

    def keep(self, index: int, sites: Sequence[Tensor]) -> tuple[Tensor, Counts]:
        """Positions of chunk `index` that count [B, T] (bool), given their activations."""
        at = self.block_range(index)
        keep_BT = self._token_mask[at]
        _, counts = token_mask(self.policy, _some(self.blocks, at))
        norm_RP = row_norms(sites)[keep_BT.flatten()]
        self._check_finite(norm_RP, index)
        if self.median_P is None:
            return keep_BT, counts
        fine_R = within_norms(self.policy, norm_RP, self.median_P)
        keep_BT = keep_BT.clone()
        keep_BT[keep_BT.clone()] = fine_R
        return keep_BT, counts + Counts(outlier=int((~fine_R).sum()))

    def chunk(self, index: int) -> Chunk:
        """Harvest chunk `index`."""
        at = self.block_range(index)
        sites = self.activations(self.blocks.tokens_NT[at])
        keep_BT, counts = self.keep(index, sites)
        first = at.start * self.block_length
        row_R = first + keep_BT.flatten().nonzero().squeeze(-1)
        kept = tuple(site[keep_BT.to(site.device)] for site in sites)
        return Chunk(kept, row_R, counts)

    def __iter__(self) -> Iterator[Chunk]:
        return (self.chunk(i) for i in range(self.n_chunks))

    def _check_finite(self, norm_RP: Tensor, index: int) -> None:
        bad_P = ~norm_RP.isfinite().all(0)
        if bad_P.any():
            site = self.layout.sites[int(bad_P.nonzero()[0])]
            raise CrosslensError(
                f"Activations at {site} hold NaN or infinite values (blocks from "
                f"{self.block_range(index).start}). Most likely the number format overflows: "
                "set the model's dtype to bfloat16 or float32."
            )


def _some(blocks: Blocks, at: slice) -> Blocks:
    return replace(blocks, tokens_NT=blocks.tokens_NT[at], docs_NT=blocks.docs_NT[at])


def row_norms(sites: Sequence[Tensor]) -> Tensor:
    """‖x‖ of every position at every site [B·T, P], float32 on the CPU."""
    norms = [torch.linalg.vector_norm(s, dim=-1, dtype=torch.float32).flatten() for s in sites]
    return torch.stack([n.cpu() for n in norms], -1)

"""Run the models over token blocks and hand out the activations that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from crosslens.activations.batches import Batch, batches
from crosslens.activations.policy import Counts, TokenPolicy, token_mask, within_norms
from crosslens.activations.swapped import Exchange
from crosslens.coder import Layout
from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import LanguageModel, split_site, tokenizer_hash
from crosslens.text import Blocks


def site_layout(
    models: Mapping[str, LanguageModel], patterns: Sequence[str], align: bool = False
) -> Layout:
    """The layout of all sites that match `patterns`, model by model, in order of depth.

    With one model a site has its plain name; with several, its model's name in front. A pattern
    that names no model applies to each of them.

    Args:
        align: the models may have different tokenizers: their blocks are aligned.
    """
    if not align:
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
    if other_tokenizers(models):
        hashes = {name: tokenizer_hash(model.tokenizer) for name, model in models.items()}
        told = ", ".join(f"{name} {digest[:8]}" for name, digest in hashes.items())
        raise UsageError(
            f"The models {' and '.join(models)} have different tokenizers ({told}), so their "
            "rows would not come from the same tokens. Pair models that share a tokenizer, or pair "
            "tokens that end at the same place in the text: --align."
        )


def other_tokenizers(models: Mapping[str, LanguageModel]) -> dict[str, Any]:
    """The tokenizers of those models that do not cut text as the first one does, by name."""
    own = {name: tokenizer_hash(model.tokenizer) for name, model in models.items()}
    first = next(iter(own.values()), None)
    return {name: models[name].tokenizer for name, hashed in own.items() if hashed != first}


def check_aligned(models: Mapping[str, LanguageModel], blocks: Blocks) -> None:
    """Refuse blocks that one of the models would misread.

    Raises:
        CrosslensError: it cuts text otherwise than the first, and has no blocks of its own.
    """
    for name in other_tokenizers(models):
        if name not in blocks.others:
            raise CrosslensError(
                f"These blocks are not cut for the model {name}, whose tokenizer is another than "
                f"that of {next(iter(models))}. Build them with build_blocks(…, others=…)."
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
class Verdict:
    """Which of a chunk's rows count, now that their activations are known."""

    norm_RP: Tensor
    """‖x‖ of every row at every site, float32 on the CPU."""
    fine_R: Tensor
    """Rows that are no outliers (bool)."""
    counts: Counts


Receive = Callable[[int, Tensor, Tensor], None]
"""Takes (index of a site, numbers of some of the chunk's rows [r], those rows at it [r, D])."""


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
    exchange: Exchange | None = None
    """Which tokens' rows go to the other model's sites: a null, in which the models' names mean
    nothing."""

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

    @property
    def on_accelerator(self) -> bool:
        """Whether some model computes elsewhere than on the processor."""
        return any(model.device.type != "cpu" for model in self.models.values())

    def block_range(self, index: int) -> slice:
        """The blocks of chunk `index`."""
        return slice(index * self.blocks_per_chunk, (index + 1) * self.blocks_per_chunk)

    def rows_of(self, index: int) -> Tensor:
        """The rows of chunk `index` that the token alone does not rule out, as block · T +
        position, ascending, int64. Known without running a model."""
        at = self.block_range(index)
        kept_R: Tensor = self._token_mask[at].flatten().nonzero().squeeze(-1)
        return kept_R.add(at.start * self.block_length)

    def stream(self, index: int, receive: Receive) -> Verdict:
        """Harvest `rows_of(index)`, handed out site by site as the models compute them, outliers
        among them: which these are is only known when all sites are.

        Raises:
            CrosslensError: activations are not finite.
        """
        row_R = self.rows_of(index)
        if self.exchange:
            receive = self.exchange.passed_on(row_R, receive)
        norm_RP = torch.empty(len(row_R), len(self.layout.sites))
        for batch in self._batches(index):
            norms: dict[int, Tensor] = {}
            for name, model in self.models.items():
                model.read(batch.of(name).tokens_BT, self._takers(name, batch, norms, receive))
            norm_RP[batch.at_r] = _side_by_side([norms[p] for p in range(len(norms))])
        return self._judge(index, norm_RP)

    def chunk(self, index: int) -> Chunk:
        """Harvest chunk `index`."""
        row_R = self.rows_of(index)
        sites = [torch.empty(0, width) for width in self.layout.widths]

        def receive(p: int, at_r: Tensor, rows_rD: Tensor) -> None:
            if not len(sites[p]):
                sites[p] = rows_rD.new_empty(len(row_R), rows_rD.shape[-1])
            sites[p][at_r.to(sites[p].device)] = rows_rD.to(sites[p])

        verdict = self.stream(index, receive)
        fine_R = verdict.fine_R
        kept = tuple(site[fine_R.to(site.device)] for site in sites)
        return Chunk(kept, row_R[fine_R], verdict.counts)

    def __iter__(self) -> Iterator[Chunk]:
        return (self.chunk(i) for i in range(self.n_chunks))

    def keep(self, index: int, sites: Sequence[Tensor]) -> tuple[Tensor, Counts]:
        """Positions of chunk `index` that count [B, T] (bool), given all activations, per site
        [B, T, D] (at as many positions as its model has)."""
        keep_BT = self._token_mask[self.block_range(index)].clone()
        norms = []
        for site, x_BTD in zip(self.layout.sites, sites, strict=True):
            norms.append(_norms(x_BTD[self.places(index, self.model_of(site), keep_BT)]))
        verdict = self._judge(index, _side_by_side(norms))
        keep_BT[keep_BT.clone()] = verdict.fine_R
        return keep_BT, verdict.counts

    def places(self, index: int, model: str, keep_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Block of chunk `index` and position in it as `model` reads it, of each of the positions
        `keep_BT` of the first model, in their order."""
        block_R, position_R = keep_BT.nonzero(as_tuple=True)
        blocks = self.blocks.some(self.block_range(index))
        return block_R, blocks.places(model, block_R, position_R)

    def model_of(self, site: str) -> str:
        """The model that a site of the layout belongs to."""
        return split_site(site)[0] or next(iter(self.models))

    def _batches(self, index: int) -> Iterator[Batch]:
        at = self.block_range(index)
        return batches(self.blocks.some(at), self._token_mask[at])

    def _takers(
        self, name: str, batch: Batch, norms: dict[int, Tensor], receive: Receive
    ) -> dict[str, Callable[[Tensor], None]]:
        """What a model's sites are shown to: it passes on the batch's rows and notes their norms.

        The rows are the only copy that is made of what the model computed.
        """
        prefix = "" if len(self.models) == 1 else f"{name}/"

        def taker(p: int) -> Callable[[Tensor], None]:
            def take(x_BTD: Tensor) -> None:
                # index_select is several times faster on a CPU than indexing.
                at_r = batch.of(name).position_r.to(x_BTD.device)
                rows_rD = x_BTD.flatten(0, 1).index_select(0, at_r)
                norms[p] = _norms(rows_rD)
                receive(p, batch.at_r, rows_rD)

            return take

        sites = enumerate(self.layout.sites)
        return {s.removeprefix(prefix): taker(p) for p, s in sites if s.startswith(prefix)}

    def _judge(self, index: int, norm_RP: Tensor) -> Verdict:
        _, counts = token_mask(self.policy, self.blocks.some(self.block_range(index)))
        self._check_finite(norm_RP, index)
        if self.exchange:
            norm_RP = self.exchange.norms(self.rows_of(index), norm_RP)
        if self.median_P is None:
            fine_R = torch.ones(len(norm_RP), dtype=torch.bool)
        else:
            fine_R = within_norms(self.policy, norm_RP, self.median_P)
        return Verdict(norm_RP, fine_R, counts + Counts(outlier=int((~fine_R).sum())))

    def _check_finite(self, norm_RP: Tensor, index: int) -> None:
        bad_P = ~norm_RP.isfinite().all(0)
        if bad_P.any():
            site = self.layout.sites[int(bad_P.nonzero()[0])]
            raise CrosslensError(
                f"Activations at {site} hold NaN or infinite values (blocks from "
                f"{self.block_range(index).start}). Most likely the number format overflows: "
                "set the model's dtype to bfloat16 or float32."
            )


def row_norms(sites: Sequence[Tensor]) -> Tensor:
    """‖x‖ of every position at every site [B·T, P], float32 on the CPU."""
    return _side_by_side([_norms(site).flatten() for site in sites])


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return norms


def _side_by_side(norms: Sequence[Tensor]) -> Tensor:
    return torch.stack([norm.cpu() for norm in norms], -1)

"""How latents meet in attention: queries with keys in each head's scores, and where values go.

Two passes over the text. The first knows means and which pairs of latents may matter; the second
takes the scores of the same drawn queries apart, and measures the chosen pairs wherever they meet.
docs/interactions_attention.md has the definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosslens.activations import Source
from crosslens.coder import Coder
from crosslens.interactions.attention.figures import figures, pair_columns
from crosslens.interactions.attention.plan import DEFAULT, AttentionPlan
from crosslens.interactions.attention.roles import (
    Written,
    key_overlap,
    paths,
    query_overlap,
    written_after,
)
from crosslens.interactions.attention.scores import HeadSums, head_sums
from crosslens.interactions.attention.tokens import Tokens, some_blocks, text_blocks
from crosslens.interactions.attention.usage import usage_of
from crosslens.interactions.attention.view import attention_sites, heads_view
from crosslens.lm import LanguageModel
from crosslens.storage import void, write_atomic

__all__ = ["Attention", "AttentionPlan", "attention", "attention_sites"]

Report = Callable[[str, int, int, Mapping[str, float]], None]
"""Hears (stage, done, total, figures) as work goes on."""
STAGES = ("attention, first pass", "attention, second pass")


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """What was measured of every head that reads a site of the coder."""

    plan: AttentionPlan
    sums: Mapping[str, HeadSums]
    """By site."""
    written: Mapping[str, Written | None]
    """By site: the coder's next one after the heads."""

    @property
    def queries(self) -> int:
        """Drawn positions, the most of any site."""
        return max(int(sums.queries_G.sum()) for sums in self.sums.values())

    def plain(self) -> dict[str, dict[str, Any]]:
        """`{"L3.H5": {…}}` as JSON takes it; what is not known is None."""
        found: dict[str, dict[str, Any]] = {}
        for site, sums in self.sums.items():
            for head, name in enumerate(sums.usage.view.names):
                found[name] = {**figures(sums, head, self.plan), **self._roles(site, head)}
        return found

    def _roles(self, site: str, head: int) -> dict[str, Any]:
        usage, written, plan = self.sums[site].usage, self.written[site], self.plan
        told = None
        if written is not None:
            told = {"site": written.site, "top": paths(usage, head, written, plan)}
        return {
            "query_overlap": query_overlap(usage, head, plan).plain(plan.top),
            "key_overlap": key_overlap(usage, head, plan).plain(plan.top),
            "ov": told,
        }

    def columns(self) -> dict[str, Any]:
        """The measured pairs (query latent, key latent, head) as columns of one length, site after
        site, each with the strongest first."""
        parts = [pair_columns(sums) for sums in self.sums.values()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def save(self, path: Path) -> None:
        """Write the columns as a Parquet file, atomically."""
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table(self.columns())
        write_atomic(path, lambda p: void(pyarrow.parquet.write_table(table, p)))


@torch.no_grad()
def attention(
    source: Source,
    coder: Coder,
    model: LanguageModel,
    plan: AttentionPlan = DEFAULT,
    report: Report = lambda *_: None,
) -> Attention:
    """Measure the attention of `model` that reads sites of the coder.

    Args:
        source: tokens and models; its sites are the coder's. At most `plan.blocks` of its blocks
            are taken.
        report: hears how far each pass is.

    Raises:
        UsageError: the coder writes no site before an attention, an attention is of no supported
            kind, or the coder or the source is of other models.
        CrosslensError: nothing is active, no drawn query has keys, or numbers are not finite.
    """
    views = {site: heads_view(coder, model, site) for site in attention_sites(coder, model)}

    def walk(stage: str) -> Iterator[dict[str, Tokens]]:
        total = len(some_blocks(source, plan.blocks).blocks.tokens_NT)
        blocks = text_blocks(source, coder, model, views, plan)
        for done, block in enumerate(blocks, 1):
            yield block
            report(stage, done, total, {})

    usages = usage_of(walk(STAGES[0]), views, plan)
    sums = head_sums(walk(STAGES[1]), usages, plan)
    written = {site: written_after(coder, model, view) for site, view in views.items()}
    return Attention(plan=plan, sums=sums, written=written)

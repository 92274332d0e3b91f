"""Blocks of text as a layer's heads see them: every key, and the latents of those that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from crosslens.activations import Source, TokenPolicy
from crosslens.activations.harvest import Chunk, row_norms
from crosslens.activations.policy import token_mask, within_norms
from crosslens.coder import Coder, Layout, all_rows
from crosslens.errors import UsageError
from crosslens.functional.gathers import Lists, lists_of_mask, starts_of
from crosslens.interactions.attention.plan import AttentionPlan
from crosslens.interactions.attention.view import HeadsView
from crosslens.interactions.neurons.contributions import check_active, check_code, check_source
from crosslens.interactions.neurons.effective import Branch
from crosslens.kernels import bag_sum
from crosslens.lm import LanguageModel
from crosslens.lm.attention import turned

EVERYTHING = TokenPolicy(drop_bos=False, drop_padding=False, drop_special=False, outlier_norm=None)
"""Every position is a key, whether it counts or not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """A block of text at one site. Rows are its positions, from 0, all of them."""

    view: HeadsView
    number: int
    """Of the block, among those looked at."""
    counted_R: Bool[Tensor, " r"]
    """Whether the token policy keeps a position. One that it does not keep is a key like others,
    but has no latents: all of it is in the error."""
    document_R: Int64[Tensor, " r"]
    """Index into the blocks' documents, -1 for none, on the CPU."""
    lists: Lists
    """The latents active on each row."""
    value_E: Float32[Tensor, " e"]
    """How strongly (a_i > 0), per entry."""
    scalar_R: Float32[Tensor, " r"]
    """What the norm multiplies a row by; 1 where there is no norm."""
    row_RD: Float32[Tensor, "r d"]
    """What the norm was given, times that; for LayerNorm without its mean."""

    @cached_property
    def weight_E(self) -> Tensor:
        """Strength times the row's scalar, per entry."""
        return self.value_E * self.scalar_R[self.lists.items_N]

    @cached_property
    def rotation(self) -> tuple[Tensor, Tensor]:
        """Of each row, [R, F] each."""
        at_R = torch.arange(len(self.row_RD), device=self.row_RD.device)
        return self.view.heads.rotation(at_R)

    @cached_property
    def key_parts_3RJA(self) -> Tensor:
        """Keys, turned by their positions: what latents, biases and the error bring to them."""
        parts = _parts(self, self.view.key)
        parts = parts.view(3, len(self.row_RD), self.view.heads.n_groups, -1)
        return self._turned(parts)

    @cached_property
    def key_RJA(self) -> Tensor:
        """Keys, turned by their positions."""
        return self.key_parts_3RJA.sum(0)

    @cached_property
    def entry_keys_JEA(self) -> Tensor:
        """What each entry brings to its row's key, turned."""
        key_EJA = self.view.key_LJA[self.lists.index_N.long()] * self.weight_E[:, None, None]
        cos_EF, sin_EF = (x[self.lists.items_N, None] for x in self.rotation)
        return turned(key_EJA, cos_EF, sin_EF).transpose(0, 1).contiguous()

    def turned_keys(self, key_JA: Tensor) -> Tensor:
        """One key at every position [R, J, A]."""
        return self._turned(key_JA.expand(len(self.row_RD), *key_JA.shape))

    def _turned(self, x_RJA: Tensor) -> Tensor:
        cos_RF, sin_RF = self.rotation
        return turned(x_RJA, cos_RF[:, None], sin_RF[:, None])


def _parts(tokens: Tokens, branch: Branch) -> Tensor:
    """What latents, biases and the error bring to each row of a branch [3, R, N]. The error is what
    is left of the whole, so that the three are the model's own."""
    latents = bag_sum(tokens.lists, tokens.weight_E, branch.E_LN)
    always = tokens.scalar_R[:, None] * branch.moving_N + branch.fixed_N
    whole = tokens.row_RD @ branch.through_DN + branch.fixed_N
    return torch.stack([latents, always, whole - latents - always])


@torch.no_grad()
def text_blocks(
    source: Source,
    coder: Coder,
    model: LanguageModel,
    views: Mapping[str, HeadsView],
    plan: AttentionPlan,
) -> Iterator[dict[str, Tokens]]:
    """One pass of the models, and of the coder with its stored threshold, over `plan.blocks` blocks
    of the source; each block once, at all sites.

    Raises:
        UsageError: the source does not have the coder's sites, not this model, or pairs tokens of
            two tokenizers.
        CrosslensError: activations or codes are not finite, strengths are negative, or no latent is
            active on any token.
    """
    check_source(source, coder, model)
    if source.blocks.others:
        raise UsageError(
            "The source pairs tokens of two tokenizers and leaves out those without a partner, so "
            "the keys that attention weighs are not all there. Use the text of one model."
        )
    coder.eval()
    source = some_blocks(source, plan.blocks)
    keep_N = token_mask(source.policy, source.blocks)[0].flatten()
    wide, n_own = _widened(source, views), len(source.layout.sites)
    tokens = entries = 0
    for chunk in wide:
        counted_R = keep_N[chunk.row_R]
        if source.median_P is not None:
            norm_RP = row_norms(chunk.sites[:n_own])
            counted_R = counted_R & within_norms(source.policy, norm_RP, source.median_P)
        found = _coded(coder, chunk, n_own, counted_R)
        tokens, entries = tokens + int(counted_R.sum()), entries + len(found.value_E)
        yield from _by_block(wide, chunk, found, views)
    check_active(tokens, entries)


def some_blocks(source: Source, most: int) -> Source:
    """At most so many of the source's blocks, evenly spaced."""
    step = max(1, len(source.blocks.tokens_NT) // most)
    return replace(source, blocks=source.blocks.some(slice(0, step * most, step)))


def _widened(source: Source, views: Mapping[str, HeadsView]) -> Source:
    """The source with what else must be seen, and every position."""
    layout = source.layout
    extra = {view.input_site: len(view.bias_D) for view in views.values()}
    extra = {site: width for site, width in extra.items() if site not in layout.sites}
    wide = Layout((*layout.sites, *extra), (*layout.widths, *extra.values()))
    return replace(source, layout=wide, policy=EVERYTHING, median_P=None)


@dataclass(frozen=True, eq=False)
class _Coded:
    """The code of a chunk's rows, with no entries on those that do not count."""

    counted_R: Tensor
    lists: Lists
    value_E: Tensor


def _coded(coder: Coder, chunk: Chunk, n_own: int, counted_R: Tensor) -> _Coded:
    device = coder.b_dec.device
    own_RX = torch.cat(chunk.sites[:n_own], -1)
    own_RX = own_RX[counted_R.to(own_RX.device)].to(device)
    z_RL = coder.encode(all_rows(coder.wiring, own_RX).x_BX).float()
    check_code(z_RL)
    active_RL = z_RL > 0
    lists = lists_of_mask(active_RL)
    counted_R = counted_R.to(device)
    counts_R = torch.zeros(len(counted_R), dtype=torch.int64, device=device)
    counts_R[counted_R] = lists.counts_I
    return _Coded(counted_R, Lists(starts_of(counts_R), lists.index_N), z_RL[active_RL])


def _by_block(
    source: Source, chunk: Chunk, code: _Coded, views: Mapping[str, HeadsView]
) -> Iterator[dict[str, Tokens]]:
    length = source.block_length
    inputs = dict(zip(source.layout.sites, chunk.sites, strict=True))
    documents_N = source.blocks.docs_NT.flatten().long()
    for start in range(0, len(chunk.row_R), length):
        rows = slice(start, start + length)
        first, last = code.lists.starts_I[[start, start + length]].tolist()
        lists = Lists(
            code.lists.starts_I[start : start + length + 1] - first, code.lists.index_N[first:last]
        )
        found = {}
        for site, view in views.items():
            scalar_R, row_RD = _normed(view, inputs[view.input_site][rows])
            found[site] = Tokens(
                view=view,
                number=int(chunk.row_R[start]) // length,
                counted_R=code.counted_R[rows],
                document_R=documents_N[chunk.row_R[rows]],
                lists=lists,
                value_E=code.value_E[first:last],
                scalar_R=scalar_R,
                row_RD=row_RD,
            )
        yield found


def _normed(view: HeadsView, input_RD: Tensor) -> tuple[Tensor, Tensor]:
    """The norm's scalar of each row, and the rows times it."""
    input_RD = input_RD.to(view.bias_D.device).float()
    if view.norm is None:
        return torch.ones_like(input_RD[:, 0]), input_RD
    scalar_R = view.norm.scalar(input_RD)
    return scalar_R, view.norm.centred(input_RD) * scalar_R[:, None]

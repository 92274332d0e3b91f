"""What latents, biases and the coder's error contribute to every neuron's pre-activation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from crosslens.activations import Source
from crosslens.coder import Coder, Layout, all_rows
from crosslens.errors import CrosslensError, UsageError
from crosslens.functional.gathers import Lists, lists_of_mask
from crosslens.interactions.neurons.effective import Branch, Effective, effective, mlp_sites
from crosslens.kernels import bag_sum
from crosslens.lm import LanguageModel

__all__ = ["Branch", "Effective", "SiteChunk", "effective", "mlp_sites", "site_chunks"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteChunk:
    """Some tokens at one site: all that goes into its neurons. For each branch,
    Σ over entries of weight · E + constant + error is the model's own pre-activation."""

    effective: Effective
    row_R: Int64[Tensor, " r"]
    """block · T + position, on the CPU."""
    document_R: Int64[Tensor, " r"]
    """Index into the blocks' documents, -1 for none, on the CPU."""
    lists: Lists
    """The latents active on each row."""
    value_E: Float32[Tensor, " e"]
    """How strongly (a_i > 0), per entry."""
    scalar_R: Float32[Tensor, " r"]
    """What the norm multiplies a row by; 1 where there is no norm."""
    input_RD: Float32[Tensor, "r d"]
    """What the norm (without one, the MLP) was given; for LayerNorm without its mean."""
    missed_RD: Float32[Tensor, "r d"]
    """What of it the coder does not write."""

    @cached_property
    def weight_E(self) -> Tensor:
        """Strength times the row's scalar, per entry."""
        return self.value_E * self.scalar_R[self.lists.items_N]

    def constant(self, branch: Branch, rows: slice | Tensor = slice(None)) -> Float[Tensor, "r n"]:
        """What the biases contribute to a branch on some of the rows."""
        return self.scalar_R[rows, None] * branch.moving_N + branch.fixed_N

    def error(self, branch: Branch, rows: slice | Tensor = slice(None)) -> Float[Tensor, "r n"]:
        """What the coder's error contributes to a branch on some of the rows."""
        rows_RD = self.missed_RD[rows] * self.scalar_R[rows, None]
        return (rows_RD.to(branch.dense) @ branch.error_DN).float()

    def piece(self, rows: slice) -> SiteChunk:
        """Some consecutive tokens of it."""
        starts_R = self.lists.starts_I[rows.start : rows.stop + 1]
        first, last = int(starts_R[0]), int(starts_R[-1])
        return replace(
            self,
            row_R=self.row_R[rows],
            document_R=self.document_R[rows],
            lists=Lists(starts_R - first, self.lists.index_N[first:last]),
            value_E=self.value_E[first:last],
            scalar_R=self.scalar_R[rows],
            input_RD=self.input_RD[rows],
            missed_RD=self.missed_RD[rows],
        )


@torch.no_grad()
def site_chunks(
    source: Source, coder: Coder, model: LanguageModel, effectives: Mapping[str, Effective]
) -> Iterator[dict[str, SiteChunk]]:
    """One pass of the models, and of the coder with its stored threshold, over all blocks.

    Chunks without a token that counts are passed over.

    Raises:
        UsageError: the source does not have the coder's sites, or not this model.
        CrosslensError: activations or codes are not finite, strengths are negative, or no latent is
            active on any token.
    """
    check_source(source, coder, model)
    source, n_own = _widened(source, effectives), len(source.layout.sites)
    coder.eval()
    documents_N = source.blocks.docs_NT.flatten().long()
    tokens = entries = 0
    for chunk in source:
        if not len(chunk.row_R):
            continue
        rows = all_rows(coder.wiring, torch.cat(chunk.sites[:n_own], -1).to(coder.b_dec.device))
        z_RL = coder.encode(rows.x_BX).float()
        check_code(z_RL)
        active_RL = z_RL > 0
        tokens, entries = tokens + len(z_RL), entries + int(active_RL.sum())
        at_site = partial(
            SiteChunk,
            row_R=chunk.row_R,
            document_R=documents_N[chunk.row_R],
            lists=lists_of_mask(active_RL),
            value_E=z_RL[active_RL],
        )
        inputs = dict(zip(source.layout.sites, chunk.sites, strict=True))
        yield {
            site: _site_chunk(at_site, one, inputs[one.input_site])
            for site, one in effectives.items()
        }
    check_active(tokens, entries)


def _site_chunk(at_site: partial[SiteChunk], effective: Effective, input_RD: Tensor) -> SiteChunk:
    input_RD = input_RD.to(effective.bias_D.device).float()
    norm, lists = effective.norm, at_site.keywords["lists"]
    decoded_RD = bag_sum(lists, at_site.keywords["value_E"], effective.decoder_LD)
    return at_site(
        effective=effective,
        scalar_R=torch.ones_like(input_RD[:, 0]) if norm is None else norm.scalar(input_RD),
        input_RD=input_RD if norm is None else norm.centred(input_RD),
        missed_RD=input_RD - decoded_RD - effective.bias_D,
    )


def check_source(source: Source, coder: Coder, model: LanguageModel) -> None:
    """Refuse a source of other sites or another model, and a coder with weights that are not
    finite."""
    if coder.wiring.harvest != source.layout:
        raise UsageError(
            f"The coder's sites ({', '.join(coder.wiring.harvest.sites)}) are not the source's "
            f"({', '.join(source.layout.sites)})."
        )
    if source.exchange is not None or model not in source.models.values():
        raise UsageError(
            f"The source does not give the activations of {model.name!r} as they are, so its "
            "weights do not belong to them."
        )
    bad = [name for name, weight in coder.named_parameters() if not bool(weight.isfinite().all())]
    if bad:
        raise CrosslensError(
            f"The coder's {bad[0]} holds NaN or infinite values: its training must have diverged."
        )


def _widened(source: Source, effectives: Mapping[str, Effective]) -> Source:
    """The source with what else must be seen, whose norms make no token an outlier."""
    layout = source.layout
    extra = {one.input_site: one.bias_D.shape[0] for one in effectives.values()}
    extra = {site: width for site, width in extra.items() if site not in layout.sites}
    if not extra:
        return source
    wide = Layout((*layout.sites, *extra), (*layout.widths, *extra.values()))
    median_P = source.median_P
    if median_P is not None:
        median_P = torch.cat([median_P, median_P.new_full((len(extra),), torch.inf)])
    return replace(source, layout=wide, median_P=median_P)


def check_code(z_RL: Tensor) -> None:
    """Refuse strengths that are not finite, or negative."""
    if not bool(z_RL.isfinite().all()):
        raise CrosslensError(
            "The coder gives strengths that are NaN or infinite: its training must have diverged, "
            "or it is of other activations than these."
        )
    if bool((z_RL < 0).any()):
        raise CrosslensError(
            "This coder gives latents negative strengths; interactions are told of coders whose "
            "strengths are 0 or more."
        )


def check_active(tokens: int, entries: int) -> None:
    """Refuse a walk that has seen no token, or no latent active."""
    if not tokens:
        raise CrosslensError("The token policy keeps no token: there is nothing to look at.")
    if not entries:
        raise CrosslensError(
            f"No latent is active on any of {tokens} tokens: there are no interactions. Is the "
            "coder of other activations, or its threshold too high?"
        )

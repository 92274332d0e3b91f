"""The exact interaction of every token and neuron, in sums that do not grow with the tokens.

Contributions to a neuron are those of the active latents, of the biases together (one more latent,
always on) and of the coder's error (another one). docs/interactions_exact.md has the definitions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from crosslens.activations import Source
from crosslens.coder import Coder
from crosslens.functional.interactions import SERIES
from crosslens.interactions.neurons.contributions import (
    Effective,
    SiteChunk,
    effective,
    mlp_sites,
    site_chunks,
)
from crosslens.interactions.neurons.fused import Fused
from crosslens.interactions.neurons.inputs import (
    Additive,
    Neurons,
    Tables,
    made_of,
    neurons_of,
    slack_of,
    tables_of,
)
from crosslens.lm import LanguageModel

PRODUCTS = 1 << 22
"""Elements [rows, neurons] of each product that are computed together: 16 MiB."""
ERRORS = 1 << 24
"""The same where a kernel leaves only the error's: enough rows for many threads."""
AT_ONCE = defaultdict(lambda: 1 << 24, cpu=1 << 17)
"""Elements that the elementwise steps take together: on a processor, what its cache holds."""


@dataclass(frozen=True, eq=False)
class TokenSums:
    """Sums over neurons, each weighed by ‖w_out‖, for some tokens."""

    row_R: Int64[Tensor, " r"]
    """block · T + position."""
    interaction_R: Float32[Tensor, " r"]
    mass_R: Float32[Tensor, " r"]


Receive = Callable[[dict[str, TokenSums]], None]
"""Hears of every chunk what its tokens have, per site."""


def unheard(_found: dict[str, TokenSums]) -> None:
    """The receiver that drops everything."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteInteraction:
    """What one site's MLP does with its contributions: sums over tokens, in float64.

    Everything per neuron is weighed by ‖w_out,n‖, so that neurons may be added up.
    """

    site: str
    layer: int
    kind: str
    gated: bool
    additive: Additive
    """How each latent's own part was had; `exact` for ReLU and its square, and where a kernel takes
    it, either way."""
    tokens: int
    entries: int
    interaction_N: Float64[Tensor, " n"]
    """|Σ φ(y_i) − φ(Σ y_i)|; where gated |(Σ u_i) φ(Σ g_i) − Σ u_i φ(g_i)|."""
    mass_N: Float64[Tensor, " n"]
    """The most that contributions of these sizes could make (`functional.interactions.mass`)."""
    output_N: Float64[Tensor, " n"]
    """|whole| + |additive|."""
    of_error_N: Float64[Tensor, " n"]
    """|interaction − interaction without the error's contribution|."""
    without_error_N: Float64[Tensor, " n"]
    """|interaction without the error's contribution|."""
    mediated_N: Float64[Tensor, " n"]
    """What parts of the row do through the norm's scalar: Σ_i |ρ_i| · |y − fixed|."""
    direct_N: Float64[Tensor, " n"]
    """What they do in themselves: Σ_i |y_i| without the fixed part."""
    slack_N: Float64[Tensor, " n"]
    """By how much `interaction_N` may be wrong because of a series."""
    interaction_by_document: Float64[Tensor, " documents"]
    mass_by_document: Float64[Tensor, " documents"]

    @property
    def interaction_share(self) -> float:
        """Interaction over mass: at most 1/2, for relu2 1; where gated at most sup |φ′|, for relu2
        1."""
        return _share(self.interaction_N, self.mass_N)

    @property
    def output_share(self) -> float:
        """Interaction over |whole| + |additive|, in [0, 1]: how far off a neuron's output is that
        takes contributions one by one."""
        return _share(self.interaction_N, self.output_N)

    @property
    def error_share(self) -> float:
        """How much of the interaction involves the coder's error, in [0, 1]."""
        return _share(self.of_error_N, self.of_error_N + self.without_error_N)

    @property
    def norm_mediated_share(self) -> float:
        """How much of what a part of the row does to pre-activations goes through the norm's
        scalar, in [0, 1); 0 where there is no norm."""
        return _share(self.mediated_N, self.mediated_N + self.direct_N)

    @property
    def slack_share(self) -> float:
        """By how much `interaction_share` may be wrong."""
        return _share(self.slack_N, self.mass_N)

    @property
    def share_N(self) -> Tensor:
        """`interaction_share` of each neuron; 0 where nothing reaches it."""
        return torch.where(self.mass_N > 0, self.interaction_N / self.mass_N, 0.0)


def _share(part_N: Tensor, whole_N: Tensor) -> float:
    whole = float(whole_N.sum())
    return float(part_N.sum()) / whole if whole else 0.0


def interactions(
    source: Source,
    coder: Coder,
    model: LanguageModel,
    *,
    sites: tuple[str, ...] | None = None,
    additive: Additive = "series",
    receive: Receive = unheard,
) -> dict[str, SiteInteraction]:
    """The interactions at each site, over all tokens of the source that count.

    Args:
        sites: of `model`; all that the coder writes before an MLP where None.
        additive: how Σ φ(y_i) over the latents is had for GELU and SiLU where no kernel computes
            it, which is exact.
        receive: hears what every token has, chunk by chunk.

    Raises:
        UsageError, CrosslensError: as `effective` and `site_chunks`.
    """
    sites = mlp_sites(coder, model) if sites is None else sites
    effectives = {site: effective(coder, model, site) for site in sites}
    n_documents = len(source.blocks.documents)
    sums = {site: SiteSums(one, n_documents, additive) for site, one in effectives.items()}
    for chunks in site_chunks(source, coder, model, effectives):
        receive({site: sums[site].add(chunk) for site, chunk in chunks.items()})
    return {site: one.figures() for site, one in sums.items()}


class SiteSums:
    """Sums of one site over the chunks it is shown."""

    def __init__(
        self,
        effective: Effective,
        n_documents: int,
        additive: Additive = "series",
    ) -> None:
        """
        Args:
            additive: how each latent's own part is had, where φ is GELU or SiLU and no kernel
                computes it.
        """
        self.effective = effective
        self._fused, self._additive = Fused(effective), additive
        self._sums: dict[str, Tensor] = {}
        self._documents = torch.zeros(2, n_documents, dtype=torch.float64)
        self._tokens = self._entries = 0

    @cached_property
    def _tables(self) -> Tables:
        return tables_of(self.effective, self._additive)

    @torch.no_grad()
    def add(self, chunk: SiteChunk) -> TokenSums:
        """Take in some tokens; returns what each of them has."""
        elements = ERRORS if self._fused.takes else PRODUCTS
        together = elements // len(self.effective.out_norm_N)
        parts = [
            part
            for block in _cut(len(chunk.row_R), together)
            for part in self._parts(chunk.piece(block))
        ]
        tokens = TokenSums(chunk.row_R, *(torch.cat(each) for each in zip(*parts, strict=True)))
        known_R = chunk.document_R >= 0
        each = torch.stack([tokens.interaction_R, tokens.mass_R]).double()
        self._documents.index_add_(1, chunk.document_R[known_R], each[:, known_R])
        self._tokens += len(chunk.row_R)
        self._entries += len(chunk.value_E)
        return tokens

    def _parts(self, chunk: SiteChunk) -> Iterator[tuple[Tensor, Tensor]]:
        """What tokens have of interaction and mass, some at a time."""
        if self._fused.takes:
            sums, made_R, mass_R = self._fused.sums(chunk)
            self._add(sums)
            yield made_R, mass_R
            return
        at_once = AT_ONCE[chunk.scalar_R.device.type] // len(self.effective.out_norm_N)
        neurons = neurons_of(chunk, self._tables)
        for rows in _cut(len(neurons.through_R), at_once):
            yield self._from_products(neurons.rows(rows))

    def figures(self) -> SiteInteraction:
        """All that was taken in. At least one chunk must have been."""
        weight_N, kind = self.effective.out_norm_N.double().cpu(), self.effective.mlp.kind
        exact = self._fused.takes or kind not in SERIES
        sums = {"slack": torch.zeros_like(weight_N), **self._sums}
        return SiteInteraction(
            site=self.effective.site,
            layer=self.effective.layer,
            kind=kind,
            gated=self.effective.gate is not None,
            additive="exact" if exact else self._additive,
            tokens=self._tokens,
            entries=self._entries,
            interaction_by_document=self._documents[0].clone(),
            mass_by_document=self._documents[1].clone(),
            **{f"{name}_N": sum_N * weight_N for name, sum_N in sums.items()},
        )

    def _add(self, sums: Mapping[str, Tensor]) -> None:
        for name, sum_N in sums.items():
            self._sums[name] = sum_N.cpu().double() + self._sums.get(name, 0.0)

    def _from_products(self, neurons: Neurons) -> tuple[Tensor, Tensor]:
        """Takes in some tokens from their products; their interaction and mass, over neurons."""
        made, weight_N = made_of(self._tables.kind, neurons), self.effective.out_norm_N
        full_RN, known_RN = made.full.interaction, made.known.interaction
        of_error_RN = (full_RN - known_RN).abs_()
        full_RN, known_RN = full_RN.abs_(), known_RN.abs_()
        none_N = torch.zeros_like(weight_N)
        sums = {
            "interaction": full_RN.sum(0),
            "mass": made.mass_RN.sum(0),
            "output": made.full.whole.abs().sum(0) + made.full.additive.abs().sum(0),
            "of_error": of_error_RN.sum(0),
            "without_error": known_RN.sum(0),
            "slack": slack_of(neurons),
            "mediated": none_N.clone(),
            "direct": none_N.clone(),
        }
        for moving in made.moving:
            sums["mediated"] += neurons.through_R @ moving.total.abs()
            sums["direct"] += moving.size.sum(0)
        self._add(sums)
        return (full_RN @ weight_N).cpu(), (made.mass_RN @ weight_N).cpu()


def _cut(n: int, size: int) -> list[slice]:
    """Runs of `size`, at least 1, of the numbers below n."""
    size = max(1, size)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]

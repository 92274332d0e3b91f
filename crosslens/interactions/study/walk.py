"""Walks over the tokens: all sites of all models at once, what is cheap taken along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.activations import Source
from crosslens.coder import Coder
from crosslens.interactions.neurons.contributions import SiteChunk, site_chunks
from crosslens.interactions.neurons.effective import Effective
from crosslens.interactions.neurons.exact import SiteInteraction, SiteSums
from crosslens.lm import LanguageModel

Report = Callable[[str, int, int, Mapping[str, float]], None]
"""Hears (stage, done, total, figures) as work goes on."""
STAGES = ("pairs that meet", "pairs in context", "kinds of pairs", "changes of pairs")


class Strengths:
    """How strong each latent is where it is active, times the norm's scalar: a site's mean."""

    def __init__(self, n_latents: int) -> None:
        self._sum_L = torch.zeros(n_latents, dtype=torch.float64)
        self._count_L = torch.zeros(n_latents, dtype=torch.int64)

    def add(self, chunk: SiteChunk) -> None:
        """Take in some tokens."""
        latent_E, n = chunk.lists.index_N.long().cpu(), len(self._sum_L)
        weight_E = chunk.weight_E.double().cpu()
        self._sum_L += torch.bincount(latent_E, weights=weight_E, minlength=n)
        self._count_L += torch.bincount(latent_E, minlength=n)

    @property
    def mean_L(self) -> Float[Tensor, " l"]:
        """0 for a latent that was never active."""
        return (self._sum_L / self._count_L.clamp_min(1)).float()


class Walks:
    """Gives the chunks of all sites anew each time it is called, as `measure_pairs` wants them.

    On the first walk the exact interactions and the latents' strengths are summed as well: the
    models run for them anyway.
    """

    def __init__(
        self,
        source: Source,
        coder: Coder,
        model: LanguageModel,
        effectives: Mapping[str, Effective],
        report: Report,
    ) -> None:
        """
        Args:
            model: any of those whose sites these are: all of the source's run.
        """
        self._chunks = partial(site_chunks, source, coder, model, effectives)
        self._n_chunks, self._report, self._walked = source.n_chunks, report, 0
        n_documents, n_latents = len(source.blocks.documents), coder.wiring.n_latents
        self._sums = {site: SiteSums(one, n_documents) for site, one in effectives.items()}
        self._found: dict[str, SiteInteraction] = {}
        self._strengths = {site: Strengths(n_latents) for site in effectives}

    def __call__(self) -> Iterator[dict[str, SiteChunk]]:
        first, self._walked = self._walked == 0, self._walked + 1
        stage, done = STAGES[min(self._walked, len(STAGES)) - 1], 0
        for done, chunks in enumerate(self._chunks(), 1):
            if first:
                self._take(chunks)
            yield chunks
            self._report(stage, done, self._n_chunks, {})
        if done < self._n_chunks:  # chunks in which no token counts were passed over
            self._report(stage, self._n_chunks, self._n_chunks, {})
        if first:
            self._found = {site: one.figures() for site, one in self._sums.items()}
            self._sums = {}  # tables without a kernel: larger than all the weights they come from

    def interactions(self) -> dict[str, SiteInteraction]:
        """The exact interactions of each site; there must have been a walk."""
        return self._found

    def strengths(self) -> dict[str, Tensor]:
        """Each latent's mean strength at each site [L]."""
        return {site: one.mean_L for site, one in self._strengths.items()}

    def _take(self, chunks: Mapping[str, SiteChunk]) -> None:
        for site, chunk in chunks.items():
            self._sums[site].add(chunk)
            self._strengths[site].add(chunk)

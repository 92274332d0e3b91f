"""All figures of a coder on held-out tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from crosslens.activations import Source
from crosslens.coder import Coder
from crosslens.errors import UsageError
from crosslens.evaluation.reconstruction import Reconstruction, reconstruction
from crosslens.evaluation.splice import SpliceFigures, splice

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Reconstruction and splice figures."""

    reconstruction: Reconstruction
    splice: dict[str, SpliceFigures]

    def plain(self) -> dict[str, Any]:
        """JSON-able: `{"tokens", "l0", "l0_quantiles", "dead", "fvu", "sites", "splice"}`."""
        found = self.reconstruction
        return {
            "tokens": found.tokens,
            "l0": found.l0,
            "l0_quantiles": found.l0_quantiles,
            "dead": found.dead,
            "fvu": found.fvu,
            "sites": {site: asdict(figures) for site, figures in found.sites.items()},
            "splice": {site: asdict(figures) for site, figures in self.splice.items()},
        }


def evaluate(
    coder: Coder, source: Source, splice_tokens: int, report: Report = lambda *_: None
) -> Evaluation:
    """Reconstruction over all of the source, splicing over its first `splice_tokens` positions.

    Where two models exchange their activations there is no splicing: a reconstruction of one
    model's activations belongs in the other.

    Raises:
        UsageError: the coder and the source do not have the same sites.
    """
    if coder.wiring.harvest != source.layout:
        raise UsageError(
            f"The coder's sites ({', '.join(coder.wiring.harvest.sites)}) are not the source's "
            f"({', '.join(source.layout.sites)})."
        )
    found = reconstruction(coder, _rows(source, report))
    if splice_tokens < 1:
        return Evaluation(found, {})
    if source.exchange:
        report("no splicing: the models exchange their activations (shuffle_models)", 0, 0)
        return Evaluation(found, {})
    spliced = splice(
        coder, source, found.mean, splice_tokens, lambda done, n: report("splice", done, n)
    )
    return Evaluation(found, spliced)


def _rows(source: Source, report: Report) -> Iterator[Tensor]:
    for done, chunk in enumerate(source, 1):
        yield chunk.rows()
        report("evaluate", done, source.n_chunks)

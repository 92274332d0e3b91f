"""One pass over token blocks gathers what there is to know of all latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from crosslens.activations import Source
from crosslens.coder import Coder, coder_hash
from crosslens.explore.codes import Progress, collect
from crosslens.explore.examples import ExamplePlan, choose_examples
from crosslens.explore.logits import direct_logits
from crosslens.explore.statistics import statistics
from crosslens.explore.store import LatentStore, Manifest
from crosslens.text import Vocabulary


def quiet(done: int, total: int) -> None:
    """The progress that tells nobody."""


def gather(
    source: Source,
    coder: Coder,
    vocabulary: Vocabulary,
    *,
    plan: ExamplePlan | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = quiet,
) -> LatentStore:
    """Run the models and the coder once over the source and keep, for every latent, its
    statistics, its examples with their contexts, its decoder norms and its direct logits.

    The code is kept sparse (12 bytes per active latent and token, see `Codes`); no rows × latents
    array outlives its chunk. The same inputs give the same store.

    Args:
        vocabulary: of the tokenizer that made the source's blocks.
        provenance: JSON-able facts for the manifest.

    Raises:
        CrosslensError: no token counts, activations are not finite, or the code is not sparse.
    """
    plan = plan or ExamplePlan()
    codes = collect(source, coder, progress)
    figures = statistics(codes)
    tokens_NT = source.blocks.tokens_NT.numpy()
    examples = choose_examples(codes, figures.max_L, tokens_NT, plan)
    named = {name: m for name, m in source.models.items() if name not in source.blocks.others}
    logits = direct_logits(coder, named, len(vocabulary))  # of models with this vocabulary
    manifest = Manifest(
        coder=coder_hash(coder),
        tokens=codes.counted,
        sites=coder.wiring.write.sites,
        logit_site=logits.site if logits else None,
        plan=plan,
        provenance=dict(provenance or {}),
    )
    norm_LP = coder.decoder_norms().detach().cpu().numpy().astype(np.float32)
    return LatentStore(manifest, figures, norm_LP, examples, logits, source.blocks, vocabulary)

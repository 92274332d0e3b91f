"""A run opened to be diffed: coder, models, text, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from crosslens.activations import Source
from crosslens.coder import Coder, Transpose, load
from crosslens.device import resolve_device, resolve_dtype
from crosslens.diffing.measures import Measures, measure
from crosslens.diffing.nulls import NULLS, Null
from crosslens.diffing.pair import Pair, pair_of
from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import LanguageModel, split_site
from crosslens.text import Blocks, Corpus, TextConfig, build_blocks
from crosslens.text.planted import SOURCES
from crosslens.training import Run, TrainConfig, open_models, run_source
from crosslens.training.chat import text_tokenizer
from crosslens.training.run import first_blocks

Report = Callable[[str, int, int, Mapping[str, float]], None]
BASELINES = ("mean_difference", "pca", "token_kl", "diff_sae", "stagewise")


@dataclass(frozen=True, kw_only=True)
class DiffPlan:
    """What is compared, on how much text, beside what."""

    a: str | None = None
    """The model counted from; the first of the run."""
    b: str | None = None
    """The one that was changed; the last of the run."""
    tokens: int = 60_000
    """Held-out positions, then training ones, that the measures rest on."""
    causal_tokens: int = 8192
    """Positions on which contributions are replaced, and the clean loss is taken; 0: none."""
    planted: str | None = None
    """The behaviour planted in `b`, where its adapter does not say; `none` looks for none."""
    prompts: int = 40
    """Requests of each kind by which a planted behaviour is looked for."""
    nulls: tuple[Null, ...] = NULLS
    """Trainings that each count is told beside."""
    noop: str | None = None
    """Adapter of `a` trained on its own text; the shipped one for the built-in model."""
    baselines: tuple[str, ...] = BASELINES[:4]
    """Other ways to find what differs, judged on the same prompts."""
    seeds: tuple[Path, ...] = ()
    """Other runs of the same training, to see which latents recur."""
    seed: int = 0
    """Of resampling, of prompts and of random sets."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"--tokens must be at least 1, found {self.tokens}.")
        if self.causal_tokens < 0:
            raise UsageError(f"--causal-tokens is 0 or more, found {self.causal_tokens}.")
        if self.prompts < 1:
            raise UsageError(f"--prompts must be at least 1, found {self.prompts}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """What all parts of a diff look at."""

    run: Run
    pair: Pair
    source: Source
    """Over the text that the measures rest on."""
    plan: DiffPlan
    report: Report

    @property
    def folder(self) -> Path:
        """Where a diff leaves what it makes."""
        return self.run.folder / "diff"

    @property
    def models(self) -> Mapping[str, LanguageModel]:
        """The run's models, by name."""
        return self.source.models

    def progress(self, stage: str) -> Callable[[int, int], None]:
        """Hears how far one stage is."""
        return lambda done, total: self.report(stage, done, total, {})

    def measured(self) -> Measures:
        """One pass over the text."""
        stage = f"measure {self.run.name}"
        return measure(self.source, self.pair, start_norm(self.run), self.progress(stage))


def open_study(
    run: Run,
    plan: DiffPlan,
    report: Report,
    models: Mapping[str, LanguageModel] | None = None,
) -> Study:
    """The run's coder and models, over the text that the plan asks for.

    Raises:
        UsageError: the run's coder is not of two models.
        CrosslensError: training has not finished.
    """
    if not run.finished:
        raise CrosslensError(
            f"{run.folder} has no coder yet: training has not finished. "
            f"`crosslens resume {run.folder}` goes on."
        )
    pair = pair_of(run_coder(run), plan.a, plan.b)
    if models is None:
        report("opening the models", 0, 0, {})
        models = open_models(run.config())
    blocks, _ = first_blocks(run.blocks("heldout"), run.blocks("train"), plan.tokens)
    source = run_source(run, models, blocks)
    return Study(run=run, pair=pair, source=source, plan=plan, report=report)


def run_coder(run: Run) -> Coder:
    """A run's coder, computing in the format it was trained in."""
    fit = run.config().fit
    coder = load(run.coder_path, resolve_device(fit.device))
    coder.compute_dtype = resolve_dtype(fit.dtype)
    return coder


def start_norm(run: Run) -> float | None:
    """The norm that every decoder of the run began with at each site, if there is one."""
    init = run.config().coder.init
    return init.decoder_norm if isinstance(init, Transpose) else None


def clean_text(config: TrainConfig) -> TextConfig:
    """The run's text without the corpora that show a planted behaviour."""
    clean = {k: c for k, c in config.text.corpora.items() if c.source not in SOURCES}
    return replace(config.text, corpora=clean or {"clean": Corpus()})


def clean_blocks(study: Study) -> Blocks:
    """Held-out blocks of that text: of the same documents, on the same side."""
    config = study.run.config()
    text = clean_text(config)
    if text == config.text:
        return study.run.blocks("heldout")
    return build_blocks(text, text_tokenizer(study.models), config.seed).heldout


@torch.no_grad()
def same_weights(study: Study) -> bool:
    """Whether both models compute the same, to the bit, on the first chunk of text."""
    source, pair = study.source, study.pair
    if study.run.config().shuffle_models or not pair.same_width:
        return False
    tokens_BT = source.blocks.tokens_NT[source.block_range(0)]
    seen = []
    for name, sites in ((pair.a, pair.sites_a), (pair.b, pair.sites_b)):
        found = source.models[name].capture(tokens_BT, [split_site(site)[1] for site in sites])
        seen.append(list(found.values()))
    return all(torch.equal(x, y) for x, y in zip(*seen, strict=True))

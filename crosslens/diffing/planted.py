"""Which latents, and which other detectors, are tied to a planted behaviour and not merely to the
text that calls for it.

The same prompts are read in up to four conditions, rows being (activations of a, activations of b):

1. triggered: triggered text, (base, organism);
2. clean: clean text, (base, organism);
3. base: triggered text, (base, base), as if nothing had been planted;
4. noop: triggered text, (base, an organism trained on its own text): fine-tuned, nothing planted.

What only sees the trigger's text tells 1 from 2, but also 3 from 2. What is tied to the behaviour
tells 1 from each of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from crosslens.activations import Source, site_layout
from crosslens.coder import all_rows
from crosslens.diffing.auroc import auroc, drawn_auroc
from crosslens.diffing.intervals import Interval
from crosslens.diffing.pair import Pair
from crosslens.diffing.patching import check_same_tokens, check_source
from crosslens.diffing.prompts import PromptSets, prompt_blocks
from crosslens.diffing.resampling import draws, interval
from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import LanguageModel

TIED = 0.95
"""AUROC against each control from which on a latent counts as tied."""
TOP = 20
"""Latents, best first, that are looked at as a set."""


@dataclass(frozen=True, eq=False)
class Condition:
    """One set of prompts through one pair of models: rows at the positions that count, prompt by
    prompt."""

    source: Source
    """Its blocks are the prompts, its models those that were run."""
    rows_RX: Float[Tensor, "r x"]
    """Harvested, raw, in the models' own format, on the CPU."""
    prompt_R: Int64[Tensor, " r"]
    """Ascending."""
    position_R: Int64[Tensor, " r"]
    tokens_R: Int64[Tensor, " r"]

    @property
    def n_prompts(self) -> int:
        return len(self.source.blocks.tokens_NT)

    def by_prompt(self, value_R: Tensor) -> tuple[Tensor, ...]:
        """Values of rows [R, …], prompt by prompt."""
        counts = torch.bincount(self.prompt_R, minlength=self.n_prompts).tolist()
        return tuple(torch.split(value_R, counts))


@dataclass(frozen=True)
class Conditions:
    """What every detector of a planted behaviour is judged on."""

    triggered: Condition
    clean: Condition
    base: Condition
    noop: Condition | None

    def named(self) -> dict[str, Condition]:
        """Those there are, by name."""
        found = {"triggered": self.triggered, "clean": self.clean, "base": self.base}
        return found if self.noop is None else {**found, "noop": self.noop}


@dataclass(frozen=True, kw_only=True)
class Detection:
    """AUROC of one number per prompt, with intervals over prompts."""

    auroc: Interval
    """Triggered against clean text."""
    against_base: Interval
    """Triggered text against the same text with the base in the organism's place."""
    against_noop: Interval | None
    """The same with the no-op organism in its place."""
    base_sees: Interval
    """Triggered text with the base in both places against clean text: seeing the trigger alone."""
    noop_sees: Interval | None
    """The same with the no-op organism."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """How a ranking of latents finds a planted behaviour."""

    detection: Detection
    """By the summed strength of the best latents."""
    top: tuple[int, ...]
    """These latents, best first: 20, or all that may be among them."""
    precision_at_20: Interval
    """Share of them that are tied to the behaviour; NaN if there are none."""
    ranking_auroc: Interval
    """AUROC of the score for being tied, among latents with a score; NaN where none or all are."""
    tied_L: Bool[Tensor, " l"]
    """Latents with AUROC ≥ .95 against each control."""
    against_L: Mapping[str, Float[Tensor, " l"]]
    """Each latent's AUROC of triggered against `clean`, `base` and, if given, `noop`."""
    prompts: tuple[int, int]
    """Triggered ones and clean ones."""


def conditions(
    source: Source, pair: Pair, sets: PromptSets, noop: LanguageModel | None = None
) -> Conditions:
    """Harvest all conditions under the source's token policy.

    Positions before the trigger's last token are left out (`prompts.prompt_blocks`): nothing there
    can be due to it. So are those that the policy drops.

    Raises:
        UsageError: the models differ in shape, so that one cannot stand in the other's place.
        CrosslensError: no position of some prompt counts.
    """
    check_source(pair.coder, source)
    check_same_tokens(source)
    tokenizer = source.models[pair.b].tokenizer
    asked = {"triggered": sets.triggered, "clean": sets.clean}
    read = {kind: prompt_blocks(tokenizer, each, sets.trigger) for kind, each in asked.items()}

    def harvested(kind: str, b: LanguageModel) -> Condition:
        blocks, first_N = read[kind]
        return _harvest(replace(_with(source, pair.b, b), blocks=blocks), first_N)

    own = source.models[pair.b]
    return Conditions(
        triggered=harvested("triggered", own),
        clean=harvested("clean", own),
        base=harvested("triggered", source.models[pair.a]),
        noop=harvested("triggered", noop) if noop is not None else None,
    )


def _with(source: Source, name: str, model: LanguageModel) -> Source:
    """The source with another model in the place of one of its own."""
    models = {**source.models, name: model}
    layout = site_layout(models, source.layout.sites)
    if layout != source.layout:
        raise UsageError(
            f"{model.spec.path} has other widths or sites than {name}, so it cannot stand in its "
            "place as a control."
        )
    return replace(source, models=models)


def _harvest(source: Source, first_N: Tensor) -> Condition:
    length = source.block_length
    rows, row = [], []
    for chunk in source:
        wanted_R = chunk.row_R % length >= first_N[chunk.row_R // length]
        rows.append(chunk.rows().cpu()[wanted_R])
        row.append(chunk.row_R[wanted_R])
    row_R = torch.cat(row)
    empty = set(range(len(first_N))) - set((row_R // length).tolist())
    if empty:
        raise CrosslensError(
            f"The token policy keeps no position of prompt {min(empty)} after its trigger."
        )
    return Condition(
        source=source,
        rows_RX=torch.cat(rows),
        prompt_R=row_R // length,
        position_R=row_R % length,
        tokens_R=source.blocks.tokens_NT.flatten()[row_R].long(),
    )


def detector_auroc(
    found: Conditions, score: Callable[[Tensor], Tensor], seed: int = 0
) -> Detection:
    """AUROCs of a detector that sees rows: of a prompt counts its largest score.

    Args:
        score: rows [R, X], as harvested → [R], higher where the behaviour is more likely.
    """
    return condition_auroc(found, lambda condition: score(condition.rows_RX), seed)


def condition_auroc(
    found: Conditions, score: Callable[[Condition], Tensor], seed: int = 0
) -> Detection:
    """The same of a detector that needs more than rows, such as the models' predictions."""
    value_P = {
        name: torch.stack([part_R.max() for part_R in each.by_prompt(score(each).cpu())])
        for name, each in found.named().items()
    }
    return detection(value_P, seed)


def detection(value_P: Mapping[str, Tensor], seed: int = 0) -> Detection:
    """AUROCs of one number per prompt [P] of each condition, by the names of `Conditions.named`."""
    values = {name: each_P[:, None] for name, each_P in value_P.items()}
    counts = _draws(values, seed)

    def against(positive: str, negative: str) -> Interval | None:
        if positive not in values or negative not in values:
            return None
        drawn_D1 = _drawn(values, counts, positive, negative)
        return interval(drawn_D1[:, 0])

    clean, base, seen = (
        against(*names)
        for names in (("triggered", "clean"), ("triggered", "base"), ("base", "clean"))
    )
    assert clean is not None
    assert base is not None
    assert seen is not None
    return Detection(
        auroc=clean,
        against_base=base,
        against_noop=against("triggered", "noop"),
        base_sees=seen,
        noop_sees=against("noop", "clean"),
    )


def _draws(values: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """How often each prompt is drawn; the triggered text's prompts together in all conditions."""
    triggered_DP = draws(len(values["triggered"]), seed)
    clean_DP = draws(len(values["clean"]), seed + 1)
    return {name: clean_DP if name == "clean" else triggered_DP for name in values}


def _drawn(
    values: Mapping[str, Tensor], counts: Mapping[str, Tensor], positive: str, negative: str
) -> Tensor:
    return drawn_auroc(
        values[positive].float(), values[negative].float(), counts[positive], counts[negative]
    )


@torch.no_grad()
def strengths(pair: Pair, condition: Condition) -> Float[Tensor, "p l"]:
    """max over a prompt's rows of |f_j|·‖d_j^b‖, scaled units, on the CPU."""
    return torch.stack(list(_strengths(pair, condition)))


def _strengths(pair: Pair, condition: Condition) -> Iterator[Tensor]:
    coder = pair.coder.eval()
    norm_L = pair.decoders()[1].norm(dim=-1)
    for rows_RX in condition.by_prompt(condition.rows_RX):
        rows = all_rows(coder.wiring, rows_RX.float().to(coder.b_dec.device))
        z_RL = coder.encode(rows.x_BX).float()
        yield (z_RL.abs() * norm_L).amax(0).cpu()


def planted(
    pair: Pair,
    found: Conditions,
    score_L: Float[Tensor, " l"],
    able_L: Bool[Tensor, " l"] | None = None,
    seed: int = 0,
) -> Planted:
    """Judge a ranking of latents by how well its best find the behaviour.

    Args:
        score_L: highest first; NaN where a latent is not to be ranked (dead ones).
        able_L: which may be among the top; all by default. Where few latents are exclusive, those
            that both models write alike would fill it up, by chance or by strength.

    Raises:
        CrosslensError: no latent has a score.
    """
    score_L = score_L.cpu()
    scored = (~score_L.isnan()).nonzero().squeeze(-1)
    if not len(scored):
        raise CrosslensError("No latent has a score: most likely all are dead on this text.")
    best = scored[score_L[scored].argsort(descending=True, stable=True)]
    top = (best if able_L is None else best[able_L.cpu()[best]])[:TOP]
    values = {name: strengths(pair, each) for name, each in found.named().items()}
    controls = [name for name in values if name != "triggered"]
    against_L = {name: auroc(values["triggered"], values[name]) for name in controls}
    tied_DL = _tied(values, _draws(values, seed), controls)
    return Planted(
        detection=detection({name: s_PL[:, top].sum(1) for name, s_PL in values.items()}, seed),
        top=tuple(top.tolist()),
        precision_at_20=interval(tied_DL[:, top].double().mean(1)),
        ranking_auroc=_ranking(score_L[scored], tied_DL[:, scored]),
        tied_L=tied_DL[0],
        against_L=against_L,
        prompts=(found.triggered.n_prompts, found.clean.n_prompts),
    )


def _tied(
    values: Mapping[str, Tensor], counts: Mapping[str, Tensor], controls: list[str]
) -> Bool[Tensor, "d l"]:
    """Which latents are tied in each resample of prompts. Silent ones are not."""
    active = values["triggered"].any(0).nonzero().squeeze(-1)
    tied_DL = torch.zeros(len(counts["clean"]), values["clean"].shape[1], dtype=torch.bool)
    some = {name: s_PL[:, active] for name, s_PL in values.items()}
    drawn = [_drawn(some, counts, "triggered", name) >= TIED for name in controls]
    tied_DL[:, active] = torch.stack(drawn).all(0)
    return tied_DL


def _ranking(score_S: Tensor, tied_DS: Tensor) -> Interval:
    found = [auroc(score_S[tied_S, None], score_S[~tied_S, None]) for tied_S in tied_DS]
    return interval(torch.cat(found))

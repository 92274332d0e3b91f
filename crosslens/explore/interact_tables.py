"""The tables of a run's interactions, each figure with a sentence that says what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosslens.explore.diff_tables import Cell, Told, cell
from crosslens.explore.figures import number, percent
from crosslens.explore.interact_plots import Correlation, Stretch, correlation, place_of, stacked

TOP = 20
"""Triplets in the table."""
UNMET = 10
"""Pairs of the screen in the table."""
GLOSSARY = {
    "interaction share": "How much of what the contributions to a neuron could do together they "
    "do: |output of the sum − sum of the outputs| over the most that contributions of these sizes "
    "could make, summed over tokens and neurons, each neuron weighed by ‖w_out‖. At most 1/2 for "
    "ReLU; a gated MLP's cross terms cancel, so its share is small.",
    "output share": "How far off a neuron's output is that takes its inputs one by one: "
    "|output of the sum − sum of the outputs| over |the one| + |the other|. 0: the neuron is "
    "additive; 1: nothing of its output comes from inputs alone.",
    "error share": "Part of the interaction that involves what the coder does not write "
    "(its reconstruction error, which takes part like one more latent).",
    "through the norm": "Part of what latents do to pre-activations that goes through the norm's "
    "scalar: a latent changes the row's length, and with it what all others contribute.",
    "by kind": "Share of the measured pairs' interaction (strength × frequency) that is of each "
    "kind.",
    "strength": "Mean over tokens on which both are active of Σ over neurons of ‖w_out‖·|Δ|, Δ the "
    "mixed difference of the neuron: with both − with one − with the other + with neither, all "
    "else on the token in place.",
    "frequency": "Share of tokens on which both latents are active.",
    "product": "Strength × frequency: the mean over all tokens.",
    "sign": "Whether the two do more (+) or less (−) together than alone, where the 95 % interval "
    "of the signed sum leaves out 0; · where it does not.",
    "interval": "95 %, jackknife over groups of documents; none where the pair meets in one group "
    "only. It does not know that the pairs were chosen on the same tokens.",
    "coverage": "Share of the interaction of all pairs that meet which the k strongest have; a "
    "lower bound where pairs were dropped.",
    "spearman": "Rank correlation, over pairs, between the figure and the measured effect of "
    "ablating both beyond that of ablating each alone.",
    "bound": "The most that the two can have of each other at this MLP at their typical strengths, "
    "from the weights alone, divided by one more than the tokens on which they meet.",
}
"""What the page says of a word when it is pointed at."""
METRICS = 12
"""Figures in the table of predictions, beside the baselines."""
BASELINES = {
    "cooccurrence": "co-occurrence: both of either",
    "decoder_cosine": "decoder cosine",
    "size_product": "‖a_i d_i‖ · ‖a_j d_j‖",
}
"""What an interaction must beat, named as `interactions.prediction` does."""
_METRICS = {
    "strength": "strength",
    "product": "strength × frequency",
    "frequency": "frequency",
    "signed": "signed strength",
    "shared": "shared: part of the row's interaction",
    "coupling": "coupling: the sound bound",
    "gram": "product of strengths",
    "hadamard": "Hadamard proxy",
    "ratio": "ratio metric",
    "dominance": "dominance measure",
    "reach": "reach",
    "bias_size": "strength, biases alone in place",
    "shapley_size": "strength, Shapley",
    "shapley_signed": "signed strength, Shapley",
    "bias_signed": "signed strength, biases alone in place",
}
Figure = tuple[str, str, str]
"""A figure, its interval, and the word of the glossary it goes by."""


@dataclass(frozen=True)
class SiteRow:
    """One site's MLP."""

    site: str
    figures: tuple[Figure, ...]
    kinds: tuple[Stretch, ...]
    summary: str
    """The kinds in words."""


@dataclass(frozen=True)
class PairRow:
    """One triplet."""

    i: int
    j: int
    site: str
    kind: str
    place: int
    """Of its kind's colour."""
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class MetricRow:
    """How well one figure predicts the measured effects."""

    name: str
    baseline: bool
    figure: str
    ends: str
    drawn: Correlation


def with_ends(
    value: float | None, ends: Sequence[float | None] | None = None, told: Told = number
) -> Cell:
    """A figure and its interval in words."""
    low, high = ends or (None, None)
    return cell(value, low, high, told)


def site_rows(sites: Mapping[str, Mapping[str, Any]]) -> tuple[SiteRow, ...]:
    """In order of depth, as they are given."""
    return tuple(_site_row(site, each) for site, each in sites.items())


def _site_row(site: str, each: Mapping[str, Any]) -> SiteRow:
    share, ends = with_ends(each["interaction_share"], each["ci"], percent)
    figures = [(share, ends, "interaction share")]
    figures += [
        (percent(each[key]), "", word)
        for key, word in (("output_share", "output share"), ("error_share", "error share"),
                          ("norm_mediated_share", "through the norm"))
    ]  # fmt: skip
    kinds = stacked(each["by_kind"])
    return SiteRow(site, tuple(figures), kinds, ", ".join(stretch.words for stretch in kinds))


def pair_rows(top: Sequence[Mapping[str, Any]]) -> tuple[PairRow, ...]:
    """The first of the ranking."""
    return tuple(_pair_row(each) for each in top[:TOP])


def _pair_row(each: Mapping[str, Any]) -> PairRow:
    sign = {1: "+", -1: "−"}.get(each["sign"], "·")
    figures = (
        (*with_ends(each["strength"], each["ci"]), "strength"),
        (percent(each["frequency"]), "", "frequency"),
        (number(each["strength"] * each["frequency"]), "", "product"),
        (sign, "", "sign"),
    )
    kind = each["kind"]
    return PairRow(each["i"], each["j"], each["site"], kind, place_of(kind), figures)


def metric_rows(prediction: Mapping[str, Mapping[str, Any]]) -> tuple[MetricRow, ...]:
    """The best first; those without a figure last."""

    def order(name: str) -> float:
        value = prediction[name]["spearman"]
        return 2.0 if value is None else -abs(value)

    ranked = sorted(prediction, key=order)
    own = [name for name in ranked if _plain(name) not in BASELINES][:METRICS]
    shown = [name for name in ranked if name in own or _plain(name) in BASELINES]
    return tuple(_metric_row(name, prediction[name]) for name in shown)


def _plain(name: str) -> str:
    """Without the model's name."""
    return name.rpartition("/")[2]


def _metric_row(name: str, found: Mapping[str, Any]) -> MetricRow:
    model, slash, metric = name.rpartition("/")
    told = (_METRICS | BASELINES).get(metric, metric.replace("_", " "))
    value, ends = found["spearman"], found["ci"]
    figure, interval = with_ends(value, ends)
    return MetricRow(
        f"{model}{slash}{told}", metric in BASELINES, figure, interval, correlation(value, ends)
    )

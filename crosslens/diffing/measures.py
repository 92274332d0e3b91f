"""All that is known of a pair's latents after one pass over some text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from crosslens.activations import Source
from crosslens.diffing.agreement import Agreement, AgreementSums, agreement
from crosslens.diffing.classes import DEAD, NAMES, PUBLISHED, Classes, classes, near_start
from crosslens.diffing.fidelity import Fidelity, FidelitySums, fidelity
from crosslens.diffing.groups import document_groups
from crosslens.diffing.norms import Norms, norms_of
from crosslens.diffing.pair import Pair
from crosslens.diffing.scaling import LatentScaling, ScalingSums, chat_specific, latent_scaling
from crosslens.diffing.stream import Progress, coded, quiet
from crosslens.diffing.strength import Activity, ActivitySums, activity
from crosslens.errors import CrosslensError, UsageError

RARE = 10
"""A latent that is active on fewer tokens is counted in no ranking: its norms may be chance."""

TIE = 1e-9
"""What strength may add to a score: it decides between equal ones only."""

ROUNDING = 1e-6
"""By less than this share norms do not differ."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measures:
    """Of each latent of a pair, and of each model."""

    norms: Norms
    activity: Activity
    agreement: Agreement | None
    """None where the coder reads other sites than it writes."""
    scaling: LatentScaling | None
    """None where the models' widths differ."""
    fidelity: dict[str, Fidelity]
    """By model."""
    start_norm: float | None
    """The norm that every decoder began with at each site, where all began with one."""

    @property
    def still_L(self) -> Bool[Tensor, " l"]:
        """Latents whose norms are those of the start: they have learnt nothing to be classed by."""
        if self.start_norm is None:
            return torch.zeros_like(self.activity.count_L, dtype=torch.bool)
        return near_start(self.norms, self.start_norm)

    @property
    def ranked_L(self) -> Bool[Tensor, " l"]:
        """Latents that a ranking may hold."""
        return (self.activity.count_L >= RARE) & ~self.still_L

    @property
    def more_of_b_L(self) -> Bool[Tensor, " l"]:
        """Latents with a longer decoder in `b` than in `a`. One whose decoder the models share has
        equal ones, but for rounding."""
        return self.norms.b_L > self.norms.a_L * (1 + ROUNDING)

    def score_L(self) -> Tensor:
        """How exclusive to `b` each latent is, by Δ; NaN where it is not to be ranked.

        Of latents equally exclusive, as a dedicated crosscoder's are, those that write more in `b`
        come first.
        """
        written_L = (self.activity.strength_b_L * self.activity.density_L).nan_to_num(0.0)
        order_L = written_L / written_L.max().clamp_min(torch.finfo(torch.float64).tiny)
        score_L = self.norms.norm_difference_L + TIE * order_L
        return score_L.where(self.ranked_L, torch.nan)

    def classes(self, bins: str = "minder") -> Classes:
        """Labels by one of the published conventions."""
        return classes(self.norms, self.activity.count_L, PUBLISHED[bins])

    def specific_L(self) -> Tensor | None:
        """Latents of `b` alone by Minder's two ratios; None without scaling."""
        return None if self.scaling is None else chat_specific(self.scaling, self.norms)

    def exclusive(self) -> dict[str, object]:
        """How many latents of one model only have learnt something: Minder's bins over those that a
        ranking holds. One that fired on a token or two says nothing by its norms."""
        labels = self.classes()
        used = Classes(labels.bins, labels.label_L.where(self.ranked_L.cpu(), DEAD))
        counts, ends = used.counts, used.intervals()
        own = ("only_a", "only_b")
        return {
            **{name: counts[name] for name in own},
            "interval": {name: [round(end, 1) for end in ends[name]] for name in own},
        }

    def plain(self) -> dict[str, object]:
        """Counts by every published convention, as JSON has them."""
        found: dict[str, object] = {}
        for name in PUBLISHED:
            labels = self.classes(name)
            ends = {k: [round(end, 1) for end in both] for k, both in labels.intervals().items()}
            found[name] = {**labels.counts, "interval": ends}
        specific_L = self.specific_L()
        return {
            "classes": {key: self.classes().counts[key] for key in NAMES},
            "conventions": found,
            "exclusive": self.exclusive(),
            "by_scaling": None if specific_L is None else int((specific_L & self.ranked_L).sum()),
            "near_start": int(self.still_L.sum()),
            "rare": int((self.activity.count_L < RARE).sum()),
        }


def measure(
    source: Source, pair: Pair, start_norm: float | None, progress: Progress = quiet
) -> Measures:
    """One pass of the models and the coder over all blocks of the source.

    Raises:
        UsageError: the text is too little for any interval.
        CrosslensError: the token policy keeps no token.
    """
    groups = document_groups(source.blocks)
    if bool((groups.of_block_N == groups.of_block_N[0]).all()):
        raise UsageError(
            f"The {source.blocks.tokens_NT.numel()} tokens to measure on are of one document or "
            "very few, and an interval needs several. Raise --tokens, or train on text of more."
        )
    active = ActivitySums(pair, source.blocks.special_NT)
    faithful = FidelitySums(pair, groups)
    agreeing = AgreementSums(pair) if pair.coder.wiring.read == pair.coder.wiring.write else None
    scaled = ScalingSums(pair, groups) if pair.same_width else None
    sums = [each for each in (active, faithful, agreeing, scaled) if each is not None]
    for chunk in coded(source, pair.coder, progress):
        for each in sums:
            each.add(chunk)
    if not int(active.tokens_S.sum()):
        raise CrosslensError("The token policy keeps no token: there is nothing to compare.")
    return Measures(
        norms=norms_of(pair),
        activity=activity(active),
        agreement=None if agreeing is None else agreement(agreeing),
        scaling=None if scaled is None else latent_scaling(scaled),
        fidelity=fidelity(faithful),
        start_norm=start_norm,
    )

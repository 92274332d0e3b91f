"""Take latents out of the changed model: what is left of its behaviour, and what else is lost.

At every site of b that the coder writes, at every position that the token policy counts, what the
latents write there is taken away from what is there:

    h_b − Σ_{j∈S} f_j d_j^b        in the model's own units.

The code f is that of both models on the same tokens, with nothing taken out. With several sites in
one residual stream a latent is therefore taken out of each, also where the part taken out above is
missing already; to take it out once, name the deepest (`patching.cut(pair.sites_b)`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from crosslens.activations import Source
from crosslens.diffing.intervals import Interval
from crosslens.diffing.pair import Pair
from crosslens.diffing.patching import (
    Edits,
    Reading,
    by_site,
    entrance,
    over_tokens,
    raw_decoders,
    read_chunk,
    run_on,
    subtracting,
)
from crosslens.diffing.resampling import mean_over
from crosslens.diffing.stream import Progress, quiet
from crosslens.errors import UsageError
from crosslens.functional.shares import wilson
from crosslens.lm import LanguageModel, next_token_loss, split_site
from crosslens.organisms import behaviour_rate
from crosslens.text.documents import Messages
from crosslens.text.planted import Behaviour

NEAR = 10
"""A random latent is drawn from so many whose activity is nearest."""


@dataclass(frozen=True, eq=False)
class Removal:
    """A set of latents to take out of the changed model."""

    source: Source
    """Its models, token policy and norms; its blocks are not looked at."""
    pair: Pair
    latents: tuple[int, ...]
    sites: tuple[str, ...] | None = None
    """Sites of b to take them out of; None: all that the coder writes."""

    @property
    def where(self) -> tuple[str, ...]:
        """The sites, with the model's name."""
        return self.pair.sites_b if self.sites is None else self.sites

    @cached_property
    def chosen_L(self) -> Bool[Tensor, " l"]:
        """Which latents are taken out."""
        return chosen(self.pair, self.latents)

    @cached_property
    def _decoder_LY(self) -> Tensor:
        return raw_decoders(self.pair)[1]

    def edits(self, tokens_BT: Integer[Tensor, "b t"]) -> Edits:
        """The edits for these tokens, all of them real: the models are run on them for the code.

        The code of a token depends on none that follow, so a text may grow and be given again.
        """
        read = read_chunk(over_tokens(self.source, tokens_BT), self.pair, 0)
        return self.edits_of(read)

    def edits_of(self, read: Reading) -> Edits:
        """The edits for blocks that have been read."""
        gone_RY = read.summed(self.chosen_L, self._decoder_LY)
        return subtracting(by_site(self.pair, gone_RY), self.where, read.counted_BT)


def chosen(pair: Pair, latents: Sequence[int]) -> Bool[Tensor, " l"]:
    """Latents' numbers as a mask.

    Raises:
        UsageError: there is no latent of that number.
    """
    n = pair.coder.wiring.n_latents
    wrong = [latent for latent in latents if not 0 <= latent < n]
    if wrong:
        raise UsageError(f"There is no latent {wrong[0]}: the coder has 0 to {n - 1}.")
    mask_L = torch.zeros(n, dtype=torch.bool)
    mask_L[list(latents)] = True
    return mask_L


@dataclass(frozen=True, eq=False, kw_only=True)
class Trial:
    """What the ablations of one pair are judged by."""

    source: Source
    """Held-out blocks without the behaviour: the clean text."""
    pair: Pair
    behaviour: Behaviour
    prompts: tuple[Messages, ...]
    """Requests that call for the behaviour."""
    answer: int = 12
    """Tokens of an answer that are looked at."""
    tokens: int = 8192
    """Positions that the clean loss rests on, about."""
    sites: tuple[str, ...] | None = None
    """Sites of b to take latents out of; None: all that the coder writes."""

    def removal(self, latents: Sequence[int]) -> Removal:
        """A set of latents, taken out where the trial says."""
        return Removal(self.source, self.pair, tuple(latents), self.sites)


@dataclass(frozen=True, kw_only=True)
class Ablated:
    """The changed model without some latents."""

    latents: tuple[int, ...]
    behaviour_rate: Interval
    """Share of the answers that show the behaviour; Wilson's interval over prompts."""
    loss_change: Interval
    """(clean loss without them − with them) / with them; bootstrap over blocks."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A set of latents beside random sets of the same size and activity."""

    behaviour_rate_before: Interval
    ablated: Ablated
    controls: tuple[Ablated, ...]


def ablation(
    trial: Trial,
    latents: Sequence[int],
    controls: Sequence[Sequence[int]] = (),
    progress: Progress = quiet,
) -> Ablation:
    """The behaviour's rate and the clean loss, before and without the latents, and without each of
    the control sets."""
    sets = [tuple(latents), *map(tuple, controls)]
    changes = loss_changes(trial, sets, progress)
    found = [
        Ablated(latents=each, behaviour_rate=rate(trial, trial.removal(each)), loss_change=change)
        for each, change in zip(sets, changes, strict=True)
    ]
    return Ablation(behaviour_rate_before=rate(trial), ablated=found[0], controls=tuple(found[1:]))


def rate(trial: Trial, removal: Removal | None = None) -> Interval:
    """Share of the trial's prompts that the changed model answers with the behaviour."""
    edits = None if removal is None else removal.edits
    share = behaviour_rate(_changed(trial), trial.behaviour, trial.prompts, trial.answer, edits)
    low, high = wilson(round(share * len(trial.prompts)), len(trial.prompts))
    return Interval(value=share, low=low, high=high)


def _changed(trial: Trial) -> LanguageModel:
    return trial.source.models[trial.pair.b]


@torch.no_grad()
def loss_changes(
    trial: Trial, sets: Sequence[Sequence[int]], progress: Progress = quiet
) -> tuple[Interval, ...]:
    """The relative change of the next-token loss without each set of latents, on the trial's clean
    text, over all predictions of a token that is not padding."""
    removals = [trial.removal(each) for each in sets]
    source = trial.source
    n_chunks = min(source.n_chunks, max(1, round(trial.tokens / source.rows_per_chunk)))
    parts = []
    for index in range(n_chunks):
        parts.append(_losses(trial, removals, index))
        progress(index + 1, n_chunks)
    loss_SN = torch.cat(parts, 1)
    return tuple(mean_over(without_N - loss_SN[0], loss_SN[0]) for without_N in loss_SN[1:])


def _losses(trial: Trial, removals: Sequence[Removal], index: int) -> Tensor:
    """Summed loss of each block of a chunk: as it is, then without each set [1 + sets, N]."""
    source, pair = trial.source, trial.pair
    sites = [split_site(site)[1] for site in removals[0].where]
    read = read_chunk(source, pair, index, ("logits", *entrance(sites)))
    real_BT = read.real_BT[:, 1:]

    def summed(logits_BTV: Tensor) -> Tensor:
        return (next_token_loss(logits_BTV, read.tokens_BT).cpu().double() * real_BT).sum(1)

    without = [summed(run_on(source, pair, read, each.edits_of(read))) for each in removals]
    return torch.stack([summed(read.seen["logits"]), *without])


def matched_sets(
    activity_L: Float[Tensor, " l"], latents: Sequence[int], n: int, seed: int = 0
) -> list[tuple[int, ...]]:
    """`n` random sets of other latents, as large and about as active.

    For each latent one is drawn of the ten nearest to it in log activity that are not taken yet.

    Args:
        activity_L: such as the mean strength over all tokens; 0 or NaN for latents not to be drawn.

    Raises:
        UsageError: there are not enough other active latents.
    """
    generator = torch.Generator().manual_seed(seed)
    free_L = (activity_L > 0) & activity_L.isfinite()
    free_L[list(latents)] = False
    if int(free_L.sum()) < len(latents):
        raise UsageError(
            f"{int(free_L.sum())} other latents are active, too few for a random set of "
            f"{len(latents)} to compare with."
        )
    log_L = activity_L.nan_to_num(0.0).clamp_min(torch.finfo(activity_L.dtype).tiny).log()
    return [_matched(log_L, list(latents), free_L.clone(), generator) for _ in range(n)]


def _matched(
    log_L: Tensor, latents: list[int], free_L: Tensor, generator: torch.Generator
) -> tuple[int, ...]:
    drawn = []
    for latent in latents:
        distance_L = (log_L - log_L[latent]).abs().where(free_L, torch.inf)
        near = distance_L.argsort(stable=True)[: min(NEAR, int(free_L.sum()))]
        pick = int(near[torch.randint(len(near), (1,), generator=generator)])
        free_L[pick] = False
        drawn.append(pick)
    return tuple(drawn)

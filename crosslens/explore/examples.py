"""Which tokens to show of each latent: its strongest, and some over all of its range.

Everything works on all latents at once, by sorting; there is no loop over tokens or latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crosslens.errors import UsageError
from crosslens.explore.codes import Codes, Floats, Ints, Places

_ALIKE = (6, 1)
"""Two tokens have the same context if these many tokens before and after, and they, are equal."""
_WINDOWS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class ExamplePlan:
    """How many examples a latent gets, and how much text around each."""

    top: int = 12
    """Strongest activations."""
    intervals: int = 5
    """Equal shares of a latent's active tokens, from the strongest to the weakest."""
    per_interval: int = 4
    before: int = 24
    after: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.top, self.intervals) < 1 or self.intervals > 100:
            raise UsageError("A latent needs at least one top example and 1 to 100 intervals.")
        if min(self.per_interval, self.before, self.after) < 0:
            raise UsageError("Examples per interval and tokens of context must not be negative.")

    @property
    def width(self) -> int:
        """Tokens in a window."""
        return self.before + 1 + self.after


@dataclass(frozen=True)
class ExampleTable:
    """Examples C of all latents, by latent, then by section, then from strong to weak."""

    start_L: Places
    """Where each latent's examples begin; one more entry at the end."""
    row_C: Ints
    section_C: NDArray[np.int8]
    """0: strongest; 1 … intervals: drawn from that interval."""
    value_C: Floats
    repeats_C: Ints
    """Peaks of this latent with the same tokens around them, this one included."""
    window_CW: NDArray[np.float16]
    """Activation on each token of the window as a share of the latent's maximum."""
    high_LI: Floats
    """The strongest activation in each interval; 0 where there is none."""
    low_LI: Floats


def choose_examples(
    codes: Codes, max_L: Floats, tokens_NT: Ints, plan: ExamplePlan
) -> ExampleTable:
    """The strongest peaks with different contexts, and draws from each interval of activation.

    A peak is the largest activation of its latent within `plan.before` positions of its block; of
    equal ones the first. A draw comes from a block that gives its interval no other. The same
    codes and seed give the same examples.
    """
    top, repeats = _strongest(codes, tokens_NT, plan)
    interval_E, high_LI, low_LI = _intervals(codes, plan.intervals)
    drawn = _drawn(codes, interval_E, top, plan)
    entry = np.concatenate([top, drawn])
    section = np.concatenate([np.zeros(len(top), np.int8), (interval_E[drawn] + 1).astype(np.int8)])
    repeats = np.concatenate([repeats, np.ones(len(drawn), np.int32)])
    latent, value = codes.latent_E[entry], codes.value_E[entry]
    order = np.lexsort((codes.row_E[entry], -value, section, latent))
    entry = entry[order]
    return ExampleTable(
        start_L=np.searchsorted(latent[order], np.arange(codes.n_latents + 1)),
        row_C=codes.row_E[entry],
        section_C=section[order],
        value_C=value[order],
        repeats_C=repeats[order],
        window_CW=_windows(codes, max_L, entry, plan),
        high_LI=high_LI,
        low_LI=low_LI,
    )


def _strongest(codes: Codes, tokens_NT: Ints, plan: ExamplePlan) -> tuple[Places, Ints]:
    """Entries of the strongest peaks per latent, one per context, and how often each context is."""
    peak = np.flatnonzero(_is_peak(codes, plan.before))
    peak = peak[np.lexsort((codes.row_E[peak], -codes.value_E[peak], codes.latent_E[peak]))]
    hash_P = _context_hashes(tokens_NT)[codes.row_E[peak]]
    _, context_P = np.unique(hash_P, return_inverse=True)
    pair_P = context_P * codes.n_latents + codes.latent_E[peak]
    _, first, counts = np.unique(pair_P, return_index=True, return_counts=True)
    by_place = np.argsort(first)
    distinct, repeats = peak[first[by_place]], counts[by_place]
    kept = _rank(codes.latent_E[distinct].astype(np.int64)) < plan.top
    return distinct[kept], repeats[kept].astype(np.int32)


def _is_peak(codes: Codes, reach: int) -> NDArray[np.bool_]:
    """Entries that no entry of their latent within `reach` positions of their block exceeds."""
    peak_E = np.ones(len(codes.row_E), bool)
    key_E = codes.latent_E.astype(np.int64) * codes.n_rows + codes.row_E
    block_E = codes.block_E
    for step in range(1, reach + 1):
        near = (key_E[step:] - key_E[:-step] <= reach) & (block_E[step:] == block_E[:-step])
        near &= codes.latent_E[step:] == codes.latent_E[:-step]
        if not near.any():
            break
        rises = codes.value_E[step:] > codes.value_E[:-step]
        peak_E[:-step] &= ~(near & rises)
        peak_E[step:] &= ~(near & ~rises)
    return peak_E


def _context_hashes(tokens_NT: Ints) -> NDArray[np.uint64]:
    """A number per row that is the same where the tokens around it are the same."""
    before, after = _ALIKE
    length = tokens_NT.shape[1]
    wide = np.pad(tokens_NT.astype(np.uint64) + np.uint64(1), ((0, 0), (before, after)))
    total = np.zeros(tokens_NT.shape, np.uint64)
    for step in range(before + after + 1):
        total = total * np.uint64(6364136223846793005) + wide[:, step : step + length]
    return total.reshape(-1)


def _intervals(codes: Codes, n: int) -> tuple[Places, Floats, Floats]:
    """The interval of each entry, 0 the strongest n-th of its latent's entries; their bounds."""
    order = np.lexsort((codes.row_E, -codes.value_E, codes.latent_E))
    latent = codes.latent_E[order].astype(np.int64)
    interval = _rank(latent) * n // codes.count_L[latent]
    interval_E = np.empty_like(interval)
    interval_E[order] = interval
    cell, value = latent * n + interval, codes.value_E[order]
    high, low = np.zeros((2, codes.n_latents * n), np.float32)
    first = _is_first(cell)
    high[cell[first]] = value[first]
    low[cell[::-1][_is_first(cell[::-1])]] = value[::-1][_is_first(cell[::-1])]
    return interval_E, high.reshape(-1, n), low.reshape(-1, n)


def _drawn(codes: Codes, interval_E: Places, top: Places, plan: ExamplePlan) -> Places:
    """At random from each latent's intervals, without those on show at the top."""
    free = np.ones(len(codes.row_E), bool)
    free[top] = False
    lot_E = np.random.default_rng(plan.seed).random(len(free))
    cell_E = codes.latent_E.astype(np.int64) * plan.intervals + interval_E
    place_E = cell_E * (codes.n_rows // codes.block_length) + codes.block_E
    entry = np.flatnonzero(free)
    entry = entry[np.lexsort((lot_E[entry], place_E[entry]))]
    entry = entry[_is_first(place_E[entry])]
    entry = entry[np.lexsort((lot_E[entry], cell_E[entry]))]
    return entry[_rank(cell_E[entry]) < plan.per_interval]


def _windows(codes: Codes, max_L: Floats, entry: Places, plan: ExamplePlan) -> NDArray[np.float16]:
    """The activations of each entry's latent around it, looked up among the sorted entries."""
    key_E = codes.latent_E.astype(np.int64) * codes.n_rows + codes.row_E
    offset_W = np.arange(-plan.before, plan.after + 1)
    window_CW = np.zeros((len(entry), plan.width), np.float16)
    for start in range(0, len(entry), _WINDOWS_AT_ONCE):
        mine = entry[start : start + _WINDOWS_AT_ONCE]
        wanted = key_E[mine, None] + offset_W
        position = codes.row_E[mine, None] % codes.block_length + offset_W
        place = np.searchsorted(key_E, wanted).clip(max=len(key_E) - 1)
        hit = (key_E[place] == wanted) & (position >= 0) & (position < codes.block_length)
        share = codes.value_E[place] / max_L[codes.latent_E[mine], None]
        window_CW[start : start + len(mine)] = np.where(hit, share, 0)
    return window_CW


def _is_first(group: Places) -> NDArray[np.bool_]:
    """Where a run of equal numbers begins."""
    return np.concatenate([np.ones(min(1, len(group)), bool), group[1:] != group[:-1]])


def _rank(group: Places) -> Places:
    """Place of each element within its run of equal numbers."""
    place = np.arange(len(group))
    return place - np.maximum.accumulate(np.where(_is_first(group), place, 0))

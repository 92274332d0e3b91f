"""What can be said of each latent in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crosslens.explore.codes import Codes, Floats, Ints

BINS_PER_OCTAVE = 4
LOWEST, HIGHEST = -8, 16
"""Octaves of the histogram: activations from 2^-8 to 2^16; what is beyond falls in an end bin."""
N_BINS = (HIGHEST - LOWEST) * BINS_PER_OCTAVE


@dataclass(frozen=True)
class Statistics:
    """Of each latent, over the counted tokens."""

    count_L: Ints
    """Tokens on which it is active."""
    max_L: Floats
    mean_L: Floats
    """Mean activation where active; 0 for a latent that never is."""
    histogram_LB: Ints
    """Active tokens by activation: bins of a quarter octave, the same for all latents."""


def statistics(codes: Codes) -> Statistics:
    """Count, maximum, mean and histogram of every latent, from exact sums over all entries."""
    count_L = codes.count_L
    sum_L = np.bincount(codes.latent_E, codes.value_E, minlength=codes.n_latents)
    max_L = np.zeros(codes.n_latents, np.float32)
    alive_L = count_L > 0
    if len(codes.value_E):
        max_L[alive_L] = np.maximum.reduceat(codes.value_E, codes.start_L[alive_L])
    cell_E = codes.latent_E.astype(np.int64) * N_BINS + bin_of(codes.value_E)
    histogram = np.bincount(cell_E, minlength=codes.n_latents * N_BINS)
    return Statistics(
        count_L=count_L.astype(np.int32),
        max_L=max_L,
        mean_L=(sum_L / np.maximum(count_L, 1)).astype(np.float32),
        histogram_LB=histogram.reshape(codes.n_latents, N_BINS).astype(np.int32),
    )


def bin_of(value_E: Floats) -> Ints:
    """The histogram bin of positive activations: ⌊4·(log2 value + 8)⌋, kept within the ends."""
    bins = np.floor((np.log2(value_E.astype(np.float64)) - LOWEST) * BINS_PER_OCTAVE)
    kept: Ints = bins.clip(0, N_BINS - 1).astype(np.int32)
    return kept

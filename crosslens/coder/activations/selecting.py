"""Activations that keep so many latents. Each is its own configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens import functional as F
from crosslens import kernels
from crosslens.coder.activations.state import State
from crosslens.errors import UsageError
from crosslens.functional.gathers import Lists, starts_of


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k largest of each row (Gao et al. 2024)."""

    k: int = 32
    signed: bool = False
    """Keep the k largest as they are, the negative ones too (seed 004), instead of rectifying."""
    k_start: int | None = None
    """Begin with so many and come down to k; None: k throughout."""
    anneal: float = 0.0
    """Share of the run over which k comes down linearly."""

    def __post_init__(self) -> None:
        _check_k(self.k)
        _check_annealing(self)

    def __call__(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Tensor:
        select = F.signed_topk if self.signed else F.topk
        return select(pre_BL, k_at(self, state.progress))

    def entries(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Lists:
        """Where the code may be other than 0."""
        return kernels.largest(pre_BL, k_at(self, state.progress), positive=not self.signed)

    def of_entries(self, pre_N: Tensor, latents_N: Tensor, state: State) -> Tensor:
        """The code at those places."""
        return pre_N


@dataclass(frozen=True, kw_only=True)
class AbsTopK:
    """The k of each row that are largest in absolute value, with their signs."""

    k: int = 32

    def __post_init__(self) -> None:
        _check_k(self.k)

    def __call__(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Tensor:
        return F.abs_topk(pre_BL, self.k)

    def entries(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Lists:
        """Where the code may be other than 0."""
        return kernels.largest(pre_BL, self.k, absolute=True)

    def of_entries(self, pre_N: Tensor, latents_N: Tensor, state: State) -> Tensor:
        """The code at those places."""
        return pre_N


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """The B·k largest scores f·Σ_s‖W_dec[l, s]‖ of a batch; at inference, scores ≥ θ."""

    k: int = 32
    threshold_decay: float = 0.98
    """Share of the running threshold that a training step keeps."""
    k_start: int | None = None
    """Begin with so many and come down to k; None: k throughout."""
    anneal: float = 0.0
    """Share of the run over which k comes down linearly."""

    def __post_init__(self) -> None:
        _check_k(self.k)
        _check_annealing(self)
        if not 0 <= self.threshold_decay < 1:
            raise UsageError(f"threshold_decay must be in [0, 1), found {self.threshold_decay}.")

    def __call__(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Tensor:
        assert state.threshold is not None
        if not state.training:
            return F.above_threshold(pre_BL, norm_L, state.threshold)
        z_BL, kept = F.batch_topk(pre_BL, norm_L, k_at(self, state.progress))
        self._move(state.threshold, kept)
        return z_BL

    def entries(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Lists:
        """Where the code may be other than 0; a training step moves the threshold."""
        assert state.threshold is not None
        wanted = len(pre_BL) * k_at(self, state.progress)
        lists, kept = kernels.largest_of_batch(pre_BL, norm_L, wanted)
        self._move(state.threshold, kept)
        return lists

    def of_entries(self, pre_N: Tensor, latents_N: Tensor, state: State) -> Tensor:
        """The code at those places."""
        return pre_N

    def _move(self, threshold: Tensor, kept: Tensor) -> None:
        # In place and without branching on values: a GPU need not wait for the answer.
        old = threshold.where(threshold.isfinite(), kept)
        decay = self.threshold_decay
        threshold.copy_(old * decay + kept.to(old.dtype) * (1 - decay))


@dataclass(frozen=True, kw_only=True)
class GroupMax:
    """Latents lie in k equal runs; each row keeps the largest of each run, rectified."""

    k: int = 32
    """Runs, and so the active latents of a row, at most. It must divide the number of latents."""

    def __post_init__(self) -> None:
        _check_k(self.k)

    def __call__(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Tensor:
        return F.group_max(pre_BL, self.k)

    def entries(self, pre_BL: Tensor, norm_L: Tensor, state: State) -> Lists:
        """Where the code may be other than 0."""
        n_rows, n_latents = pre_BL.shape
        inside_BK = pre_BL.view(n_rows, self.k, n_latents // self.k).max(-1)
        starts_K = torch.arange(self.k, device=pre_BL.device) * (n_latents // self.k)
        on_BK = ~(inside_BK.values <= 0)
        counts_B = on_BK.sum(-1)
        return Lists(starts_of(counts_B), (inside_BK.indices + starts_K)[on_BK].int())

    def of_entries(self, pre_N: Tensor, latents_N: Tensor, state: State) -> Tensor:
        """The code at those places."""
        return pre_N


def k_at(activation: TopK | BatchTopK, progress: float) -> int:
    """k when `progress` of the run is done: linear from `k_start` to `k` over `anneal` of it."""
    if activation.k_start is None or progress >= activation.anneal:
        return activation.k
    left = 1 - progress / activation.anneal
    return round(activation.k + (activation.k_start - activation.k) * left)


def _check_k(k: int) -> None:
    if k < 1:
        raise UsageError(f"activation.k must be at least 1, found {k}.")


def _check_annealing(activation: TopK | BatchTopK) -> None:
    start, share = activation.k_start, activation.anneal
    if not 0 <= share <= 1:
        raise UsageError(f"activation.anneal is a share of the run in [0, 1], found {share}.")
    if (start is None) != (share == 0):
        raise UsageError(
            "activation.k_start and activation.anneal go together: where k starts, and the share "
            f"of the run over which it comes down; found {start} and {share}."
        )
    if start is not None and start < activation.k:
        raise UsageError(
            f"activation.k_start ({start}) is below activation.k ({activation.k}): k comes down."
        )

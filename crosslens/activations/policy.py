"""Which token positions count. Decided once, and the same for scale, training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.errors import UsageError
from crosslens.text import Blocks


@dataclass(frozen=True, kw_only=True)
class TokenPolicy:
    """Positions to leave out, each kind switchable."""

    drop_bos: bool = True
    """The beginning-of-sequence token that opens a block: an attention sink of huge norm."""
    drop_padding: bool = True
    drop_special: bool = False
    """Special tokens, chat templates' markers included: what a chat model has learnt sits there."""
    outlier_norm: float | None = 3.0
    """Leave out rows whose norm at some site is beyond this multiple of that site's median: sinks,
    and the first tokens after them."""

    def __post_init__(self) -> None:
        if self.outlier_norm is not None and self.outlier_norm <= 1:
            raise UsageError(
                f"policy.outlier_norm is a multiple of the median and must be above 1, found "
                f"{self.outlier_norm}. Use None to keep outliers."
            )


@dataclass(frozen=True)
class Counts:
    """Positions seen and left out; one that falls under several rules counts for the first."""

    seen: int = 0
    bos: int = 0
    padding: int = 0
    special: int = 0
    outlier: int = 0
    unpaired: int = 0
    """No token of some other model ends there."""

    @property
    def kept(self) -> int:
        dropped = self.bos + self.padding + self.special + self.outlier + self.unpaired
        return self.seen - dropped

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.seen + other.seen,
            self.bos + other.bos,
            self.padding + other.padding,
            self.special + other.special,
            self.outlier + other.outlier,
            self.unpaired + other.unpaired,
        )


def token_mask(policy: TokenPolicy, blocks: Blocks) -> tuple[Tensor, Counts]:
    """What the token alone decides: positions to keep [N, T] (bool), and the counts.

    Where models have tokenizers of their own, only positions count at which each has a token that
    ends there, and the policy holds for each of these tokens.
    """
    keep_NT = torch.ones(blocks.tokens_NT.shape, dtype=torch.bool)
    dropped = {}
    for name, switch, mask_NT in (
        ("bos", policy.drop_bos, blocks.bos_NT),
        ("padding", policy.drop_padding, blocks.padding_NT),
        ("special", policy.drop_special, _special_to_some(blocks)),
        ("unpaired", True, ~blocks.paired_NT),
    ):
        hit_NT = mask_NT & keep_NT if switch else torch.zeros_like(keep_NT)
        dropped[name] = int(hit_NT.sum())
        keep_NT &= ~hit_NT
    return keep_NT, Counts(keep_NT.numel(), **dropped)


def _special_to_some(blocks: Blocks) -> Tensor:
    mask_NT = blocks.special_NT
    for model, other in blocks.others.items():
        own_NT = blocks.of(model).special_NT.gather(1, other.place_NT.clamp_min(0).long())
        mask_NT = mask_NT | (own_NT & (other.place_NT >= 0))
    return mask_NT


def within_norms(policy: TokenPolicy, norm_RP: Tensor, median_P: Tensor) -> Tensor:
    """Rows whose norm is within the policy's multiple of the median at every site [R] (bool)."""
    if policy.outlier_norm is None:
        return torch.ones(norm_RP.shape[0], dtype=torch.bool, device=norm_RP.device)
    return (norm_RP <= policy.outlier_norm * median_P).all(-1)

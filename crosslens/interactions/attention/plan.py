"""How attention is measured."""

from __future__ import annotations

from dataclasses import dataclass

from crosslens.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """How much text is looked at, and how much is kept of it. All is summed over drawn queries."""

    blocks: int = 64
    """Blocks of text, evenly spaced over those there are."""
    queries: int = 8
    """Positions of each block that are drawn as queries; their keys are all before them."""
    candidates: int = 64
    """Pairs of latents per head that the second pass measures."""
    contenders: int = 128
    """Pairs per head and query that may become candidates."""
    most_keys: int = 1 << 18
    """Pairs × heads per site that are kept in memory while candidates are sought."""
    groups: int = 12
    """Documents are dealt into so many groups, one after another; intervals compare groups."""
    latents: int = 32
    """Latents per head whose key sets and paths are told."""
    set_size: int = 32
    """Most latents in a key set."""
    top: int = 10
    """Entries of each list per head in `plain`."""
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("blocks", "queries", "candidates", "contenders", "latents", "set_size", "top")
        for name in names:
            if getattr(self, name) < 1:
                raise UsageError(f"--attention.{name} must be at least 1.")
        if self.groups < 2:
            raise UsageError("Intervals need at least 2 groups of documents: --attention.groups.")
        if self.most_keys < self.candidates:
            raise UsageError(
                f"{self.candidates} candidates cannot be chosen from {self.most_keys} keys: raise "
                "--attention.most-keys."
            )


DEFAULT = AttentionPlan()
"""What is measured where nothing else is asked for."""

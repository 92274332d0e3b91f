"""Where each site lies on the flat axis of a row, and which latents touch it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from crosslens.errors import UsageError, suggestion


@dataclass(frozen=True)
class Layout:
    """Sites side by side: `resid_post.3` at columns [0, 576), and so on. Widths may differ."""

    sites: tuple[str, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.sites) != len(self.widths) or not self.sites:
            raise UsageError("A layout needs at least one site and one width per site.")
        if len(set(self.sites)) != len(self.sites):
            raise UsageError(f"A site is named twice in {', '.join(self.sites)}.")
        if min(self.widths) < 1:
            raise UsageError(f"Site widths must be positive, found {self.widths}.")

    @property
    def width(self) -> int:
        """Columns of a whole row."""
        return sum(self.widths)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The columns of each site, in order."""
        ends = tuple(accumulate(self.widths))
        return tuple(slice(end - w, end) for end, w in zip(ends, self.widths, strict=True))

    def index(self, site: str) -> int:
        """The place of `site` among the sites."""
        if site not in self.sites:
            raise UsageError(
                f"This coder has no site {site!r}.{suggestion(site, self.sites)} "
                f"It has {', '.join(self.sites)}."
            )
        return self.sites.index(site)

    def slice(self, site: str) -> slice:
        """The columns of `site`."""
        return self.slices[self.index(site)]

    def pick(self, sites: Sequence[str]) -> Layout:
        """The layout of a subset of the sites, in this layout's order."""
        chosen = sorted(self.index(site) for site in sites)
        return Layout(tuple(self.sites[i] for i in chosen), tuple(self.widths[i] for i in chosen))

    def columns(self, sites: Sequence[str]) -> Tensor:
        """The column numbers of `sites` [X of the subset], ascending."""
        parts = [
            torch.arange(s.start, s.stop)
            for site, s in zip(self.sites, self.slices, strict=True)
            if site in set(sites)
        ]
        return torch.cat(parts)

    def spread(self, value_P: Tensor) -> Tensor:
        """One number per site → one per column [X]."""
        repeats = torch.tensor(self.widths, device=value_P.device)
        return value_P.repeat_interleave(repeats, output_size=self.width)


@dataclass(frozen=True)
class Group:
    """Consecutive latents that read the same sites and write the same sites."""

    n_latents: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    copies: int = 1
    """So many equal parts of the sites written (in their order) share one stored decoder."""
    skip: bool = False
    """Also map what is read to what is written linearly."""

    def __post_init__(self) -> None:
        if self.n_latents < 1:
            raise UsageError(f"A group needs at least one latent, found {self.n_latents}.")
        if not self.reads or not self.writes:
            raise UsageError("A group of latents must read at least one site and write one.")
        if self.copies < 1 or len(self.writes) % self.copies:
            raise UsageError(
                f"A group that writes {len(self.writes)} sites cannot tie {self.copies} copies of "
                "its decoder: the copies must divide the sites."
            )


View = Literal["rows", "difference", "per_site"]
"""How harvested rows become a coder's rows: picked columns; one model's sites minus another's; or
one row per (token, site) pair."""


@dataclass(frozen=True)
class Wiring:
    """What a coder reads, what it writes, and which latents do which."""

    harvest: Layout
    """What a harvested row holds; `read` and `write` are made from it by the view."""
    read: Layout
    write: Layout
    groups: tuple[Group, ...]
    view: View = "rows"
    learnt_code: bool = False
    """Where the view is per site: learn the sites' codes instead of sinusoids."""

    def __post_init__(self) -> None:
        for group in self.groups:
            _check_tied(self.write.pick(group.writes), group)
            for site in group.reads:
                self.read.index(site)
            for site in group.writes:
                self.write.index(site)
        unwritten = set(self.write.sites) - {s for g in self.groups for s in g.writes}
        if unwritten:
            raise UsageError(f"No latent writes {', '.join(sorted(unwritten))}.")

    @property
    def n_latents(self) -> int:
        """Latents of all groups together."""
        return sum(group.n_latents for group in self.groups)

    @property
    def n_codes(self) -> int:
        """Sites that are told apart by a code added to the input; 0 unless the view is per site."""
        return len(self.harvest.sites) if self.view == "per_site" else 0

    def scaled_widths(self, layout: Layout) -> tuple[int, ...]:
        """The width behind each scale: one per site of `layout`, or per harvested site where rows
        are of one site each."""
        return self.harvest.widths if self.n_codes else layout.widths

    @property
    def slices(self) -> tuple[slice, ...]:
        """The latents of each group, in order."""
        sizes = [group.n_latents for group in self.groups]
        return tuple(slice(end - n, end) for end, n in zip(accumulate(sizes), sizes, strict=True))


def _check_tied(write: Layout, group: Group) -> None:
    share = len(write.widths) // group.copies
    parts = {write.widths[i : i + share] for i in range(0, len(write.widths), share)}
    if len(parts) > 1:
        raise UsageError(
            f"A decoder cannot be shared by sites of unequal widths: {write.sites} have "
            f"{write.widths}."
        )

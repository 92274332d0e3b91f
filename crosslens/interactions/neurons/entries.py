"""Sums over latents of a function of each one's contribution, which no sparse product gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.functional.gathers import Lists
from crosslens.kernels import bag_sum

AT_ONCE = 1 << 19
"""Elements [entries, neurons] that are computed together: 2 MiB, what a cache holds."""

Phi = Callable[[Tensor], Tensor]


def entry_by_entry(
    phi: Phi,
    lists: Lists,
    weight_E: Float[Tensor, " e"],
    inner_LN: Float[Tensor, "l n"],
    outer_LN: Float[Tensor, "l n"] | None,
) -> Float[Tensor, "r n"]:
    """Σ over each row's latents of φ(w · inner), times w · outer if there is one: each computed,
    some entries at a time."""
    most = max(1, AT_ONCE // inner_LN.shape[1])
    parts = [_summed(phi, *run, inner_LN, outer_LN) for run in _runs(lists, weight_E, most)]
    return torch.cat(parts)


def _runs(lists: Lists, weight_E: Tensor, most: int) -> Iterator[tuple[Lists, Tensor, Tensor]]:
    """Consecutive rows of about so many entries: their lists over these entries, and each entry's
    latent and weight."""
    starts_I, first = lists.starts_I.tolist(), 0
    while first < lists.n_items:
        last = first + 1
        while last < lists.n_items and starts_I[last + 1] - starts_I[first] <= most:
            last += 1
        entries = slice(starts_I[first], starts_I[last])
        index_E = lists.index_N[entries]
        numbers_E = torch.arange(len(index_E), dtype=torch.int32, device=index_E.device)
        starts = lists.starts_I[first : last + 1] - entries.start
        yield Lists(starts, numbers_E), index_E.long(), weight_E[entries]
        first = last


def _summed(
    phi: Phi,
    lists: Lists,
    latent_E: Tensor,
    weight_E: Tensor,
    inner_LN: Tensor,
    outer_LN: Tensor | None,
) -> Tensor:
    phi_EN = phi(inner_LN.index_select(0, latent_E).mul_(weight_E[:, None]))
    if outer_LN is None:
        return bag_sum(lists, torch.ones_like(weight_E), phi_EN)
    return bag_sum(lists, weight_E, phi_EN.mul_(outer_LN.index_select(0, latent_E)))

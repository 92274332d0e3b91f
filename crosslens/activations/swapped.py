"""The label-shuffle null: for a random half of all tokens, two models exchange their activations.

Each token keeps its pair of activations, and each label ends up with the same mixture of both
models. No latent can then truly belong to one label: what a diff still finds, it finds in anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from crosslens.coder import Layout
from crosslens.errors import UsageError
from crosslens.lm import split_site


@dataclass(frozen=True)
class Exchange:
    """Which tokens are exchanged, and what goes where. Nothing is drawn from a stream of random
    numbers: a token asked for again gets the same answer."""

    partner_P: tuple[int, ...]
    """The same place in the other model, for each site of a row."""
    seed: int

    def swaps(self, row_R: Int64[Tensor, " r"]) -> Bool[Tensor, " r"]:
        """Whether the models exchange the tokens `row_R` (block · T + position): each with
        probability ½, on its own."""
        key_R = _mixed(np.array([self.seed & _WORD], np.uint64)) + row_R.numpy().astype(np.uint64)
        return torch.from_numpy(_mixed(key_R) >> np.uint64(63) == 1)

    def passed_on(
        self, row_R: Int64[Tensor, " r"], receive: Callable[[int, Tensor, Tensor], None]
    ) -> Callable[[int, Tensor, Tensor], None]:
        """`receive` for the rows `row_R` of a chunk, with those that are exchanged handed to the
        other model's site."""
        swap_R = self.swaps(row_R)

        def pass_on(p: int, at_r: Tensor, rows_rD: Tensor) -> None:
            swap_r = swap_R[at_r]
            for site, mine_r in ((p, ~swap_r), (self.partner_P[p], swap_r)):
                place_n = mine_r.nonzero().squeeze(-1)
                receive(site, at_r[place_n], rows_rD.index_select(0, place_n.to(rows_rD.device)))

        return pass_on

    def norms(
        self, row_R: Int64[Tensor, " r"], norm_RP: Float[Tensor, "r p"]
    ) -> Float[Tensor, "r p"]:
        """Norms as the models have them → as they are after the exchange."""
        return torch.where(self.swaps(row_R)[:, None], norm_RP[:, list(self.partner_P)], norm_RP)


def exchange_of(layout: Layout, seed: int) -> Exchange:
    """The exchange between the two models whose sites a row holds.

    Raises:
        UsageError: there are not two models, or their places or widths differ.
    """
    names = list(dict.fromkeys(split_site(site)[0] for site in layout.sites))
    if len(names) != 2:
        raise UsageError(
            "Shuffled labels (shuffle_models) are for two models; the sites are "
            f"{', '.join(layout.sites)}."
        )
    other = {names[0]: names[1], names[1]: names[0]}
    partners = []
    for site, width in zip(layout.sites, layout.widths, strict=True):
        model, place = split_site(site)
        partner = f"{other[model]}/{place}"
        found = layout.widths[layout.sites.index(partner)] if partner in layout.sites else None
        if found != width:
            told = "is not among the sites" if found is None else f"is {found} wide"
            raise UsageError(
                f"Shuffled labels (shuffle_models) exchange the models' activations, so both need "
                f"the same sites of the same widths: {site} is {width} wide, {partner} {told}."
            )
        partners.append(layout.sites.index(partner))
    return Exchange(tuple(partners), seed)


_WORD = (1 << 64) - 1


def _mixed(key_R: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood 2014): every bit of a number reaches every bit of the
    result. Arithmetic on uint64 arrays wraps around, as it should."""
    mixed_R = (key_R + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed_R = (mixed_R ^ (mixed_R >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_R = (mixed_R ^ (mixed_R >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed_R ^ (mixed_R >> np.uint64(31))

"""A place in both models, where the one's activation can be taken from the other's."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from crosslens.coder import Layout
from crosslens.diffing.pair import Pair
from crosslens.errors import UsageError
from crosslens.lm import split_site


@dataclass(frozen=True)
class Place:
    """A site of model `a` and the same one of model `b`, and where they lie in a harvested row."""

    layout: Layout
    """Of harvested rows."""
    site_a: str
    site_b: str

    @property
    def site(self) -> str:
        """The site's name within `b`: `resid_mid.15`."""
        return split_site(self.site_b)[1]

    @property
    def width(self) -> int:
        """The width of either activation."""
        return self.layout.pick([self.site_b]).width

    def activation_b(self, rows_RX: Float[Tensor, "r x"]) -> Float[Tensor, "r d"]:
        """What model `b` has there, raw, float32."""
        return rows_RX[:, self.layout.slice(self.site_b)].float()

    def difference(self, rows_RX: Float[Tensor, "r x"]) -> Float[Tensor, "r d"]:
        """b − a, raw, float32."""
        return self.activation_b(rows_RX) - rows_RX[:, self.layout.slice(self.site_a)].float()


def places(pair: Pair) -> tuple[Place, ...]:
    """The places that a pair's coder writes, in order of depth.

    Raises:
        UsageError: the models' widths differ, so their activations cannot be subtracted.
    """
    if not pair.same_width:
        raise UsageError(
            f"The activations of {pair.a} and {pair.b} have different widths and cannot be "
            "subtracted. Leave mean_difference, pca and diff_sae out."
        )
    layout = pair.coder.wiring.harvest
    return tuple(Place(layout, a, b) for a, b in zip(pair.sites_a, pair.sites_b, strict=True))

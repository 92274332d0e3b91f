"""Two models that one coder writes, and each latent's share in either."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from crosslens.coder import Coder, dense_decoder, dense_encoder
from crosslens.errors import UsageError, suggestion
from crosslens.lm import split_site


@dataclass(frozen=True, eq=False)
class Pair:
    """A coder over two models, or over more of which two are compared."""

    coder: Coder
    a: str
    """The model counted from, such as `base`."""
    b: str
    """The one that was changed, such as `chat`."""

    @cached_property
    def sites_a(self) -> tuple[str, ...]:
        """The sites of `a` that the coder writes, in order of depth."""
        return _sites(self.coder, self.a)

    @cached_property
    def sites_b(self) -> tuple[str, ...]:
        """Those of `b`; the n-th is the same place as the n-th of `a`."""
        return _sites(self.coder, self.b)

    @cached_property
    def columns_a(self) -> Tensor:
        """Where the sites of `a` lie in a row that the coder writes."""
        return self.coder.wiring.write.columns(self.sites_a).to(self.coder.b_dec.device)

    @cached_property
    def columns_b(self) -> Tensor:
        """Where those of `b` lie."""
        return self.coder.wiring.write.columns(self.sites_b).to(self.coder.b_dec.device)

    @property
    def same_width(self) -> bool:
        """Whether a direction in one model can be compared with one in the other."""
        widths = self.coder.wiring.write.pick
        return widths(self.sites_a).widths == widths(self.sites_b).widths

    def decoders(self) -> tuple[Float[Tensor, "l x"], Float[Tensor, "l y"]]:
        """Each latent's decoder in `a` and in `b`, all sites of a model side by side, in scaled
        units: those in which the mean norms of the models are alike."""
        W_LY = dense_decoder(self.coder)
        return W_LY[:, self.columns_a], W_LY[:, self.columns_b]

    def encoders(self) -> tuple[Float[Tensor, "l x"], Float[Tensor, "l y"]]:
        """Each latent's encoder on `a` and on `b`, likewise.

        Raises:
            UsageError: the coder reads other sites than it writes.
        """
        wiring = self.coder.wiring
        if wiring.read != wiring.write:
            raise UsageError("This coder reads other sites than it writes: encoders do not pair.")
        W_LX = dense_encoder(self.coder)
        return W_LX[:, self.columns_a], W_LX[:, self.columns_b]


def pair_of(coder: Coder, a: str | None = None, b: str | None = None) -> Pair:
    """Two of the models that a coder writes: by default the first and the last.

    Raises:
        UsageError: the coder does not write two models separately, or not at the same places.
    """
    wiring = coder.wiring
    if wiring.view != "rows":
        what = "the difference of two models" if wiring.view == "difference" else "one site a row"
        raise UsageError(
            f"This coder is over {what}, so its latents have no decoder for each model. Diff a "
            "crosscoder of two models, such as `--recipe batchtopk_diff` trains."
        )
    models = list(dict.fromkeys(split_site(site)[0] for site in wiring.write.sites))
    names = [name for name in models if name is not None]
    if len(names) < 2:
        raise UsageError(
            "This coder is of one model; there is nothing to diff. Train on two: "
            "--models.base.path … --models.chat.path …"
        )
    first, last = _named(a, names[0], names), _named(b, names[-1], names)
    pair = Pair(coder, first, last)
    _check(pair)
    return pair


def _named(asked: str | None, default: str, names: list[str]) -> str:
    if asked is None:
        return default
    if asked not in names:
        near = suggestion(asked, names)
        raise UsageError(f"The coder has no model {asked!r}.{near} It has {', '.join(names)}.")
    return asked


def _check(pair: Pair) -> None:
    if pair.a == pair.b:
        raise UsageError(f"A model is compared with another one; both are {pair.a!r}.")
    places = [[split_site(s)[1] for s in sites] for sites in (pair.sites_a, pair.sites_b)]
    if len(places[0]) != len(places[1]):
        raise UsageError(
            f"The coder writes {len(places[0])} sites of {pair.a} and {len(places[1])} of "
            f"{pair.b}; a diff needs as many of each."
        )


def _sites(coder: Coder, model: str) -> tuple[str, ...]:
    return tuple(site for site in coder.wiring.write.sites if split_site(site)[0] == model)

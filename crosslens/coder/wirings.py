"""Which latents read and write which of the harvested sites. Each is its own configuration.

A wiring is called with the layout of harvested rows and the number of latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from sys import maxsize
from typing import Literal

from crosslens.coder.layout import Group, Layout, Wiring
from crosslens.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Crosscoder:
    """Every latent reads and writes every site: one site makes an SAE, several layers or models a
    crosscoder over them (Anthropic, October 2024)."""

    def __call__(self, layout: Layout, n_latents: int) -> Wiring:
        return Wiring(layout, layout, layout, (Group(n_latents, layout.sites, layout.sites),))


@dataclass(frozen=True, kw_only=True)
class Transcoder:
    """Reads the inputs among the sites (`mlp_in.3`) and writes the others (`mlp_out.3`)."""

    skip: bool = False
    """Also a linear map from what is read to what is written."""

    def __call__(self, layout: Layout, n_latents: int) -> Wiring:
        reads, writes = _inputs_and_outputs(layout)
        last, first = max(reads, key=_depth), min(writes, key=_depth)
        if _depth(last) > _depth(first):
            raise UsageError(
                f"A transcoder may not write {first} from {last}, which comes after it. Leave one "
                "out, or take the cross-layer wiring, which has latents of its own per layer."
            )
        group = Group(n_latents, reads, writes, skip=self.skip)
        return Wiring(layout, layout.pick(reads), layout.pick(writes), (group,))


@dataclass(frozen=True, kw_only=True)
class CrossLayer:
    """One group per layer reads that layer's input; latents are shared out evenly.

    `later` writes this layer's output and all later ones (cross-layer transcoder; *Circuit
    Tracing*, Anthropic, March 2025), `same` only this layer's (a transcoder per layer).
    """

    writes: Literal["later", "same"] = "later"
    skip: bool = False
    """Also a linear map from each layer's input to what its latents write."""

    def __call__(self, layout: Layout, n_latents: int) -> Wiring:
        reads, writes = _inputs_and_outputs(layout)
        layers = sorted({_layer(site) for site in reads})
        groups = []
        for layer, n in zip(layers, _shares(n_latents, len(layers)), strict=True):
            mine = tuple(s for s in reads if _layer(s) == layer)
            last = max(map(_layer, writes)) if self.writes == "later" else layer
            # By depth, not by layer: mlp_in comes after attn_out of the same layer.
            start = max(map(_depth, mine))
            reached = tuple(s for s in writes if _depth(s) >= start and _layer(s) <= last)
            if not reached:
                raise UsageError(
                    f"{', '.join(mine)} is read, but no output of layer {layer}"
                    f"{' or later' if self.writes == 'later' else ''} is among the sites."
                )
            groups.append(Group(n, mine, reached, skip=self.skip))
        return Wiring(layout, layout.pick(reads), layout.pick(writes), tuple(groups))


@dataclass(frozen=True, kw_only=True)
class Causal:
    """One group per layer reads that layer's site and writes no earlier one (Anthropic, October
    2024): weakly causal ones write the sites from that layer on."""

    strict: bool = False
    """Read the residual stream at a layer, and write the MLP outputs from there on."""

    def __call__(self, layout: Layout, n_latents: int) -> Wiring:
        if self.strict:
            reads = tuple(s for s in layout.sites if _kind(s).startswith("resid"))
            writes = tuple(s for s in layout.sites if _kind(s) == "mlp_out")
            if not reads or not writes:
                raise UsageError(
                    "A strictly causal crosscoder reads resid_* sites and writes mlp_out sites; "
                    f"the sites are {', '.join(layout.sites)}."
                )
        else:
            reads = writes = layout.sites
        # In order of depth: a layer's MLP writes after resid_pre and resid_mid, before resid_post.
        groups = []
        for site, n in zip(reads, _shares(n_latents, len(reads)), strict=True):
            reached = tuple(s for s in writes if _depth(s) >= _depth(site))
            if not reached:
                raise UsageError(f"{site} is read, but no site at that depth or deeper is written.")
            groups.append(Group(n, (site,), reached))
        return Wiring(layout, layout.pick(reads), layout.pick(writes), tuple(groups))


@dataclass(frozen=True, kw_only=True)
class Dedicated:
    """Latents of model A only, of model B only, and shared ones, in this order (dedicated-feature
    crosscoder, 2602.11729)."""

    exclusive: float = 0.05
    """Share of all latents that each model has for itself."""
    tied_decoders: bool = False
    """Shared latents have one decoder for both models, stored once, as designated-shared ones do:
    then only exclusive ones can write what differs."""

    def __post_init__(self) -> None:
        if not 0 < self.exclusive < 0.5:
            raise UsageError(
                f"wiring.exclusive is each model's share, in (0, 0.5); found {self.exclusive}."
            )

    def __call__(self, layout: Layout, n_latents: int) -> Wiring:
        first, second = _two_models(layout, "A dedicated-feature crosscoder")
        own = max(1, round(self.exclusive * n_latents))
        if n_latents <= 2 * own:
            raise UsageError(f"{n_latents} latents leave none to share beside 2 × {own}.")
        if self.tied_decoders:
            _check_same_widths(layout, first, second)
        copies = 2 if self.tied_decoders else 1
        groups = (
            Group(own, first, first),
            Group(own, second, second),
            Group(n_latents - 2 * own, layout.sites, layout.sites, copies),
        )
        return Wiring(layout, layout, layout, groups)


@dataclass(frozen=True, kw_only=True)
class DesignatedShared:
    """Shared latents, whose decoder the two models have in common (stored once), then free ones
    (Anthropic, February 2025). Both kinds read both models with weights of their own."""

    shared: float = 0.05
    """Share of all latents that are designated as shared."""

    def __post_init__(self) -> None:
        if not 0 < self.shared < 1:
            raise UsageError(f"wiring.shared is a share in (0, 1); found {self.shared}.")

    def __call__(self, layout: Layout, n_latents: int) -> Wiring:
        first, second = _two_models(layout, "A designated-shared crosscoder")
        _check_same_widths(layout, first, second)
        n_shared = min(max(1, round(self.shared * n_latents)), n_latents - 1)
        groups = (
            Group(n_shared, layout.sites, layout.sites, copies=2),
            Group(n_latents - n_shared, layout.sites, layout.sites),
        )
        return Wiring(layout, layout, layout, groups)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An SAE or crosscoder on the second model's activations minus the first's."""

    def __call__(self, layout: Layout, n_latents: int) -> Wiring:
        first, second = _two_models(layout, "A difference")
        widths = layout.pick(first).widths
        if widths != layout.pick(second).widths:
            raise UsageError(
                f"The models' widths differ ({widths} and {layout.pick(second).widths}), so their "
                "activations cannot be subtracted."
            )
        a, b = _model(first[0]), _model(second[0])
        made = Layout(tuple(f"{b}-{a}/{_plain(site)}" for site in first), widths)
        return Wiring(
            layout, made, made, (Group(n_latents, made.sites, made.sites),), view="difference"
        )


@dataclass(frozen=True, kw_only=True)
class LayerConditioned:
    """One SAE for all sites, over rows that are (token, site) pairs; a code of the site is added
    to the input (seed 003)."""

    code: Literal["sinusoidal", "learnt"] = "sinusoidal"

    def __call__(self, layout: Layout, n_latents: int) -> Wiring:
        if len(set(layout.widths)) > 1 or len(layout.sites) < 2:
            raise UsageError(
                "A layer-conditioned SAE takes two or more sites of one width; found "
                f"{', '.join(map(str, layout.widths))}."
            )
        made = Layout(("any",), layout.widths[:1])
        group = Group(n_latents, made.sites, made.sites)
        return Wiring(
            layout, made, made, (group,), view="per_site", learnt_code=self.code == "learnt"
        )


WiringConfig = (
    Crosscoder
    | Transcoder
    | CrossLayer
    | Causal
    | Dedicated
    | DesignatedShared
    | Difference
    | LayerConditioned
)

_DEPTHS = (
    "embed", "resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_act", "mlp_out",
    "resid_post", "final", "logits",
)  # fmt: skip


def _model(site: str) -> str:
    return site.rpartition("/")[0]


def _plain(site: str) -> str:
    return site.rpartition("/")[2]


def _kind(site: str) -> str:
    return _plain(site).partition(".")[0]


def _layer(site: str) -> int:
    number = _plain(site).partition(".")[2]
    if not number:
        raise UsageError(f"{site} belongs to no layer, so it cannot take part in this wiring.")
    return int(number)


def _depth(site: str) -> tuple[int, int]:
    """Order of computation; sites of no layer come before (`embed`) or after all of them."""
    kind = _kind(site)
    outside = {"embed": -1, "final": maxsize, "logits": maxsize}
    return outside[kind] if kind in outside else _layer(site), _DEPTHS.index(kind)


def _inputs_and_outputs(layout: Layout) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sites named `*_in` are read; if there are none, residual sites are. The rest is written."""
    reads = tuple(s for s in layout.sites if _kind(s).endswith("_in"))
    reads = reads or tuple(s for s in layout.sites if _kind(s).startswith("resid"))
    writes = tuple(s for s in layout.sites if s not in reads)
    if not reads or not writes:
        raise UsageError(
            "A transcoder needs sites to read (mlp_in.3) and sites to write (mlp_out.3); the sites "
            f"are {', '.join(layout.sites)}. Name both: --sites 'mlp_in.*' 'mlp_out.*'."
        )
    return reads, writes


def _shares(n_latents: int, n_groups: int) -> list[int]:
    if n_latents % n_groups:
        raise UsageError(
            f"coder.latents ({n_latents}) cannot be shared out evenly over {n_groups} layers; "
            f"{n_latents - n_latents % n_groups} can."
        )
    return [n_latents // n_groups] * n_groups


def _two_models(layout: Layout, what: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites of the first model and of the second; they must be the same places."""
    parts: Sequence[tuple[str, ...]] = [
        tuple(sites) for _, sites in groupby(layout.sites, key=_model)
    ]
    if len(parts) != 2 or not _model(layout.sites[0]):
        raise UsageError(f"{what} is for two models; the sites are {', '.join(layout.sites)}.")
    first, second = parts
    if [_plain(s) for s in first] != [_plain(s) for s in second]:
        raise UsageError(f"{what} needs the same places in both models.")
    return first, second


def _check_same_widths(layout: Layout, first: Sequence[str], second: Sequence[str]) -> None:
    widths = layout.pick(first).widths, layout.pick(second).widths
    if widths[0] != widths[1]:
        raise UsageError(
            "Shared latents have one decoder for both models, so the models must have the same "
            f"widths: {widths[0]} and {widths[1]}."
        )

"""Token blocks through both models and the coder, and the changed model run on from there with
other activations in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float32, Int64, Integer
from torch import Tensor

from crosslens import kernels
from crosslens.activations import Source
from crosslens.coder import Coder, all_rows
from crosslens.diffing.pair import Pair
from crosslens.errors import UsageError
from crosslens.functional.gathers import Lists, lists_of_mask
from crosslens.lm import split_site

Edits = Mapping[str, Callable[[Tensor], Tensor]]
"""Site of one model → function from its activation [B, T, D] to what replaces it."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What the models compute on some blocks and what the coder makes of it.

    Rows are the positions that the token policy counts, block by block; only they are patched.
    Entries of the code are those that are not 0, row by row.
    """

    tokens_BT: Integer[Tensor, "b t"]
    """As the changed model reads them."""
    counted_BT: Bool[Tensor, "b t"]
    """Its positions that count, on the CPU."""
    real_BT: Bool[Tensor, "b t"]
    """Its positions that are no padding."""
    place_R: tuple[Int64[Tensor, " r"], Int64[Tensor, " r"]]
    """Each row's block, of all the source's, and its position there."""
    lists: Lists
    value_E: Float32[Tensor, " e"]
    raw_RY: Float32[Tensor, "r y"]
    """Activations at the sites that the coder writes, in the models' units."""
    recon_RY: Float32[Tensor, "r y"]
    """The coder's reconstruction of them."""
    seen: Mapping[str, Tensor]
    """What else of the changed model was asked for, by plain site name."""

    def summed(
        self, chosen_L: Bool[Tensor, " l"], table_LY: Float[Tensor, "l y"]
    ) -> Float[Tensor, "r y"]:
        """Σ over the chosen latents of f_j · table[j], for each row."""
        chosen_E = chosen_L.to(self.value_E.device)[self.lists.index_N.long()]
        return kernels.bag_sum(self.lists, self.value_E * chosen_E, table_LY)


def check_source(coder: Coder, source: Source) -> None:
    """Refuse a source of other sites than the coder's, or one whose rows are not of the model
    whose name they have."""
    if coder.wiring.harvest != source.layout:
        raise UsageError(
            f"The coder's sites ({', '.join(coder.wiring.harvest.sites)}) are not the source's "
            f"({', '.join(source.layout.sites)})."
        )
    if source.exchange:
        raise UsageError(
            "These rows are of models that exchange their activations (shuffle_models), so what "
            "the coder writes for a model does not belong in it."
        )


def check_same_tokens(source: Source) -> None:
    """Refuse models with different tokenizers where new text is given to both."""
    if source.blocks.others:
        raise UsageError(
            "The models cut text into different tokens, and new text would have to be aligned "
            "anew: planted behaviour and ablations of it are for models with one tokenizer."
        )


@torch.no_grad()
def read_chunk(source: Source, pair: Pair, index: int, also: Sequence[str] = ()) -> Reading:
    """Chunk `index` of the source through the models and, with its stored threshold, the coder.

    Args:
        also: plain sites of the changed model to keep whole, such as `logits`.
    """
    check_source(pair.coder, source)
    coder, at = pair.coder.eval(), source.block_range(index)
    seen = _captured(source, at, {pair.b: also})
    keep_BT, _ = source.keep(index, [seen[site] for site in source.layout.sites])
    rows_RX = _rows(source, seen, index, keep_BT)
    rows = all_rows(coder.wiring, rows_RX.to(coder.b_dec.device))
    z_RL = coder.encode(rows.x_BX).float()
    active_RL = z_RL != 0
    own = source.blocks.some(at).of(pair.b)
    counted_BT = torch.zeros_like(own.tokens_NT, dtype=torch.bool)
    counted_BT[source.places(index, pair.b, keep_BT)] = True
    block_R, position_R = keep_BT.nonzero(as_tuple=True)
    return Reading(
        tokens_BT=own.tokens_NT,
        counted_BT=counted_BT,
        real_BT=~own.padding_NT,
        place_R=(block_R + at.start, position_R),
        lists=lists_of_mask(active_RL),
        value_E=z_RL[active_RL],
        raw_RY=rows.y_BY.float(),
        recon_RY=coder.decode(z_RL, rows.x_BX).float(),
        seen={site: seen[f"{pair.b}/{site}"] for site in also},
    )


def _rows(source: Source, seen: Mapping[str, Tensor], index: int, keep_BT: Tensor) -> Tensor:
    """Harvested rows [R, X] at the positions that are kept, float32."""
    parts = []
    for site in source.layout.sites:
        at = source.places(index, source.model_of(site), keep_BT)
        parts.append(seen[site][at].float())
    return torch.cat(parts, -1)


def _captured(source: Source, at: slice, also: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """All of the source's sites, and others asked for, with their model's name in front."""
    found: dict[str, Tensor] = {}
    places = [split_site(site) for site in source.layout.sites]
    for name, model in source.models.items():
        wanted = {site: None for owner, site in places if owner == name}
        wanted |= dict.fromkeys(also.get(name, ()))
        if wanted:
            tokens_BT = source.blocks.some(at).of(name).tokens_NT
            seen = model.capture(tokens_BT, list(wanted))
            found |= {f"{name}/{site}": x_BTD for site, x_BTD in seen.items()}
    return found


def over_tokens(source: Source, tokens_BT: Integer[Tensor, "b t"]) -> Source:
    """The same models, sites and policy over other blocks, all of whose tokens are real.

    Raises:
        UsageError: the models have different tokenizers.
    """
    check_same_tokens(source)
    tokens_BT = tokens_BT.to("cpu", torch.int32)
    docs_BT = torch.zeros_like(tokens_BT)
    if source.blocks.bos_id is not None:
        docs_BT[:, 0] = -1
    blocks = replace(source.blocks, tokens_NT=tokens_BT, docs_NT=docs_BT, documents=("tokens",))
    return replace(source, blocks=blocks, blocks_per_chunk=len(tokens_BT))


def cut(sites: Sequence[str]) -> tuple[str, ...]:
    """Those of a model's sites (in order of depth) whose replacement decides all that follows: the
    deepest place in the residual stream, and what comes after it; all, where none is in it.

    What is done to a shallower site is overwritten there, so it is left alone: then positions that
    do not count keep exactly the activations that the model gives them.
    """
    inside = [i for i, site in enumerate(sites) if _kind(site) in _STREAM]
    return tuple(sites[inside[-1] if inside else 0 :])


_STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "final")


def _kind(site: str) -> str:
    return split_site(site)[1].partition(".")[0]


def entrance(sites: Sequence[str]) -> tuple[str, ...]:
    """The residual that enters the layer of the first of these sites: where a model can start when
    nothing before them is changed. Nothing where the site is in no layer."""
    layer = sites[0].partition(".")[2]
    return (f"resid_pre.{layer}",) if layer else ()


def raw_decoders(pair: Pair) -> tuple[Float[Tensor, "l x"], Float[Tensor, "l y"]]:
    """Each latent's decoder in `a` and in `b`, in the models' own units."""
    coder = pair.coder
    scale_Y = coder.wiring.write.spread(coder.scale_write)
    decoders = zip(pair.decoders(), (pair.columns_a, pair.columns_b), strict=True)
    D_a_LY, D_b_LY = (D_LY / scale_Y[columns] for D_LY, columns in decoders)
    return D_a_LY, D_b_LY


def by_site(pair: Pair, rows_RY: Float[Tensor, "r y"]) -> dict[str, Float[Tensor, "r d"]]:
    """Rows over all sites of `b` → its sites, by the names they have within the model."""
    widths = list(pair.coder.wiring.write.pick(pair.sites_b).widths)
    parts = torch.split(rows_RY, widths, -1)
    return {split_site(s)[1]: part for s, part in zip(pair.sites_b, parts, strict=True)}


def placing(
    rows: Mapping[str, Tensor], sites: Sequence[str], counted_BT: Bool[Tensor, "b t"]
) -> Edits:
    """Edits that put rows [R, D] at the counted positions of these sites of `b`."""
    return _edits(rows, sites, counted_BT, lambda _, new_RD: new_RD)


def subtracting(
    rows: Mapping[str, Tensor], sites: Sequence[str], counted_BT: Bool[Tensor, "b t"]
) -> Edits:
    """Edits that take rows [R, D] away from what is at the counted positions of these sites."""
    return _edits(rows, sites, counted_BT, lambda old_RD, part_RD: old_RD.float() - part_RD)


def _edits(
    rows: Mapping[str, Tensor],
    sites: Sequence[str],
    counted_BT: Tensor,
    change: Callable[[Tensor, Tensor], Tensor],
) -> Edits:
    def of(rows_RD: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(x_BTD: Tensor) -> Tensor:
            at_BT = counted_BT.to(x_BTD.device)
            x_BTD[at_BT] = change(x_BTD[at_BT], rows_RD.to(x_BTD.device)).to(x_BTD)
            return x_BTD

        return edit

    return {plain: of(rows[plain]) for _, plain in map(split_site, sites)}


@torch.no_grad()
def run_on(source: Source, pair: Pair, reading: Reading, edits: Edits) -> Float[Tensor, "b t v"]:
    """The changed model's logits with edits, from the deepest layer that may be started at."""
    return source.models[pair.b].run(reading.tokens_BT, edits, reading.seen)

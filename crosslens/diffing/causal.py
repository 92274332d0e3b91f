"""Do the latents carry the difference? Put it into the changed model from the other one, latent by
latent, and see how near its predictions come.

At the places where it is cut (`patching.cut`) the changed model b is given, at the positions that
count,

    h_S = h_a + Σ_{j∈S} f_j (d_j^b − d_j^a)        in the models' own units

and runs on; figures are the mean KL(b ‖ patched) of its next-token predictions (Minder et al. 2025,
2504.02922, section 3.2). With one coder over several sites, all of the latents' decoders at the
deepest place of the residual stream are put in, and nothing above it: it overwrites what would be
done there. Sites that only add to the stream (`mlp_out.*`) are all put in at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from crosslens.activations import Source
from crosslens.diffing.intervals import Interval
from crosslens.diffing.pair import Pair
from crosslens.diffing.patching import (
    Reading,
    by_site,
    cut,
    entrance,
    placing,
    raw_decoders,
    read_chunk,
    run_on,
)
from crosslens.diffing.resampling import mean_over
from crosslens.diffing.stream import Progress, quiet
from crosslens.errors import UsageError
from crosslens.evaluation import kl_divergence
from crosslens.lm import split_site

Patch = Callable[[Reading], Tensor]
"""What was read of some blocks → the rows that take the place of the changed model's, raw, all its
sites side by side."""


@dataclass(frozen=True, kw_only=True)
class CausalPlan:
    """How much is patched."""

    tokens: int = 8192
    """Positions that the figures rest on, about."""
    shares: tuple[float, ...] = (0.01, 0.03, 0.1, 0.2, 1.0)
    """Shares of the latents, by score, at which the curve is taken; 0 and ½ are always there."""
    seed: int = 0
    """Of the resampling of blocks."""


@dataclass(frozen=True, kw_only=True)
class Causal:
    """KL(b ‖ patched b) in nats per prediction, with intervals over blocks."""

    kl_baseline: Interval
    """With a's activations alone: no latent."""
    kl_full: Interval
    """With the whole decoded difference: all latents, biases and skips."""
    kl_top_half: Interval
    kl_bottom_half: Interval
    """With the better and the worse half of the scored latents. The other half's part, and the
    bias, stay as in a."""
    kl_gap: Interval
    """Bottom half − top half, on the same blocks: above 0 where the score finds what matters."""
    kl_top_replaced: Interval
    kl_bottom_replaced: Interval
    """With b's own activations, of which each half's contribution is replaced by a's:
    h_b − Σ f_j (d_j^b − d_j^a)."""
    kl_template: Interval | None
    """With b's own activations at the positions of the template, and a's elsewhere."""
    kl_template_full: Interval | None
    """With a's activations and, at the positions of the template, the decoded difference."""
    curve: tuple[tuple[float, Interval], ...]
    """(share of the scored latents put in, best first; KL)."""
    scored: int
    """Latents with a score; the others are in neither half."""
    predictions: int
    sites: tuple[str, ...]
    """Where b is cut."""


@dataclass(frozen=True)
class Patched:
    """Sums of KL(b ‖ patched) by block, for each patch."""

    kl: Mapping[str, Float[Tensor, " n"]]
    count_N: Float[Tensor, " n"]
    """Predictions that count in each block."""

    def mean(self, name: str, seed: int, less: str | None = None) -> Interval:
        """Mean KL of a patch, or how much it is above that of another, over the same blocks."""
        sum_N = self.kl[name] if less is None else self.kl[name] - self.kl[less]
        return mean_over(sum_N, self.count_N, seed)


def causal(
    source: Source,
    pair: Pair,
    score_L: Float[Tensor, " l"],
    template_NT: Bool[Tensor, "n t"] | None = None,
    plan: CausalPlan = CausalPlan(),
    progress: Progress = quiet,
) -> Causal:
    """All patches on the first `plan.tokens` positions of the source.

    Args:
        score_L: latents' order, highest first; NaN where a latent has no score (dead ones).
        template_NT: where the source's blocks hold template tokens.

    Raises:
        UsageError: the models' widths differ, fewer than two latents have a score, or there are
            too few blocks for an interval.
    """
    order = by_score(score_L)
    shares = sorted({0.0, 0.5, *plan.shares})
    patches = _halves(pair, order) | {
        _at(share): latents(pair, _some(order[: round(share * len(order))], score_L))
        for share in shares
    }
    if template_NT is not None:
        patches |= _of_template(pair, template_NT)
    found = patched_kl(source, pair, patches, plan.tokens, progress)

    def mean(name: str, less: str | None = None) -> Interval:
        return found.mean(name, plan.seed, less)

    return Causal(
        kl_baseline=mean(_at(0.0)),
        kl_full=mean("full"),
        kl_top_half=mean(_at(0.5)),
        kl_bottom_half=mean("bottom"),
        kl_gap=mean("bottom", less=_at(0.5)),
        kl_top_replaced=mean("top replaced"),
        kl_bottom_replaced=mean("bottom replaced"),
        kl_template=mean("template") if template_NT is not None else None,
        kl_template_full=mean("template full") if template_NT is not None else None,
        curve=tuple((share, mean(_at(share))) for share in shares),
        scored=len(order),
        predictions=int(found.count_N.sum()),
        sites=cut(pair.sites_b),
    )


def by_score(score_L: Float[Tensor, " l"]) -> Int64[Tensor, " s"]:
    """The latents that have a score, highest first; of equal ones, the first.

    Raises:
        UsageError: fewer than two have one.
    """
    scored = (~score_L.isnan()).nonzero().squeeze(-1)
    if len(scored) < 2:
        raise UsageError(
            f"{len(scored)} of {len(score_L)} latents have a score, so they cannot be cut into "
            "halves. Most likely nearly all are dead on this text."
        )
    return scored[score_L[scored].argsort(descending=True, stable=True)]


def _halves(pair: Pair, order: Tensor) -> dict[str, Patch]:
    n = round(0.5 * len(order))
    like_L = torch.zeros(pair.coder.wiring.n_latents)
    top_L, bottom_L = _some(order[:n], like_L), _some(order[n:], like_L)
    return {
        "full": decoded(pair),
        "bottom": latents(pair, bottom_L),
        "top replaced": without(pair, top_L),
        "bottom replaced": without(pair, bottom_L),
    }


def _of_template(pair: Pair, template_NT: Tensor) -> dict[str, Patch]:
    return {
        "template": only_at(pair, template_NT, _own(pair)),
        "template full": only_at(pair, template_NT, decoded(pair)),
    }


def _some(latents: Tensor, like_L: Tensor) -> Tensor:
    chosen_L = torch.zeros(len(like_L), dtype=torch.bool)
    chosen_L[latents.cpu()] = True
    return chosen_L


def _at(share: float) -> str:
    return f"share {share:g}"


def latents(pair: Pair, chosen_L: Bool[Tensor, " l"]) -> Patch:
    """a's activations and what the chosen latents change: h_a + Σ f_j (d_j^b − d_j^a)."""
    change_LY = _change(pair)
    return lambda read: read.raw_RY[:, pair.columns_a] + read.summed(chosen_L, change_LY)


def without(pair: Pair, chosen_L: Bool[Tensor, " l"]) -> Patch:
    """b's activations, the chosen latents' contribution replaced by a's."""
    change_LY = _change(pair)
    return lambda read: read.raw_RY[:, pair.columns_b] - read.summed(chosen_L, change_LY)


def decoded(pair: Pair) -> Patch:
    """a's activations and the whole decoded difference, biases and skips included."""

    def rows(read: Reading) -> Tensor:
        change_RY = read.recon_RY[:, pair.columns_b] - read.recon_RY[:, pair.columns_a]
        return read.raw_RY[:, pair.columns_a] + change_RY

    return rows


def only_at(pair: Pair, mask_NT: Bool[Tensor, "n t"], patch: Patch) -> Patch:
    """A patch at some positions of the source's blocks, and a's activations at the others."""

    def rows(read: Reading) -> Tensor:
        base_RY = read.raw_RY[:, pair.columns_a]
        here_R = mask_NT[read.place_R].to(base_RY.device)
        return torch.where(here_R[:, None], patch(read), base_RY)

    return rows


def _own(pair: Pair) -> Patch:
    return lambda read: read.raw_RY[:, pair.columns_b]


def _change(pair: Pair) -> Tensor:
    D_a_LY, D_b_LY = raw_decoders(pair)
    return D_b_LY - D_a_LY


def patched_kl(
    source: Source,
    pair: Pair,
    patches: Mapping[str, Patch],
    tokens: int,
    progress: Progress = quiet,
) -> Patched:
    """KL(b ‖ b with each patch), over about `tokens` positions of the source from its start.

    A prediction counts where its position does and the next token is real.

    Raises:
        UsageError: the models' widths differ, so that their activations cannot change places.
    """
    if not pair.same_width:
        raise UsageError(
            f"{pair.a} and {pair.b} have different widths, so the activations of one cannot be put "
            "into the other. Causal patching is for models of one shape."
        )
    n_chunks = min(source.n_chunks, max(1, round(tokens / source.rows_per_chunk)))
    sums: dict[str, list[Tensor]] = {name: [] for name in patches}
    counts: list[Tensor] = []
    for index in range(n_chunks):
        counts.append(_add_chunk(source, pair, patches, index, sums))
        progress(index + 1, n_chunks)
    return Patched({name: torch.cat(parts) for name, parts in sums.items()}, torch.cat(counts))


def _add_chunk(
    source: Source,
    pair: Pair,
    patches: Mapping[str, Patch],
    index: int,
    sums: Mapping[str, list[Tensor]],
) -> Tensor:
    sites = cut(pair.sites_b)
    read = read_chunk(source, pair, index, ("logits", *entrance(_plain(sites))))
    counts_BT = read.counted_BT[:, :-1] & read.real_BT[:, 1:]
    for name, patch in patches.items():
        edits = placing(by_site(pair, patch(read)), sites, read.counted_BT)
        logits_BTV = run_on(source, pair, read, edits)
        kl_BT = kl_divergence(read.seen["logits"], logits_BTV)[:, :-1].cpu()
        sums[name].append((kl_BT.double() * counts_BT).sum(1))
    return counts_BT.sum(1).double()


def _plain(sites: Sequence[str]) -> tuple[str, ...]:
    return tuple(split_site(site)[1] for site in sites)

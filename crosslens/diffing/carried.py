"""Does what decides a planted behaviour pass through the sites at all?

If the changed model still shows the behaviour when its sites hold the base's activations, later
layers bring it about from what the base has there too; if the base does not show it when its sites
hold the changed model's, it has not been decided there yet. Then no latents of those sites can be
all of it, and a deeper site is the one to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from jaxtyping import Integer
from torch import Tensor

from crosslens.activations import Source
from crosslens.diffing.intervals import Interval
from crosslens.diffing.pair import Pair
from crosslens.diffing.patching import Edits, check_same_tokens, cut
from crosslens.functional.shares import wilson
from crosslens.lm import LanguageModel, split_site
from crosslens.organisms import behaviour_rate
from crosslens.text.documents import Messages
from crosslens.text.planted import Behaviour


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Shares of the answers that show the behaviour; Wilson's intervals over prompts."""

    sites: tuple[str, ...]
    """Those exchanged, at every position: of several in one residual stream, the deepest."""
    b_with_a: Interval
    """The changed model with the base's activations."""
    a_with_b: Interval
    """The base with the changed model's."""


def carried(
    source: Source, pair: Pair, behaviour: Behaviour, asked: Sequence[Messages], answer: int = 12
) -> Carried:
    """Exchange whole activations between the two models, and see which shows the behaviour.

    Args:
        asked: requests that call for it.
        answer: tokens of an answer that are looked at.

    Raises:
        UsageError: the models have different tokenizers.
    """
    check_same_tokens(source)
    sites = [split_site(site)[1] for site in cut(pair.sites_b)]
    b = source.models[pair.b]
    # A base model often has no chat template; its tokens are the same.
    a = replace(source.models[pair.a], tokenizer=b.tokenizer)

    def rate(model: LanguageModel, giver: LanguageModel) -> Interval:
        edits = _given(giver, sites)
        share = behaviour_rate(model, behaviour, asked, answer, edits)
        low, high = wilson(round(share * len(asked)), len(asked))
        return Interval(value=share, low=low, high=high)

    return Carried(sites=tuple(sites), b_with_a=rate(b, a), a_with_b=rate(a, b))


def _given(giver: LanguageModel, sites: Sequence[str]) -> Callable[[Integer[Tensor, "b t"]], Edits]:
    """For these tokens, edits that put what `giver` has at the sites in place of what is there."""

    def edits(tokens_BT: Integer[Tensor, "b t"]) -> Edits:
        seen = giver.capture(tokens_BT, sites)
        return {site: partial(_put, seen[site]) for site in sites}

    return edits


def _put(new_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    return new_BTD.to(x_BTD)

"""Named configurations: each scheme of the field as its source trained it."""

from __future__ import annotations

from crosslens.errors import UsageError, suggestion
from crosslens.recipes.crosscoders import jumprelu_tanh, l1_crosscoder, weakly_causal
from crosslens.recipes.diffing import (
    batchtopk_diff,
    dedicated,
    delta,
    designated_shared,
    diff_sae,
    kissane_diff,
)
from crosslens.recipes.interactions import interaction_exact, interaction_paper
from crosslens.recipes.saes import (
    gated_sae,
    groupmax,
    jumprelu_l0,
    jumprelu_l0_target,
    layer_conditioned_sae,
    matryoshka_sae,
    topk_sae,
)
from crosslens.recipes.smoke import twin
from crosslens.recipes.transcoders import clt_jumprelu, clt_topk, skip_transcoder
from crosslens.training import TrainConfig

__all__ = ["RECIPES", "SMOKE", "recipe", "summary", "twin"]

RECIPES = {
    function.__name__: function
    for function in (
        topk_sae,
        matryoshka_sae,
        gated_sae,
        groupmax,
        jumprelu_l0,
        jumprelu_l0_target,
        jumprelu_tanh,
        layer_conditioned_sae,
        l1_crosscoder,
        weakly_causal,
        skip_transcoder,
        clt_topk,
        clt_jumprelu,
        kissane_diff,
        batchtopk_diff,
        designated_shared,
        dedicated,
        delta,
        diff_sae,
        interaction_exact,
        interaction_paper,
    )
}
"""Name → the function that returns the configuration; its docstring names source and deviations."""

SMOKE = "_smoke"
"""Ending of the name of a recipe's twin."""


def recipe(name: str) -> TrainConfig:
    """The configuration of a recipe, or of its twin where the name ends in `_smoke`.

    Raises:
        UsageError: there is no such recipe.
    """
    plain = name.replace("-", "_")
    known = plain.removesuffix(SMOKE)
    if known not in RECIPES:
        near = suggestion(known, RECIPES) or " `crosslens recipes` lists them."
        raise UsageError(f"There is no recipe {name!r}.{near}")
    config = RECIPES[known]()
    return twin(config) if plain.endswith(SMOKE) else config


def summary(name: str) -> str:
    """The first line of a recipe's docstring: what it is, and whose."""
    return (RECIPES[name].__doc__ or "").partition("\n")[0]

"""The schemes compared: each recipe, at the sizes and the length of the comparison."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from crosslens.coder import Activation, BatchTopK
from crosslens.recipes import RECIPES
from crosslens.training import Adam, FitConfig, Objective, TrainConfig

Family = Literal["one site", "three layers", "MLPs", "two models"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A recipe and where it is put."""

    family: Family
    kinds: tuple[str, ...] = ("resid_mid",)
    everywhere: bool = True
    """At all three layers, or only at the middle one."""
    two_models: bool = False
    penalty: str | None = None
    """The term whose weight sets L0, if no k does."""


_ONE: dict[str, Any] = {"family": "one site", "everywhere": False}
_MLP: dict[str, Any] = {"family": "MLPs", "kinds": ("mlp_in", "mlp_out")}
_TWO: dict[str, Any] = {"family": "two models", "everywhere": False, "two_models": True}

SCHEMES: dict[str, Scheme] = {
    "topk_sae": Scheme(**_ONE),
    "matryoshka_sae": Scheme(**_ONE),
    "groupmax": Scheme(**_ONE),
    "gated_sae": Scheme(**_ONE, penalty="gated_l1"),
    "jumprelu_l0": Scheme(**_ONE, penalty="l0"),
    "jumprelu_l0_target": Scheme(**_ONE),
    "l1_crosscoder": Scheme(family="three layers", penalty="l1"),
    "jumprelu_tanh": Scheme(family="three layers", penalty="tanh"),
    "weakly_causal": Scheme(family="three layers", penalty="tanh"),
    "layer_conditioned_sae": Scheme(family="three layers"),
    "skip_transcoder": Scheme(**_MLP, everywhere=False),
    "clt_topk": Scheme(**_MLP),
    "clt_jumprelu": Scheme(**_MLP, penalty="tanh"),
    "kissane_diff": Scheme(**_TWO, penalty="l1"),
    "batchtopk_diff": Scheme(**_TWO),
    "designated_shared": Scheme(**_TWO, penalty="tanh"),
    "dedicated": Scheme(**_TWO),
    "delta": Scheme(**_TWO),
    "diff_sae": Scheme(**_TWO),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What every scheme has in common."""

    latents: int
    l0: int
    steps: int
    batch: int
    layers: tuple[int, int, int]
    dtype: str = "bfloat16"
    seed: int = 0


LR = 8e-4
"""Adam's rate for every scheme: published ones are for a thousand times as many steps."""


def sites_of(scheme: Scheme, layers: tuple[int, int, int]) -> tuple[str, ...]:
    """The scheme's sites, without a model's name."""
    chosen = layers if scheme.everywhere else layers[1:2]
    return tuple(f"{kind}.{layer}" for layer in chosen for kind in scheme.kinds)


def config_of(name: str, sizes: Sizes) -> TrainConfig:
    """The recipe with its sizes, lengths and rate changed; wiring, activation, terms, start and
    kind of optimiser stay."""
    scheme, recipe = SCHEMES[name], RECIPES[name]()
    coder = replace(
        recipe.coder,
        latents=sizes.latents,
        activation=_activation(recipe.coder.activation, sizes),
        firing_rate=recipe.coder.firing_rate and sizes.l0 / sizes.latents,
    )
    warmup = max(1, sizes.steps // 15)
    rate: dict[str, Any] = {"warmup": warmup}
    if isinstance(recipe.optimizer, Adam):
        rate |= {"lr": LR, "decay": 0.2}
    return replace(
        recipe,
        sites=sites_of(scheme, sizes.layers),
        coder=coder,
        objective=_objective(recipe.objective_in_shares(), sizes),
        optimizer=replace(recipe.optimizer, **rate),
        fit=FitConfig(
            steps=sizes.steps,
            batch=sizes.batch,
            dtype=sizes.dtype,
            dead_after=max(1, sizes.steps * sizes.batch // 5),
            log_every=5,
            heldout_every=10**9,
            checkpoint_every=10**9,
        ),
        seed=sizes.seed,
    )


def with_weight(config: TrainConfig, penalty: str, weight: float, **changes: Any) -> TrainConfig:
    """Another weight of one term."""
    term = replace(getattr(config.objective, penalty), weight=weight, **changes)
    return replace(config, objective=replace(config.objective, **{penalty: term}))


def _activation(activation: Activation, sizes: Sizes) -> Activation:
    changes: dict[str, Any] = {}
    if hasattr(activation, "k"):
        changes["k"] = sizes.l0
    if getattr(activation, "k_start", None) is not None:
        start = round(sizes.l0 * activation.k_start / activation.k)
        changes["k_start"] = min(start, sizes.latents)
    if isinstance(activation, BatchTopK):
        # The published 0.999 has not forgotten the first steps when so short a run ends.
        changes["threshold_decay"] = min(activation.threshold_decay, 0.98)
    return replace(activation, **changes)


def _objective(objective: Objective, sizes: Sizes) -> Objective:
    changed: dict[str, Any] = {}
    for field in fields(objective):
        term: Any = getattr(objective, field.name)
        if getattr(term, "target", None) is not None:
            changed[field.name] = replace(term, target=float(sizes.l0))
        if field.name == "aux":
            changed["aux"] = replace(term, k=min(term.k, sizes.latents // 8))
    return replace(objective, **changed)

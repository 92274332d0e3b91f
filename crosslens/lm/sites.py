"""Names of sites: what they are called here, in TransformerLens and in Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from crosslens.errors import UsageError, suggestion

LAYER_KINDS = (
    "resid_pre",
    "attn_in",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_act",
    "mlp_out",
    "resid_post",
)
"""Sites that every layer may have, in order of computation."""

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "ln1.hook_normalized": "attn_in",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "ln2.hook_normalized": "mlp_in",
    "mlp.hook_post": "mlp_act",
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "resid_post",
}


def split_site(site: str) -> tuple[str | None, str]:
    """`chat/resid_post.12` -> (`chat`, `resid_post.12`); without a model, (None, site)."""
    model, slash, rest = site.partition("/")
    return (model, rest) if slash else (None, site)


def all_sites(n_layers: int) -> tuple[str, ...]:
    """Every site a model of this depth could have, in order of computation."""
    layers = [f"{kind}.{layer}" for layer in range(n_layers) for kind in LAYER_KINDS]
    return ("embed", *layers, "final", "logits")


def aliases(n_layers: int) -> dict[str, str]:
    """Other libraries' names for sites that do not depend on the model's own module names.

    `hidden_states.N` follows Hugging Face: 0 enters the first layer, N leaves layer N-1, except
    that the last one is taken after the final norm.
    """
    names = {"hook_embed": "embed", "ln_final.hook_normalized": "final"}
    for layer in range(n_layers):
        for theirs, ours in _TRANSFORMER_LENS.items():
            names[f"blocks.{layer}.{theirs}"] = f"{ours}.{layer}"
        names[f"hidden_states.{layer}"] = f"resid_post.{layer - 1}" if layer else "resid_pre.0"
    return names | {f"hidden_states.{n_layers}": "final"}


def resolve(
    patterns: Sequence[str], sites: Sequence[str], names: Mapping[str, str], n_layers: int
) -> tuple[str, ...]:
    """The sites that any pattern names, without duplicates, in the order of `sites`.

    Args:
        patterns: names or globs (`*`, `?`, `[…]`), in this library's naming or an alias.
        sites: the sites the model has, in order of depth.
        names: alias -> site.
        n_layers: the model's depth, for the error message.

    Raises:
        UsageError: a pattern that matches nothing; the message says why.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = _matches(pattern, sites, names)
        if not matches:
            raise UsageError(_nothing_found(pattern, sites, names, n_layers))
        found |= matches
    return tuple(site for site in sites if site in found)


def _matches(pattern: str, sites: Sequence[str], names: Mapping[str, str]) -> set[str]:
    exact = names.get(pattern, pattern)
    if exact in sites:
        return {exact}
    direct = {site for site in sites if fnmatchcase(site, pattern)}
    others = {site for name, site in names.items() if fnmatchcase(name, pattern)}
    return direct or others.intersection(sites)


def _nothing_found(
    pattern: str, sites: Sequence[str], names: Mapping[str, str], n_layers: int
) -> str:
    known = [*all_sites(n_layers), *names]
    meant = names.get(pattern, pattern)
    if meant in known or (meant.startswith("resid_mid") and "resid_mid.0" not in sites):
        return _absent(pattern, meant)
    if any(character in pattern for character in "*?["):
        return f"No site matches {pattern!r}. The kinds are: {_kinds(sites)}."
    numbers = re.findall(r"\d+", pattern)
    if numbers and re.sub(r"\d+", "0", pattern) in known:
        return (
            f"The site {pattern!r} is beyond this model's depth: it has {n_layers} layers, "
            f"numbered 0 to {n_layers - 1}."
        )
    hint = suggestion(pattern, [*sites, *names]) or f" The kinds are: {_kinds(sites)}."
    return f"Unknown site {pattern!r}.{hint}"


def _absent(pattern: str, site: str) -> str:
    if site.startswith("resid_mid"):
        return (
            f"This model has no {pattern!r}: its attention and MLP read the same residual in "
            "parallel, so there is no residual between them. Use resid_pre or resid_post."
        )
    return (
        f"This model has no {pattern!r}: its MLP does not end in one down projection over all "
        "positions (a mixture of experts, perhaps). Use mlp_in or mlp_out."
    )


def _kinds(sites: Sequence[str]) -> str:
    kinds = dict.fromkeys(re.sub(r"\.\d+$", ".N", site) for site in sites)
    return ", ".join(kinds)

"""Which sites of which models a study of interactions is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from crosslens.coder import Coder
from crosslens.errors import UsageError, suggestion
from crosslens.interactions.neurons.effective import Effective, effective
from crosslens.lm import LanguageModel, split_site

Sites = Mapping[str, tuple[str, ...]]
"""Name of a model → its sites, in order of depth."""


def check_patterns(coder: Coder, patterns: Sequence[str]) -> None:
    """Refuse patterns of sites that the coder does not write, before any model is opened.

    Raises:
        UsageError: a pattern names none.
    """
    sites = coder.wiring.write.sites
    for pattern in patterns:
        if not any(_named(site, [pattern]) for site in sites):
            raise UsageError(
                f"--sites {pattern!r} names no site of this coder, which writes "
                f"{', '.join(sites)}.{suggestion(pattern, sites)}"
            )


def chosen_models(
    coder: Coder, models: Mapping[str, LanguageModel], name: str | None = None
) -> dict[str, LanguageModel]:
    """The models that the coder writes, or the one of them that is named.

    Raises:
        UsageError: the coder writes no model of that name.
    """
    written = {split_site(site)[0] for site in coder.wiring.write.sites}
    known = {each: models[each] for each in models if {each, None} & written}
    if name is None:
        return known
    if name not in known:
        near = suggestion(name, known)
        raise UsageError(f"The coder has no model {name!r}.{near} It has {', '.join(known)}.")
    return {name: known[name]}


def chosen_sites(coder: Coder, known: Sites, patterns: Sequence[str] = ()) -> Sites:
    """Of each model, the sites before an MLP that any pattern names.

    Args:
        known: each model's `mlp_sites`.
        patterns: names or globs, with the model (`chat/resid_mid.*`) or without; empty for all.

    Raises:
        UsageError: a pattern names none.
    """
    if not patterns:
        return known
    for pattern in patterns:
        if not any(_named(site, [pattern]) for sites in known.values() for site in sites):
            raise UsageError(_nothing_found(pattern, coder, known))
    found = {name: tuple(s for s in sites if _named(s, patterns)) for name, sites in known.items()}
    return {name: sites for name, sites in found.items() if sites}


def effectives_of(
    coder: Coder, models: Mapping[str, LanguageModel], sites: Sites
) -> dict[str, Effective]:
    """The coder's latents seen from the MLPs of all these sites.

    Raises:
        UsageError: an MLP is of no supported kind, or the coder is of another model.
    """
    return {
        site: effective(coder, models[name], site) for name, each in sites.items() for site in each
    }


def comparable(sites: Sites, effectives: Mapping[str, Effective]) -> bool:
    """Whether the first and the last model can be compared, MLP by MLP: as many sites of each, at
    the same places, of the same shape."""
    if len(sites) < 2:
        return False
    first, *_, last = sites.values()
    if len(first) != len(last):
        return False
    pairs = [(effectives[a], effectives[b]) for a, b in zip(first, last, strict=True)]
    return all(
        split_site(a.site)[1] == split_site(b.site)[1]
        and a.value.through_DN.shape == b.value.through_DN.shape
        and (a.gate is None) == (b.gate is None)
        for a, b in pairs
    )


def _named(site: str, patterns: Sequence[str]) -> bool:
    names = (site, split_site(site)[1])
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _nothing_found(pattern: str, coder: Coder, known: Sites) -> str:
    sites = [site for each in known.values() for site in each]
    told = f"--sites {pattern!r} names no site before an MLP. This coder writes {', '.join(sites)}"
    if any(_named(site, [pattern]) for site in coder.wiring.write.sites):
        return f"{told}; what {pattern!r} names, no MLP reads, or it is of a model left out."
    return f"{told}.{suggestion(pattern, sites)}"

"""The MLPs that read what a coder writes, as a term of the objective needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from crosslens.coder import Wiring
from crosslens.errors import UsageError, suggestion
from crosslens.functional.interaction_penalty import Neurons
from crosslens.lm import LanguageModel, split_site
from crosslens.lm.mlp import MLP, Norm, folded, mlp_of, reading_layer

READ = ("mlp_in", "resid_pre", "resid_mid", "resid_post")
"""Kinds of sites that an MLP reads, at once or after a norm and perhaps attention."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """The MLP that reads a site."""

    site: str
    norm: Norm | None
    """What stands between the site and the MLP; None at `mlp_in`, or where there is none."""
    blocks: tuple[Neurons, ...]
    """All neurons, divided for good: a step looks at one block."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Reader:
        """On a device, with products in a format."""
        blocks = tuple(
            replace(
                block,
                through_DW=block.through_DW.to(device, dtype),
                fixed_W=block.fixed_W.to(device),
                out_norm_N=block.out_norm_N.to(device),
            )
            for block in self.blocks
        )
        return replace(self, norm=self.norm and _moved(self.norm, device), blocks=blocks)


def read_sites(wiring: Wiring, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The sites written that are of a kind that MLPs read; of those that a pattern fits, if there
    are patterns.

    Raises:
        UsageError: there are none, a pattern fits none, or the sites are of several models and no
            pattern says which.
    """
    written = wiring.write.sites
    found = tuple(s for s in written if split_site(s)[1].partition(".")[0] in READ)
    if wiring.view != "rows" or not found:
        raise UsageError(
            "objective.interaction needs a coder that writes what an MLP reads (mlp_in.N, "
            "resid_pre.N, resid_mid.N or resid_post.N), row by row of a token. This one writes "
            f"{', '.join(written)}."
        )
    models = {split_site(site)[0] for site in found}
    if not patterns and len(models) > 1:
        raise UsageError(
            f"objective.interaction.sites must say which of several models' MLPs are meant: name "
            f"some of {', '.join(found)}."
        )
    for pattern in patterns:
        if not any(fnmatchcase(site, pattern) for site in found):
            raise UsageError(
                f"objective.interaction.sites names {pattern!r}, which is no site written that an "
                f"MLP reads.{suggestion(pattern, found)} There are {', '.join(found)}."
            )
    return tuple(s for s in found if not patterns or any(fnmatchcase(s, p) for p in patterns))


def readers_of(
    models: Mapping[str, LanguageModel],
    wiring: Wiring,
    patterns: tuple[str, ...],
    n_blocks: int = 1,
) -> tuple[Reader, ...]:
    """The MLP behind each of `read_sites`, in float32.

    Args:
        n_blocks: into how many its neurons are divided.

    Raises:
        UsageError: as `read_sites`; or a site is named that no MLP comes after, or an MLP is of no
            supported kind.
    """
    owned = [(site, _owner(models, site)) for site in read_sites(wiring, patterns)]
    placed = [(site, model, reading_layer(model, site)) for site, model in owned]
    last = [site for site, _, layer in placed if layer is None]
    if last and (patterns or len(last) == len(placed)):
        raise UsageError(
            f"objective.interaction: no MLP reads {last[0]}, which the last layer gives. Take a "
            "site before it."
        )
    return tuple(
        _reader(site, mlp_of(model, layer), n_blocks)
        for site, model, layer in placed
        if layer is not None
    )


def _owner(models: Mapping[str, LanguageModel], site: str) -> LanguageModel:
    name = split_site(site)[0]
    return models[name] if name is not None else next(iter(models.values()))


def _reader(site: str, mlp: MLP, n_blocks: int) -> Reader:
    norm = None if split_site(site)[1].startswith("mlp_in") else mlp.norm
    branches = [(mlp.W_in_ND, mlp.b_in_N)]
    if mlp.W_gate_ND is not None:
        branches.append((mlp.W_gate_ND, mlp.b_gate_N))
    parts = [folded(norm, W_ND.float(), b_N) for W_ND, b_N in branches]
    n_blocks = min(n_blocks, len(mlp.W_in_ND))
    blocks = tuple(
        Neurons(
            kind=mlp.kind,
            through_DW=torch.cat([W_DN[:, i::n_blocks] for W_DN, _ in parts], -1),
            fixed_W=torch.cat([fixed_N[i::n_blocks] for _, fixed_N in parts]),
            out_norm_N=mlp.W_out_DN.norm(dim=0)[i::n_blocks],
        )
        for i in range(n_blocks)
    )
    return Reader(site=site, norm=norm, blocks=blocks)


def _moved(norm: Norm, device: torch.device) -> Norm:
    bias_D = None if norm.bias_D is None else norm.bias_D.to(device)
    return replace(norm, gain_D=norm.gain_D.to(device), bias_D=bias_D)

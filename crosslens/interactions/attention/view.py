"""A coder's latents seen from the heads of an attention: as queries, as keys and as values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from crosslens.coder import Coder
from crosslens.errors import UsageError
from crosslens.interactions.neurons.effective import Branch, branch_of, raw_decoder
from crosslens.lm import LanguageModel, split_site
from crosslens.lm.attention import SelfAttention, attention_of, turned
from crosslens.lm.mlp import Norm


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadsView:
    """What one unit of each latent is to each head of the attention that reads its site.

    The columns of `query` are heads × widths [H·A], of `key` [J·A] and `value` [J·V] groups ×
    widths; none is turned by a position yet.
    """

    site: str
    heads: SelfAttention
    norm: Norm | None
    """What stands between the site and attention; None at `attn_in`, or where there is none."""
    input_site: str
    """What the norm (without one, attention) is given: the site itself or, where an MLP is still to
    come, the residual stream after it."""
    decoder_LD: Float32[Tensor, "l d"]
    bias_D: Float32[Tensor, " d"]
    query: Branch
    key: Branch
    value: Branch

    @property
    def layer(self) -> int:
        """Of the attention: `resid_post.3` is before that of layer 4."""
        return self.heads.layer

    @property
    def n_latents(self) -> int:
        """Latents of the coder."""
        return len(self.decoder_LD)

    @property
    def names(self) -> list[str]:
        """`L3.H0`, `L3.H1`, …"""
        return [f"L{self.layer}.H{head}" for head in range(self.heads.n_heads)]

    @property
    def query_LHA(self) -> Tensor:
        """Each latent's query in each head."""
        return self.query.E_LN.view(self.n_latents, self.heads.n_heads, -1)

    @property
    def key_LJA(self) -> Tensor:
        """Each latent's key in each group of heads."""
        return self.key.E_LN.view(self.n_latents, self.heads.n_groups, -1)

    @property
    def value_LJV(self) -> Tensor:
        """Each latent's value in each group of heads."""
        return self.value.E_LN.view(self.n_latents, self.heads.n_groups, -1)

    def group(self, head: int) -> int:
        """The group whose keys and values a head uses."""
        return head * self.heads.n_groups // self.heads.n_heads

    def pair_scores(
        self, i_C: Int64[Tensor, " c"], j_C: Int64[Tensor, " c"], distance_C: Int64[Tensor, " c"]
    ) -> Float[Tensor, "c h"]:
        """scale · ⟨R(distance) W_Q d_i, W_K d_j⟩: what query latent i and key latent j, so many
        positions before it, add to each head's score per unit of both weights (strength times the
        norm's scalar)."""
        cos_CF, sin_CF = self.heads.rotation(distance_C)
        query_CHA = turned(self.query_LHA[i_C], cos_CF[:, None], sin_CF[:, None])
        key_CHA = self.key_LJA[j_C].repeat_interleave(self.heads.share, 1)
        return self.heads.scale * (query_CHA * key_CHA).sum(-1)


def attention_sites(coder: Coder, model: LanguageModel) -> tuple[str, ...]:
    """For each attention of `model` that reads a site that the coder writes, the site closest
    before it: its input, the residual stream that enters its layer, or that before the MLP of the
    layer before.

    Raises:
        UsageError: there is none.
    """
    if coder.wiring.view != "rows":
        what = "the difference of two models" if coder.wiring.view == "difference" else "one site"
        raise UsageError(
            f"A row of this coder is {what}, so its latents do not add up to what attention reads. "
            "Interactions are told of coders whose rows hold all sites of a token."
        )
    sites = coder.wiring.write.sites
    own = [site for site in sites if split_site(site)[0] in (None, model.name)]
    closest: dict[int, str] = {}
    for site in own:
        layer, rank = _reader(site)
        if 0 <= layer < model.n_layers and (
            layer not in closest or rank < _reader(closest[layer])[1]
        ):
            closest[layer] = site
    if not closest:
        raise UsageError(
            f"This coder writes {', '.join(own) or f'no site of {model.name!r}'}: neither an "
            "attention's input (attn_in.N) nor the residual stream before one (resid_pre.N, "
            "resid_post.N or resid_mid.N but of the last layer). Train one that does, such as "
            "`--sites resid_post.5`."
        )
    return tuple(closest[layer] for layer in sorted(closest))


def _reader(site: str) -> tuple[int, int]:
    """Which layer's attention reads the site (-1: none), and how much is still to come before."""
    kind, _, number = split_site(site)[1].partition(".")
    places = {"attn_in": (0, 0), "resid_pre": (0, 1), "resid_post": (1, 1), "resid_mid": (1, 2)}
    if kind not in places:
        return -1, 0
    later, rank = places[kind]
    return int(number) + later, rank


@torch.no_grad()
def heads_view(coder: Coder, model: LanguageModel, site: str) -> HeadsView:
    """The coder's latents at `site`, through the norm's gain and the matrices of every head.

    Args:
        site: one of `attention_sites`.

    Raises:
        UsageError: the coder is of another model, or the attention is of no supported kind.
    """
    prefix, plain = split_site(site)
    width = coder.wiring.write.widths[coder.wiring.write.index(site)]
    if width != model.width(plain):
        raise UsageError(
            f"{site} is {width} wide in this coder and {model.width(plain)} in {model.name!r} "
            f"({model.spec.path}): the coder is of another model."
        )
    heads, device = attention_of(model, _reader(site)[0]), coder.b_dec.device
    at_input = plain.startswith("attn_in")
    decoder_LD, bias_D = raw_decoder(coder, site)

    def branch(weight: Tensor, bias: Tensor) -> Branch:
        norm = None if at_input else heads.norm
        W_ND = weight.flatten(0, 1).to(device)
        return branch_of(decoder_LD, bias_D, norm, W_ND, bias.flatten().to(device))

    entering = plain if at_input else f"resid_pre.{heads.layer}"
    return HeadsView(
        site=site,
        heads=heads,
        norm=None if at_input else heads.norm,
        input_site=f"{prefix}/" * (prefix is not None) + entering,
        decoder_LD=decoder_LD,
        bias_D=bias_D,
        query=branch(heads.W_Q_HAD, heads.b_Q_HA),
        key=branch(heads.W_K_JAD, heads.b_K_JA),
        value=branch(heads.W_V_JVD, heads.b_V_JV),
    )

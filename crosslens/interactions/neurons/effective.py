"""A coder's latents seen from the neurons of an MLP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float32
from torch import Tensor

from crosslens.coder import Coder, dense_decoder
from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import LanguageModel, split_site
from crosslens.lm.mlp import MLP, Norm, folded, mlp_of, reading_layer


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """One linear map of an MLP, with the norm's gain (and centring) folded in.

    The pre-activation of neuron n is scalar · (Σ_i a_i E[i, n] + moving[n] + error · through[:, n])
    + fixed[n].
    """

    E_LN: Float32[Tensor, "l n"]
    moving_N: Float32[Tensor, " n"]
    """Of the decoder's bias, which the norm's scalar multiplies too."""
    fixed_N: Float32[Tensor, " n"]
    """Of the MLP's own bias and the norm's, which it does not."""
    through_DN: Float32[Tensor, "d n"]
    """From the site's raw units to pre-activations."""
    dense: torch.dtype = torch.float32
    """The format of the product with the coder's error: bfloat16 where the model is, whose own
    pre-activations are rounded as much."""

    @cached_property
    def error_DN(self) -> Tensor:
        """`through_DN` in that format."""
        return self.through_DN.to(self.dense)

    @cached_property
    def has_fixed(self) -> bool:
        """Whether there is any fixed part."""
        return bool(self.fixed_N.any())


@dataclass(frozen=True, kw_only=True, eq=False)
class Effective:
    """A coder's latents seen from the neurons of the MLP that reads their site."""

    site: str
    layer: int
    """Of the MLP: `resid_post.3` is before that of layer 4."""
    mlp: MLP
    norm: Norm | None
    """What stands between the site and the MLP; None at `mlp_in`, or where there is none."""
    input_site: str
    """What the norm (without one, the MLP) is given: the site itself or, where attention is still
    to come, the residual stream after it."""
    decoder_LD: Float32[Tensor, "l d"]
    """Raw units."""
    bias_D: Float32[Tensor, " d"]
    """The decoder's, raw units."""
    value: Branch
    """What goes into the neuron; in a gated MLP, what the gate multiplies."""
    gate: Branch | None
    out_norm_N: Float32[Tensor, " n"]
    """‖w_out,n‖: how far one unit of the neuron moves the MLP's output."""

    @property
    def E_LN(self) -> Tensor:
        """Each latent's contribution to each neuron, per unit of its strength times the scalar."""
        return self.value.E_LN


def mlp_sites(coder: Coder, model: LanguageModel) -> tuple[str, ...]:
    """The sites of `model` that the coder writes and that an MLP reads, now or after attention.

    Raises:
        UsageError: there is none, or latents have no decoder at one site of one model.
    """
    if coder.wiring.view != "rows":
        what = "the difference of two models" if coder.wiring.view == "difference" else "one site"
        raise UsageError(
            f"A row of this coder is {what}, so its latents do not add up to what an MLP reads. "
            "Interactions are told of coders whose rows hold all sites of a token."
        )
    sites = coder.wiring.write.sites
    own = [site for site in sites if split_site(site)[0] in (None, model.name)]
    if not own:
        raise UsageError(
            f"This coder writes sites of other models than {model.name!r}: {', '.join(sites)}."
        )
    found = tuple(site for site in own if reading_layer(model, site) is not None)
    if not found:
        raise UsageError(
            f"This coder writes {', '.join(own)}: neither an MLP's input (mlp_in.N) nor the "
            "residual stream before an MLP (resid_pre.N, resid_mid.N, resid_post.N but the last). "
            "Train one that does, such as `--sites resid_mid.5`."
        )
    return found


@torch.no_grad()
def effective(coder: Coder, model: LanguageModel, site: str) -> Effective:
    """The coder's latents at `site`, through the norm's gain and the MLP's matrices.

    Args:
        site: `mlp_in.N`, `resid_mid.N`, or the residual stream before layer N's attention
            (`resid_pre.N`, `resid_post.N-1`), whose part is then in the error.

    Raises:
        UsageError: the coder does not write the site, no MLP reads it, it is of another model, or
            the MLP is of no supported kind.
    """
    known = mlp_sites(coder, model)
    if site not in known:
        raise UsageError(
            f"Interactions cannot be told at {site!r}: they can at those sites of {model.name!r} "
            f"that this coder writes before an MLP, {', '.join(known)}."
        )
    prefix, plain = split_site(site)
    width = coder.wiring.write.widths[coder.wiring.write.index(site)]
    if width != model.width(plain):
        raise UsageError(
            f"{site} is {width} wide in this coder and {model.width(plain)} in {model.name!r} "
            f"({model.spec.path}): the coder is of another model."
        )
    layer = reading_layer(model, site)
    assert layer is not None
    mlp, device = mlp_of(model, layer), coder.b_dec.device
    norm = None if plain.startswith("mlp_in") else mlp.norm
    decoder_LD, bias_D = raw_decoder(coder, site)
    short = next(model.module.parameters()).dtype is torch.bfloat16
    dense = torch.bfloat16 if short else torch.float32

    def branch(W_ND: Tensor, b_N: Tensor | None) -> Branch:
        return replace(branch_of(decoder_LD, bias_D, norm, W_ND.to(device), b_N), dense=dense)

    return Effective(
        site=site,
        layer=layer,
        mlp=mlp,
        norm=norm,
        input_site=f"{prefix}/" * (prefix is not None) + _input_of(model, plain, layer),
        decoder_LD=decoder_LD,
        bias_D=bias_D,
        value=branch(mlp.W_in_ND, mlp.b_in_N),
        gate=None if mlp.W_gate_ND is None else branch(mlp.W_gate_ND, mlp.b_gate_N),
        out_norm_N=mlp.W_out_DN.norm(dim=0).to(device),
    )


def _input_of(model: LanguageModel, site: str, layer: int) -> str:
    if site.startswith("mlp_in"):
        return site
    middle = f"resid_mid.{layer}"
    # Where attention and MLP work in parallel, both read what enters the layer.
    return middle if middle in model.anatomy.taps else f"resid_pre.{layer}"


def raw_decoder(coder: Coder, site: str) -> tuple[Tensor, Tensor]:
    """The decoder [L, D] and its bias [D] at a site that the coder writes, in raw units.

    Raises:
        CrosslensError: they are not finite.
    """
    write = coder.wiring.write
    at = write.slice(site)
    decoder_LD = dense_decoder(coder)[:, at].float() / coder.scale_write[write.index(site)]
    bias_D = coder.unscaled_write(coder.b_dec.detach()[None])[0, at]
    if not bool(decoder_LD.isfinite().all() and bias_D.isfinite().all()):
        raise CrosslensError(
            f"The coder's decoder at {site} holds NaN or infinite values: the training must have "
            "diverged."
        )
    return decoder_LD, bias_D


def branch_of(
    decoder_LD: Tensor, bias_D: Tensor, norm: Norm | None, W_ND: Tensor, b_N: Tensor | None
) -> Branch:
    """Latents of these decoders through a norm and the linear map x ↦ W x + b."""
    W_DN, fixed_N = folded(norm, W_ND, b_N)
    return Branch(
        E_LN=decoder_LD @ W_DN,
        moving_N=bias_D @ W_DN,
        fixed_N=fixed_N,
        through_DN=W_DN.contiguous(),
    )

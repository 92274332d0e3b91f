"""Rows, codes and weights for layer-local certificates, from a run's models and coder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.activations import Source
from crosslens.coder import Coder, all_rows
from crosslens.errors import CrosslensError, UsageError
from crosslens.interactions.neurons.effective import Effective, effective, mlp_sites
from crosslens.lm import LanguageModel
from crosslens.lm.mlp import MLP, Norm
from crosslens.proofs.lemmas.neurons import KINDS
from crosslens.proofs.local_certificate import NORMS

_NEAR = 1e-4
"""Relative: how well a gain is read off a norm's behaviour."""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """One site: the MLP after it, rows of the model, and what the coder says of them."""

    site: str
    layer: int
    kind: str
    gated: bool
    weights: Mapping[str, Tensor]
    coder: Mapping[str, Tensor]
    """`decoder` of the latents that are active somewhere, `bias`, `index`, `strength`; codes are
    padded with strength 0."""
    x_RD: Tensor
    """Float64."""
    token_R: Tensor
    """block · T + position."""

    @property
    def size(self) -> dict[str, int]:
        """As the families' axes name them."""
        (rows, active), (latents, width) = self.coder["index"].shape, self.coder["decoder"].shape
        neurons = len(self.weights["out"])
        return {"R": rows, "K": active, "F": latents, "D": width, "N": neurons}


def local_sites(coder: Coder, model: LanguageModel) -> dict[str, Effective]:
    """The sites the coder writes with an MLP right after them (or after their norm).

    Raises:
        UsageError: there is none: attention stands between each site and the next MLP.
    """
    seen = {site: effective(coder, model, site) for site in mlp_sites(coder, model)}
    found = {site: each for site, each in seen.items() if each.input_site == site}
    if not found:
        raise UsageError(
            f"Attention stands between {', '.join(seen)} and the next MLP. Layer-local "
            "certificates are about an MLP's own input: train with sites such as resid_mid.5 or "
            "mlp_in.5."
        )
    for site, each in found.items():
        if each.mlp.kind not in KINDS:
            raise UsageError(
                f"The MLP after {site} has the nonlinearity {each.mlp.kind!r}, for which no bound "
                f"is proved; there are {', '.join(KINDS)}."
            )
    return found


@torch.no_grad()
def gather(source: Source, coder: Coder, model: LanguageModel, tokens: int) -> dict[str, Gathered]:
    """The first `tokens` rows that count, at every site that has an MLP right after it."""
    sites = local_sites(coder, model)
    x, z_RL, token_R = _rows(source, coder, tuple(sites), tokens)
    latents = (z_RL > 0).any(0).nonzero()[:, 0]
    if not len(latents):
        raise CrosslensError(
            "No latent is active on any of these tokens: there is nothing to prove."
        )
    index, strength = padded(z_RL[:, latents])
    found = {}
    for site, each in sites.items():
        coded = {
            "decoder": each.decoder_LD[latents].cpu().contiguous(),
            "bias": each.bias_D.cpu().contiguous(),
            "index": index,
            "strength": strength,
        }
        found[site] = Gathered(
            site=site,
            layer=each.layer,
            kind=each.mlp.kind,
            gated=each.gate is not None,
            weights=weights_of(model, each.mlp, each.norm),
            coder=coded,
            x_RD=x[site],
            token_R=token_R,
        )
    return found


def _rows(
    source: Source, coder: Coder, sites: tuple[str, ...], tokens: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    coder.eval()
    places = {site: source.layout.sites.index(site) for site in sites}
    x: dict[str, list[Tensor]] = {site: [] for site in sites}
    codes: list[Tensor] = []
    at: list[Tensor] = []
    for chunk in source:
        if not len(chunk.row_R):
            continue
        rows = all_rows(coder.wiring, torch.cat(chunk.sites, -1).to(coder.b_dec.device))
        codes.append(coder.encode(rows.x_BX).double().cpu())
        at.append(chunk.row_R.cpu())
        for site, place in places.items():
            x[site].append(chunk.sites[place].double().cpu())
        if sum(map(len, codes)) >= tokens:
            break
    if not codes:
        raise CrosslensError("The token policy keeps no token: there is nothing to prove.")
    z_RL = torch.cat(codes)[:tokens]
    if not bool(z_RL.isfinite().all()) or bool((z_RL < 0).any()):
        raise CrosslensError("The coder gives strengths that are negative, NaN or infinite.")
    return {site: torch.cat(x[site])[:tokens] for site in sites}, z_RL, torch.cat(at)[:tokens]


def padded(z_RL: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and strengths of each row's active latents, strongest first [R, K]."""
    most = max(1, int((z_RL > 0).sum(1).max()))
    strength, index = z_RL.clamp_min(0).sort(1, descending=True)
    return index[:, :most].contiguous(), strength[:, :most].contiguous()


def weights_of(model: LanguageModel, mlp: MLP, norm: Norm | None) -> dict[str, Tensor]:
    """The MLP and its norm as the checker takes them; matrices as they are, the norm's gain from
    the model's own parameters where one is what it behaves like."""
    width, neurons = mlp.W_in_ND.shape[1], len(mlp.W_in_ND)
    gate = mlp.W_in_ND if mlp.W_gate_ND is None else mlp.W_gate_ND
    b_gate = mlp.b_in_N if mlp.W_gate_ND is None else mlp.b_gate_N
    kind = "none" if norm is None else norm.kind
    floor = 0.0 if norm is None else float(f"{norm.eps:.4g}")
    form = [float(KINDS.index(mlp.kind)), float(NORMS.index(kind)), floor]
    found = {
        "gate": gate.T,
        "out": mlp.W_out_DN.T,
        "gain": torch.ones(width) if norm is None else exact_gain(model, mlp.layer, norm),
        "shift": _or_zero(None if norm is None else norm.bias_D, width),
        "b_gate": _or_zero(b_gate, neurons),
        "b_out": _or_zero(mlp.b_out_D, width),
        "form": torch.tensor(form, dtype=torch.float64),
    }
    if mlp.W_gate_ND is not None:
        found |= {"value": mlp.W_in_ND.T, "b_value": _or_zero(mlp.b_in_N, neurons)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def exact_gain(model: LanguageModel, layer: int, norm: Norm) -> Tensor:
    """The layer's parameter that the norm's gain is (or one less than), in float64; if none is
    near, the gain as it was read."""
    gain = norm.gain_D.cpu().double()
    limit = _NEAR * float(gain.abs().max())
    for parameter in model.anatomy.layers[layer].parameters():
        if parameter.shape != gain.shape:
            continue
        own = parameter.detach().cpu().double()
        for candidate in (own, own + 1):
            if float((candidate - gain).abs().max()) <= limit:
                return candidate
    return gain


def _or_zero(bias: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size) if bias is None else bias

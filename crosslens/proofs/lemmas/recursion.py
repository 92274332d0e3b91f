"""The errors of a coder at every site of a small language model, by recursion from the embedding.

At each site a node's reference row x̂ is what its region's code decodes to. From ‖x − x̂‖ at one
site follows ‖x′ − x̂′‖ at the next (`residual.Step`); `stream` has the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.proofs.lemmas.attention import causal_moves
from crosslens.proofs.lemmas.contexts import Contexts
from crosslens.proofs.lemmas.interaction import additive_up, pair_table, pairs_up
from crosslens.proofs.lemmas.neurons import mlp_moves, written_up
from crosslens.proofs.lemmas.normalisation import rms_moves
from crosslens.proofs.lemmas.residual import Step
from crosslens.proofs.lemmas.stream import (
    FLOOR,
    Rows,
    added,
    attended,
    exactly,
    linear,
    normalised,
)
from crosslens.proofs.rounding import UNIT, gamma, norm_up, product_up, up


@dataclass(frozen=True)
class Code:
    """What a coder says of the regions: which features, how strong, what they decode to."""

    decoder_PFD: Tensor
    bias_PD: Tensor
    index_CK: Tensor
    strength_CK: Tensor

    def decoded(self, site: int) -> Tensor:
        """x̂ [C, D]. A float row is a reference row as good as any: only `decode_off` says how far
        it is from what the code means."""
        vectors = self.decoder_PFD[site].double()[self.index_CK]
        return self.bias_PD[site].double() + self._summed(vectors)

    def decode_off(self, site: int) -> Tensor:
        """At least how far `decoded` is from b + Σ a_i d_i: γ_{K+1} (‖b‖ + Σ |a_i| ‖d_i‖)."""
        norms = norm_up(self.decoder_PFD[site].double())[self.index_CK]
        total = up((self.strength_CK.double().abs() * norms).sum(-1).max() * (1 + gamma(99)))
        bias = norm_up(self.bias_PD[site].double())
        return up((total + bias) * (2 * gamma(self.index_CK.shape[1] + 4)))

    def _summed(self, vectors: Tensor) -> Tensor:
        return torch.einsum("ck,ckd->cd", self.strength_CK.double(), vectors)


@dataclass(frozen=True)
class Reached:
    """At least ‖x − x̂‖ of every node at every site, and how the last came from the first."""

    eps: tuple[Tensor, ...]
    steps: tuple[Step, ...]


def recursion(
    weights: Mapping[str, Tensor], code: Code, region_U: Tensor, tree: Contexts, tier: str
) -> Reached:
    """Through all layers. `tier` says what stands for the MLP of a decoded row: "codes" the MLP
    itself; "additive" each feature's own image, with min(P, Q) for what they miss together; "pairs"
    the same images, with the table of pairs for what is missed."""
    embed = weights["W_E"].double()[tree.tokens_X][tree.token_U]
    eps = [distance(exactly(embed), code.decoded(0), region_U)]
    steps: list[Step] = []
    for layer in range(len(weights["W_Q"])):
        w = {name: tensor[layer] for name, tensor in weights.items() if name not in ("W_E", "W_U")}
        steps.append(_attention_step(w, code, 2 * layer, eps[-1], (region_U, tree)))
        eps.append(steps[-1].after)
        steps.append(_mlp_step(w, code, 2 * layer + 1, eps[-1], (region_U, tier)))
        eps.append(steps[-1].after)
    return Reached(tuple(eps), tuple(steps))


def distance(rows: Rows, reference_CD: Tensor, region_U: Tensor) -> Tensor:
    """At least ‖x − x̂‖ of every row [U]."""
    moved = rows.value - reference_CD[region_U]
    return up(norm_up(moved) * (1 + 4 * UNIT) + rows.eps)


def _attention_step(
    w: Mapping[str, Tensor], code: Code, site: int, eps_U: Tensor, where: tuple[Tensor, Contexts]
) -> Step:
    """From before the attention to after it: attention on decoded rows is worked out exactly, so
    that nothing of it counts as interaction."""
    region_U, tree = where
    here = exactly(code.decoded(site))
    n = normalised(here)
    query, key, value = (linear(n, w[name]) for name in ("W_Q", "W_K", "W_V"))
    seen = region_U[tree.path_UT]
    mixed = attended(query.at(region_U), key, value, seen, tree.age_UT, w["bias"])
    out = added(here.at(region_U), linear(mixed, w["W_O"]))
    moved_U = rms_moves(here.value[region_U], eps_U, floor=FLOOR)
    keys_UT = torch.where(tree.inside_UT, moved_U[tree.path_UT], 0.0)
    heads = len(w["bias"])
    query_UH = _head_sizes(query, heads)[region_U]
    key_UTH, value_UTH = (_head_sizes(rows, heads)[seen] for rows in (key, value))
    inside = tree.inside_UT[..., None]
    sizes = (query_UH, torch.where(inside, key_UTH, 0.0), torch.where(inside, value_UTH, 0.0))
    propagation = causal_moves((moved_U, keys_UT), sizes, _head_maps(w, heads))
    transition = distance(out, code.decoded(site + 1)[region_U], torch.arange(len(region_U)))
    return Step(eps_U, propagation, torch.zeros_like(eps_U), transition)


def _mlp_step(
    w: Mapping[str, Tensor], code: Code, site: int, eps_U: Tensor, how: tuple[Tensor, str]
) -> Step:
    """From before the MLP to after it. The roundings of the pre-activations move neurons, and what
    they write, by at most ‖W_out‖_F times as much."""
    region_U, tier = how
    here = exactly(code.decoded(site))
    n = normalised(here)
    pre = linear(n, w["W_in"])
    moved_U = rms_moves(here.value[region_U], eps_U, floor=FLOOR)
    frobenius = norm_up(w["W_out"].double().flatten())
    rounding = product_up(pre.eps, frobenius)
    moves = mlp_moves("relu", pre.value[region_U], w["W_in"], w["W_out"], moved_U)
    if tier == "codes":
        hidden = Rows(pre.value.clamp_min(0), pre.eps)
        image, missed = linear(hidden, w["W_out"]), torch.zeros(len(here.value)).double()
    else:
        image, missed = _additive(w, code, site, pre, pairs=tier == "pairs")
    after = added(here, image)
    transition = distance(after, code.decoded(site + 1), torch.arange(len(here.value)))
    return Step(eps_U, up(moves + 2 * rounding), missed[region_U], transition[region_U])


def _additive(
    w: Mapping[str, Tensor], code: Code, site: int, pre: Rows, *, pairs: bool
) -> tuple[Rows, Tensor]:
    """Σ_i W_outᵀ relu(y_i) of every region, and at least how far that is from the MLP of its
    reference row.

    The contributions are y_i = a_i/rms · W_inᵀ d_i, the bias being one more with a = 1, worked out
    from float strengths and float images: they add up to the pre-activations but for roundings,
    which are measured and written by ‖W_out‖_F. What is missed of Σ y is min(P, Q) neuron by
    neuron, or by `pairs_up`. Strengths must not be negative.
    """
    vectors = torch.cat([code.bias_PD[site : site + 1], code.decoder_PFD[site]]).double()
    images_FN = vectors @ w["W_in"].double()
    index_CK = torch.nn.functional.pad(code.index_CK + 1, (1, 0))
    row = code.decoded(site)
    scale = ((row * row).mean(-1, keepdim=True) + FLOOR).sqrt()
    strength_CK = torch.nn.functional.pad(code.strength_CK.double(), (1, 0), value=1.0) / scale
    y_CKN = strength_CK[..., None] * images_FN[index_CK]
    size = norm_up(y_CKN.abs().sum(1)) * (1 + gamma(index_CK.shape[1] + 8))
    gap = norm_up(y_CKN.sum(1) - pre.value)
    gap = up(up(gap + pre.eps) + up(size * (4 * gamma(index_CK.shape[1] + 8))))
    W_out = w["W_out"].double()
    rounding = product_up(gap, norm_up(W_out.flatten()))
    if pairs:
        table = pair_table(images_FN, norm_up(W_out))
        among = table[index_CK[:, :, None], index_CK[:, None, :]]
        missed = pairs_up(up(strength_CK), among)
    else:
        missed = written_up(additive_up("relu", y_CKN.transpose(1, 2)), W_out)
    hidden = Rows(y_CKN.clamp_min(0).sum(1), up(size.max() * (2 * gamma(index_CK.shape[1] + 8))))
    return linear(hidden, W_out), up(missed + rounding)


def _head_sizes(rows: Rows, heads: int) -> Tensor:
    """At least the norm of each row's part of each head [n, H]."""
    return up(norm_up(rows.value.reshape(len(rows.value), heads, -1)) + rows.eps)


def _head_maps(w: Mapping[str, Tensor], heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """At least the norm of each head's part of W_Q, W_K, W_V and W_O [H]."""
    width = len(w["W_O"])
    columns = [w[name].double().reshape(width, heads, -1) for name in ("W_Q", "W_K", "W_V")]
    norms = [norm_up(part.transpose(0, 1).flatten(1)) for part in columns]
    return norms[0], norms[1], norms[2], norm_up(w["W_O"].double().reshape(heads, -1))

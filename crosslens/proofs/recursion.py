"""The recursion from the embedding to the last layer, with whatever it comes to.

A reference r stands for the residual stream x; ε ≥ ‖x − r‖ row by row.

- At the embedding r = x: a token's one-hot is an exact code, so ε = 0 (the base case).
- A layer's attention or MLP adds f(x). Of what no feature stands before, only the weights are
  known: r stays, and ε grows by the most that f can write (propagation).
- At a site of the coder r becomes x̂, and ε grows by ‖r − x̂‖ (transition).
- At an MLP right after a site two ways are open, and each row takes the better: the weights' cap as
  above; or r becomes x̂ + surrogate, and ε grows by ‖f(x) − f(x̂)‖ on the ball (propagation) and by
  ‖f(x̂) − surrogate‖ (interaction).

Nothing here runs the model; the truth beside it does. Norms before every part bound what it can
write, so that ε grows by sums, not by products: it does not overflow, it is only useless.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosslens.errors import UsageError
from crosslens.lm import LanguageModel
from crosslens.lm.attention import SelfAttention, attention_of
from crosslens.lm.mlp import mlp_of
from crosslens.proofs.lemmas import local_mlp as lemma
from crosslens.proofs.lemmas import local_parts as parts
from crosslens.proofs.lemmas import logits
from crosslens.proofs.local import CERTIFIED, LocalSite
from crosslens.proofs.local_certificate import Prepared, block_of, errors, prepare
from crosslens.proofs.local_gather import exact_gain, weights_of
from crosslens.proofs.rounding import (
    SLACK,
    Ball,
    add,
    ball_norm_up,
    exact,
    norm_up,
    product_up,
    spectral_up,
    subtract,
    up,
)

_AT_ONCE = 64
"""Rows."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: means over the rows, each at least its term's."""

    name: str
    before: float
    propagation: float
    interaction: float
    transition: float
    after: float
    true: float
    """The mean ‖x − r‖, from running the model."""
    norm: float
    """The mean ‖x‖ there."""
    by_features: float
    """Share of the rows that took the way over the surrogate."""

    def plain(self) -> dict[str, Any]:
        """JSON-able, with what explodes as powers of ten."""
        terms = ("before", "propagation", "interaction", "transition", "after", "true", "norm")
        return {
            "name": self.name,
            **{name: getattr(self, name) for name in terms},
            "log10_after": math.log10(self.after) if self.after > 0 else None,
            "log10_ratio": math.log10(self.after / self.norm) if self.after > 0 else None,
            "by_features": self.by_features,
        }


@dataclass
class _State:
    """Reference and error of each row on the way through the layers."""

    reference: Tensor
    eps: Tensor
    steps: list[Step]

    def moved(self, name: str, x_RD: Tensor, **terms: Tensor) -> None:
        """One more step, with the reference as it is now."""
        before = self.eps
        for term in terms.values():
            self.eps = up(self.eps + term)
        means = {key: float(value.mean()) for key, value in terms.items()}
        self.steps.append(
            Step(
                name=name,
                before=float(before.mean()),
                propagation=means.get("propagation", 0.0),
                interaction=means.get("interaction", 0.0),
                transition=means.get("transition", 0.0),
                after=float(self.eps.mean()),
                true=float((x_RD - self.reference).norm(dim=1).mean()),
                norm=float(x_RD.norm(dim=1).mean()),
                by_features=0.0,
            )
        )


def attention_cap(model: LanguageModel, attention: SelfAttention) -> Tensor:
    """At least ‖attention(x)‖ for every x: ‖W_O‖₂ √(Σ_h (‖W_V gain‖₂ √D + ‖b‖)²) + ‖b_O‖.

    Proof. Each head writes an average of its values, ‖n(x) before the gain‖ ≤ √D, and the heads
    lie side by side in what W_O takes.
    """
    norm = attention.norm
    if norm is None:
        raise UsageError(
            f"Attention of layer {attention.layer} of {model.name!r} has no norm before it: "
            "nothing bounds what it writes, and so there is no recursion over the layers."
        )
    gain = exact_gain(model, attention.layer, norm)
    root = up(torch.tensor(math.sqrt(len(gain)) * (1 + SLACK), dtype=torch.float64))
    heads = attention.n_heads // attention.n_groups
    square = torch.zeros((), dtype=torch.float64)
    for W_VD, b_V in zip(attention.W_V_JVD, attention.b_V_JV, strict=True):
        W = W_VD.cpu().double()
        shift = torch.zeros_like(gain) if norm.bias_D is None else norm.bias_D.cpu().double()
        moved = parts.product(exact(W), exact(shift[:, None]))
        offset = up(norm_up(moved.size[:, 0]) + norm_up(b_V.cpu().double()))
        # Half a unit in the last place of each number: √D of that in the norm, at most.
        gained = up(spectral_up(W * gain) * (1 + len(gain) * SLACK))
        most = up(product_up(gained, root) + offset)
        square = up(square + up(product_up(most, most) * heads))
    W_O = attention.W_O_HDV.cpu().double().permute(1, 0, 2).flatten(1)
    written = product_up(spectral_up(W_O), up(square.sqrt() * (1 + SLACK)))
    return up(written + norm_up(attention.b_O_D.cpu().double()))


def mlp_cap(model: LanguageModel, layer: int) -> Tensor:
    """At least ‖MLP(x)‖ for every x."""
    mlp = mlp_of(model, layer)
    block = block_of(weights_of(model, mlp, mlp.norm))
    none = torch.zeros(1, len(block.gain_D), dtype=torch.float64)
    gate = parts.branch(block, block.gate_DN, block.b_gate_N, none)
    value = None
    if block.value_DN is not None and block.b_value_N is not None:
        value = parts.branch(block, block.value_DN, block.b_value_N, none)
    most = lemma.cap_up(block, gate, value, lemma.written(block))
    if not bool(most.isfinite()):
        raise UsageError(f"The MLP of layer {layer} of {model.name!r} has no norm before it.")
    return up(most + norm_up(block.b_out_D))


@torch.no_grad()
def recursion(
    model: LanguageModel, sites: Mapping[str, LocalSite], tokens_BT: Tensor
) -> list[Step]:
    """All steps, for the rows of the sites.

    Args:
        sites: what is proved locally at `resid_mid.N` sites; others are passed over.
        tokens_BT: the blocks that the sites' rows are numbered by.

    Raises:
        UsageError: there is no such site, or a part of a layer is of no kind that is bounded.
    """
    at = {each.given.layer: each for site, each in sites.items() if "resid_mid." in site}
    if not at:
        raise UsageError(
            "The recursion needs sites of the residual stream right before MLPs, resid_mid.N."
        )
    rows = next(iter(at.values())).given.token_R
    n_blocks = int(rows.max()) // tokens_BT.shape[1] + 1
    seen = _activations(model, tokens_BT[:n_blocks], rows)
    start = seen["resid_pre.0"]
    state = _State(start, torch.zeros(len(rows), dtype=torch.float64), [])
    state.moved("embedding", start)
    for layer in range(model.n_layers):
        cap = attention_cap(model, attention_of(model, layer)).expand(len(rows))
        state.moved(f"attention {layer}", seen[f"resid_mid.{layer}"], propagation=cap)
        own = at.get(layer)
        if own is not None:
            _to_site(state, own, seen[f"resid_mid.{layer}"])
        cap = mlp_cap(model, layer).expand(len(rows))
        _through_mlp(state, f"mlp {layer}", own, cap, seen[f"resid_post.{layer}"])
    return state.steps


def _activations(model: LanguageModel, tokens_BT: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Rows of the residual stream wherever it is written to, in float64."""
    wanted = ["resid_pre.0"]
    for layer in range(model.n_layers):
        wanted += [f"resid_mid.{layer}", f"resid_post.{layer}"]
    if missing := [site for site in wanted if site not in model.anatomy.taps]:
        raise UsageError(f"{model.name!r} has no {missing[0]}: there the recursion cannot pass.")
    found = model.capture(tokens_BT, wanted)
    return {site: x.flatten(0, 1).cpu()[rows].double() for site, x in found.items()}


def _coded(site: LocalSite) -> tuple[Prepared, parts.Codes]:
    coder = {**site.given.coder, "affine": site.affine_3N}
    codes = parts.Codes(coder["index"], coder["strength"].double())
    return prepare(site.given.weights, coder, {CERTIFIED}), codes


def _to_site(state: _State, site: LocalSite, x_RD: Tensor) -> None:
    given, codes = _coded(site)
    decoded = parts.decoded(given.bias_D, given.decoder_FD, codes)
    moved = up(ball_norm_up(subtract(exact(state.reference), exact(decoded.mid))))
    state.reference = decoded.mid
    jump = up(moved + norm_up(decoded.rad))
    state.moved(site.given.site, x_RD, transition=jump)


def _through_mlp(
    state: _State, name: str, site: LocalSite | None, cap_R: Tensor, x_RD: Tensor
) -> None:
    if site is None:
        state.moved(name, x_RD, propagation=cap_R)
        return
    given, codes = _coded(site)
    moves, surrogate = _on_the_ball(given, codes, state)
    missed = errors((CERTIFIED,), given, codes, site.given.x_RD)[CERTIFIED]
    # The surrogate is written in floats: its radius is one more part of the interaction.
    missed = up(missed + norm_up(surrogate.rad))
    better = up(moves + missed) < cap_R
    zero = torch.zeros_like(cap_R)
    reference = state.reference + surrogate.mid
    rounding = norm_up(up(reference.abs() * 2.0**-52))
    state.reference = torch.where(better[:, None], reference, state.reference)
    state.moved(
        name,
        x_RD,
        propagation=torch.where(better, moves, cap_R),
        interaction=torch.where(better, up(missed + rounding), zero),
    )
    share = float(better.double().mean())
    state.steps[-1] = Step(**{**state.steps[-1].__dict__, "by_features": share})


def _on_the_ball(given: Prepared, codes: parts.Codes, state: _State) -> tuple[Tensor, Ball]:
    """At least ‖f(x) − f(x̂)‖ for ‖x − x̂‖ ≤ ε, and the linear surrogate of f(x̂) [R, D]."""
    moves, mids, rads = [], [], []
    for start in range(0, len(state.eps), _AT_ONCE):
        at = slice(start, start + _AT_ONCE)
        piece = codes.rows(at)
        decoded = parts.decoded(given.bias_D, given.decoder_FD, piece)
        scalar = parts.scalar(given.block, decoded)
        gate, value = given.into
        sums = parts.Inputs(
            parts.totals(gate, piece, scalar),
            None if value is None else parts.totals(value, piece, scalar),
        )
        around = lemma.Near(decoded, state.eps[at])
        moves.append(lemma.transition_up(given.block, around, given.into, sums, given.out))
        hidden = lemma.affine(sums, given.affine_3N)
        written = add(parts.product(hidden, exact(given.block.out_ND)), exact(given.block.b_out_D))
        mids.append(written.mid)
        rads.append(written.rad)
    return torch.cat(moves), Ball(torch.cat(mids), torch.cat(rads))


def loss_cap(model: LanguageModel) -> float:
    """At least the cross-entropy of any input, of a model that does not scale its logits up:
    log(1 + (V − 1) e^w), w = 2 √D max ‖gain ∘ u_v‖ and the biases' part."""
    from crosslens.lm.mlp import norm_of

    norm = norm_of(model.anatomy.taps["final"].module, model.d_model)
    if norm is None:
        raise UsageError(f"The norm before {model.name!r}'s unembedding is of no kind known here.")
    gain = norm.gain_D.cpu().double().abs() * (1 + 1e-4)  # as read off what the norm does
    module: Any = model.module
    head = module.get_output_embeddings()
    U_VD: Tensor = head.weight.detach().cpu()
    bias: Tensor | None = getattr(head, "bias", None)
    root = math.sqrt(len(gain)) * (1 + SLACK)
    largest = torch.zeros((), dtype=torch.float64)
    for rows in torch.split(U_VD, 4096):
        own = up(norm_up(up(rows.double() * gain)) * root)
        if norm.bias_D is not None:
            own = up(own + norm_up(rows.double()) * norm_up(norm.bias_D.cpu().double()))
        largest = torch.maximum(largest, own.max())
    if bias is not None:
        largest = up(largest + bias.detach().cpu().double().abs().max())
    wide = float(up(largest * 2))
    return float(logits.loss_cap(torch.tensor(wide, dtype=torch.float64), len(U_VD)))


def plain(steps: Sequence[Step], cap: float, vocabulary: int) -> dict[str, Any]:
    """JSON-able. `loss` is the weights' cap on the cross-entropy, which is all that is left of a
    bound where the last error is as large as the row (`vacuous`)."""
    last = steps[-1]
    return {
        "steps": [step.plain() for step in steps],
        "loss": cap,
        "loss_uniform": math.log(vocabulary),
        "vacuous": last.after >= last.norm,
    }

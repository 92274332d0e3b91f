"""What a layer-local certificate is checked by: one MLP, the norm before it, and given rows.

The claim is about the rows x that the certificate's data hold: activations that a model had, which
a check of one layer cannot work out again. So `data` are the rows themselves, hashed like tokens;
that the model gives them is not part of the claim. Weights are the MLP's; decoder, codes (any, if
not negative) and the surrogate's numbers are untrusted. Claimed is a mean over the rows, of

    interaction   ‖f(x̂) − surrogate‖
    transition    ‖f(x) − f(x̂)‖
    coder         ‖x − x̂‖

under the kind `site_error`, with that word for the site. `lemmas.local_mlp` has the proofs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from crosslens.proofs.certificate import Refused
from crosslens.proofs.families.parts import Asked, Bounds, Family, Tensors, affordable, within
from crosslens.proofs.ledger import Cost, total
from crosslens.proofs.ledger_local import fixed_cost, row_cost, times
from crosslens.proofs.lemmas import local_mlp as lemma
from crosslens.proofs.lemmas import local_parts as parts
from crosslens.proofs.lemmas.neurons import KINDS
from crosslens.proofs.rounding import Ball, sum_up, up

NORMS = get_args(parts.NormKind)
QUANTITY: Mapping[str, str] = {
    **{
        f"{surrogate}/{method}": "interaction"
        for surrogate, methods in (
            ("additive", ("exact", "neurons", "sizes", "pairs")),
            ("given bias", ("exact", "neurons")),
            ("linear", ("exact", "neurons")),
            ("dominance", ("exact", "sizes")),
            ("nothing", ("cap",)),
        )
        for method in methods
    },
    "transition/ball": "transition",
    "coder/exact": "coder",
}
"""Tier → what its number bounds."""
AT_ONCE = 2**18
"""Numbers in any one tensor of contributions."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What does not grow with the rows."""

    block: parts.Block
    into: tuple[parts.Branch, parts.Branch | None]
    out: lemma.Written
    decoder_FD: Tensor
    bias_D: Tensor
    affine_3N: Tensor
    pairs: lemma.PairTable | None


def prepare(weights: Tensors, coder: Tensors, tiers: set[str]) -> Prepared:
    """The tables that these tiers need."""
    block = block_of(weights)
    decoder, bias = coder["decoder"].double(), coder["bias"].double()
    rows = torch.cat([decoder, bias[None]])
    gate = parts.branch(block, block.gate_DN, block.b_gate_N, rows)
    value = None
    if block.value_DN is not None and block.b_value_N is not None:
        value = parts.branch(block, block.value_DN, block.b_value_N, rows)
    out = lemma.written(block)
    wanted = "additive/pairs" in tiers
    return Prepared(
        block=block,
        into=(gate, value),
        out=out,
        decoder_FD=decoder,
        bias_D=bias,
        affine_3N=coder["affine"].double(),
        pairs=lemma.pair_table(block.kind, gate, value, out) if wanted else None,
    )


def block_of(weights: Tensors) -> parts.Block:
    """The MLP that the weights describe; `form` numbers φ and norm, and has the norm's floor."""
    kind, norm, floor = weights["form"].tolist()
    if kind not in range(len(KINDS)) or norm not in range(len(NORMS)) or not floor >= 0:
        raise Refused(f"The weights' form {weights['form'].tolist()} is no MLP that is known.")
    exact = {name: tensor.double() for name, tensor in weights.items()}
    return parts.Block(
        kind=KINDS[int(kind)],
        norm=NORMS[int(norm)],
        floor=floor,
        gain_D=exact["gain"],
        shift_D=exact["shift"],
        gate_DN=exact["gate"],
        value_DN=exact.get("value"),
        b_gate_N=exact["b_gate"],
        b_value_N=exact.get("b_value"),
        out_ND=exact["out"],
        b_out_D=exact["b_out"],
    )


def errors(
    tiers: Iterable[str], given: Prepared, codes: parts.Codes, x_RD: Tensor
) -> dict[str, Tensor]:
    """At least each row's error by each of these tiers [R], some rows at a time."""
    wide = (codes.index_RK.shape[1] + 1) * len(given.block.b_gate_N)
    step = max(1, AT_ONCE // wide)
    pieces = [
        _Rows(given, codes.rows(slice(start, start + step)), x_RD[start : start + step])
        for start in range(0, len(x_RD), step)
    ]
    found: dict[str, list[Tensor]] = {tier: [] for tier in tiers}
    while pieces:
        piece = pieces.pop(0)  # what it keeps goes with it
        for tier, errors_ in found.items():
            errors_.append(piece.error(tier))
    return {tier: torch.cat(errors_) for tier, errors_ in found.items()}


@dataclass(frozen=True)
class _Rows:
    """Some rows, and what several tiers may need of them."""

    given: Prepared
    codes: parts.Codes
    x_RD: Tensor
    missed: dict[str, Ball] = field(default_factory=dict)

    @cached_property
    def decoded(self) -> Ball:
        return parts.decoded(self.given.bias_D, self.given.decoder_FD, self.codes)

    @cached_property
    def scalar(self) -> Ball:
        return parts.scalar(self.given.block, self.decoded)

    @cached_property
    def totals(self) -> parts.Inputs:
        return self._inputs(parts.totals)

    @cached_property
    def single(self) -> parts.Inputs:
        return self._inputs(parts.contributions)

    def _inputs(self, made: Callable[[parts.Branch, parts.Codes, Ball], Ball]) -> parts.Inputs:
        gate, value = (
            None if into is None else made(into, self.codes, self.scalar)
            for into in self.given.into
        )
        assert gate is not None
        return parts.Inputs(gate, value)

    def error(self, tier: str) -> Tensor:
        """At least each row's error."""
        given, (surrogate, method) = self.given, tier.split("/")
        block, out = given.block, given.out
        if method == "cap":
            return lemma.cap_up(block, *given.into, out).expand(len(self.x_RD))
        if surrogate == "coder":
            return lemma.site_error_up(lemma.near(self.x_RD, self.decoded))
        if surrogate == "transition":
            at = lemma.near(self.x_RD, self.decoded)
            return lemma.transition_up(block, at, given.into, self.totals, out)
        if given.pairs is not None and method == "pairs":
            return lemma.pair_bound(given.pairs, self.codes, self.scalar)
        if method == "sizes":
            return lemma.spread_up(lemma.sizes_up(block.kind, self.single, surrogate), out)
        missed = self._missed(surrogate)
        return (
            lemma.exact_up(missed, out) if method == "exact" else lemma.spread_up(missed.size, out)
        )

    def _missed(self, surrogate: str) -> Ball:
        if surrogate not in self.missed:
            single = None if surrogate == "linear" else self.single
            sums = self.totals if single is None else lemma.summed(single)
            kind, affine = self.given.block.kind, self.given.affine_3N
            self.missed[surrogate] = lemma.missed(kind, sums, single, surrogate, affine)
        return self.missed[surrogate]


def evaluate(asked: Asked) -> Bounds:
    """The mean that the tiers bound, group by group."""
    size, coder = asked.size, asked.coder
    within("The codes", coder["index"], size["F"])
    if bool((coder["strength"] < 0).any()):
        raise Refused("The codes hold a negative strength; the bounds are proved for others.")
    quantities = {QUANTITY[tier] for tier in asked.tiers.values()}
    if len(quantities) != 1:
        raise Refused(f"The tiers bound different things: {', '.join(sorted(quantities))}.")
    groups = _groups(asked)
    cost = _cost(asked, {tier: len(rows) for tier, rows in groups})
    given = prepare(asked.weights, coder, set(asked.tiers.values()))
    codes = parts.Codes(coder["index"], coder["strength"].double())
    x_RD = rows_of(asked.data)
    found = [errors((tier,), given, codes.rows(at), x_RD[at])[tier] for tier, at in groups]
    mean = float(up(sum_up(torch.cat(found)) / size["R"]))
    if not math.isfinite(mean):
        raise Refused("The bound is not finite: a row is decoded to nothing, or numbers overflow.")
    return Bounds(
        accuracy=0.0, loss=math.inf, base=math.inf, cost=cost, sites={quantities.pop(): mean}
    )


def rows_of(data: Tensors) -> Tensor:
    """The rows x [R, D]: data are whole numbers, so the floats lie there as their bits."""
    x_RD = data["rows"].view(torch.float64)
    if not bool(x_RD.isfinite().all()):
        raise Refused("The rows hold something else than finite floats.")
    return x_RD


def _groups(asked: Asked) -> list[tuple[str, Tensor]]:
    """Each tier and the numbers of its rows."""
    names = sorted(asked.tiers)
    everything = torch.arange(asked.size["R"])
    if len(names) == 1:
        return [(asked.tiers[names[0]], everything)]
    group_R = asked.coder.get("group")
    if group_R is None:
        raise Refused(
            "Several groups are claimed, and the coder does not say which row is in which."
        )
    within("The groups", group_R, len(names))
    found = [(asked.tiers[name], everything[group_R == i]) for i, name in enumerate(names)]
    return [(tier, rows) for tier, rows in found if len(rows)]


def _cost(asked: Asked, rows: Mapping[str, int]) -> Cost:
    gated = "value" in asked.weights
    size = asked.size
    cost = total(
        fixed_cost(set(asked.tiers.values()), size, gated),
        Cost(bits=size["R"] if "group" in asked.coder else 0),
        *(times(row_cost(tier, size, gated), count) for tier, count in rows.items()),
    )
    return affordable(cost, (size["F"] + 2) ** 2, (size["F"] + 1) * size["N"])


GATED = Family(
    weights={
        **dict.fromkeys(("gate", "value"), "D N"),
        **dict.fromkeys(("gain", "shift", "b_out"), "D"),
        **dict.fromkeys(("b_gate", "b_value"), "N"),
        "out": "N D",
        "form": "3",
    },
    coder={"decoder": "F D", "bias": "D", "index": "R K", "strength": "R K", "affine": "3 N"},
    hints={"group": "R"},
    data={"rows": "R D"},
    tiers=tuple(QUANTITY),
    evaluate=evaluate,
    whole=frozenset({"index", "group"}),
    mixes=True,
)
PLAIN = replace(
    GATED,
    weights={k: v for k, v in GATED.weights.items() if k not in ("value", "b_value")},
)
"""Without a gate."""

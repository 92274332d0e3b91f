"""What one crosscoder of the small language model reconstructs, how much its latents interact, and
what is proved with it, tier by tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from crosslens.proofs import checker
from crosslens.proofs.ladder import small_lm_proof as proof
from crosslens.proofs.ladder import small_lm_search as search
from crosslens.proofs.ladder.small_lm import SmallLM, Text
from crosslens.proofs.ladder.small_lm_coder import Features
from crosslens.proofs.ladder.small_lm_penalty import interaction, readers_of
from crosslens.proofs.ladder.small_lm_search import SHAPES
from crosslens.proofs.lemmas import local_parts as parts
from crosslens.proofs.lemmas import readout as out
from crosslens.proofs.lemmas.normalisation import rms_moves
from crosslens.proofs.lemmas.stream import FLOOR, exactly, normalised
from crosslens.proofs.local import LocalSite, certificate, local
from crosslens.proofs.local_certificate import errors, prepare
from crosslens.proofs.local_gather import Gathered, padded
from crosslens.proofs.local_truth import Truth
from crosslens.proofs.tiers import Case, as_tier, written

BUDGETS = (0.2, 0.35, 0.5)
"""Shares of brute force's flops."""
RECURSED = ("codes", "additive", "pairs")
REGIONS = {"regions 16": SHAPES[1], "regions 8": SHAPES[3]}
"""By contexts in a region."""
MID = 1
"""The site that the MLP reads: resid_mid.0."""
CHECKED = ("additive/neurons", "linear/neurons")
"""Tiers of the MLP alone whose certificates are checked."""
DECODED = ("additive/exact", "additive/neurons")


@dataclass(frozen=True)
class Bench:
    """The model, and what all crosscoders are judged on."""

    config: SmallLM
    text: Text
    weights: Mapping[str, Tensor]
    data: Mapping[str, Tensor]
    true: search.Truth
    local_rows: int
    """Positions that the MLP alone is looked at on."""


def judged(features: Features, config: SmallLM, bench: Bench) -> dict[str, Any]:
    """All figures of one crosscoder; `config` is its own."""
    given = gathered(features, bench)
    return {
        **measured(features, bench),
        **end_to_end(features, config, bench),
        "local": local_figures(local(given, _silent)),
        "decoded": decoded_losses(given, bench),
    }


def _silent(_: str) -> None:
    pass


@torch.no_grad()
def measured(features: Features, bench: Bench) -> dict[str, float]:
    """FVU over all sites (scaled, as in training), at the MLP's and at the last, and what reaches
    the MLP's neurons."""
    x_RX = features.scaled(bench.true.rows_PND.float())
    z_RL = features.coder.encode(x_RX)
    left_RX, all_RX = (x_RX - features.coder(x_RX)).square(), (x_RX - x_RX.mean(0)).square()
    left_P, all_P = (
        each.reshape(len(each), -1, bench.config.width).sum((0, 2)) for each in (left_RX, all_RX)
    )
    images_FN = features.decoder_PFD[MID] @ bench.weights["W_in"][0]
    scalar_R = (bench.true.rows_PND[MID].square().mean(1) + FLOOR).rsqrt().float()
    readers = readers_of(bench.weights, features.scale_P)
    return {
        "fvu": float(left_P.sum() / all_P.sum()),
        "fvu_mid": float(left_P[MID] / all_P[MID]),
        "fvu_last": float(left_P[-1] / all_P[-1]),
        "l0": float((z_RL > 0).float().sum(1).mean()),
        "interaction": interaction(features.coder, x_RX, readers),
        "size": float((scalar_R[:, None] * (z_RL @ images_FN.abs())).mean()),
        "bias": float(features.bias_PD[MID].norm()),
    }


def end_to_end(features: Features, config: SmallLM, bench: Bench) -> dict[str, Any]:
    """Bounds on the model's loss: mixtures within budgets, regions, and the recursion."""
    coders = [search.hints(config, features, bench.true, shape) for shape in SHAPES]
    case = proof.made_case(config, bench.weights, bench.data, bench.true, coders[1])
    candidates = [
        proof.candidate(case, shape, coder, bench.true)
        for shape, coder in zip(SHAPES, coders, strict=True)
    ]
    spent = {f"{budget:g}": proof.spent(case, candidates, budget) for budget in BUDGETS}
    near = {name: coders[SHAPES.index(shape)] for name, shape in REGIONS.items()}
    return {
        "budgets": {name: loss_bound(case, *mixed, check=True) for name, mixed in spent.items()},
        "regions": {name: loss_bound(case, {"all": "regions"}, own) for name, own in near.items()},
        "recursion": {
            tier: loss_bound(case, {"all": tier}, coders[1], check=tier == "additive")
            for tier in RECURSED
        },
    }


def loss_bound(
    case: Case, tiers: Mapping[str, str], coder: Mapping[str, Tensor], *, check: bool = False
) -> dict[str, Any]:
    """The bound, its cost as a share of brute force, the recursion's terms at the MLP, and the
    checker's word if asked for."""
    found = proof.bounds(case, tiers, coder)
    figures: dict[str, Any] = {"bound": found.loss, "flops": found.cost.flops / case.brute.flops}
    if found.layers:
        figures["terms"] = asdict(found.layers[-1])
    if check:
        tier = as_tier("chosen", found, "loss")
        made = written(case, ("loss", ""), tier, tiers, coder, [])
        figures["checked"] = checker.check(made, case.weights, case.data).accepted
    return figures


@torch.no_grad()
def gathered(features: Features, bench: Bench) -> Gathered:
    """The first MLP with held-out rows and their codes, as layer-local proofs take them."""
    rows_PRD = bench.true.rows_PND[:, : bench.local_rows]
    z_RL = features.coder.encode(features.scaled(rows_PRD.float())).double()
    latents = (z_RL > 0).any(0).nonzero()[:, 0]
    index, strength = padded(z_RL[:, latents])
    W_in, W_out = bench.weights["W_in"][0], bench.weights["W_out"][0]
    D, N = W_in.shape
    weights = {
        "gate": W_in, "out": W_out, "gain": torch.ones(D), "shift": torch.zeros(D),
        "b_gate": torch.zeros(N), "b_out": torch.zeros(D),
        "form": torch.tensor([0.0, 1.0, FLOOR], dtype=torch.float64),
    }  # fmt: skip
    coder = {
        "decoder": features.decoder_PFD[MID][latents].contiguous(),
        "bias": features.bias_PD[MID].contiguous(),
        "index": index,
        "strength": strength,
    }
    return Gathered(
        site="resid_mid.0", layer=0, kind="relu", gated=False, weights=weights, coder=coder,
        x_RD=rows_PRD[MID].contiguous(), token_R=torch.arange(len(index)),
    )  # fmt: skip


def local_figures(site: LocalSite) -> dict[str, Any]:
    """Bounds as shares of the mean ‖f(x̂)‖, with the truth and the cost of a token as a share of
    the MLP's."""
    told = site.plain()
    tiers = {
        tier["name"]: {
            "ratio": tier["ratio"],
            "true": tier["true_ratio"],
            "flops": tier["flops_per_token"] / told["brute_per_token"],
        }
        for tier in (*told["tiers"], told["transition"], told["coder"])
    }
    for name in CHECKED:
        made, beside = certificate(site, name)
        verdict = checker.check(made, beside["weights"], beside["data"])
        tiers[name]["checked"] = verdict.accepted
    whole = site.whole_true
    return {"tiers": tiers, "whole": {name: value / site.output for name, value in whole.items()}}


@torch.no_grad()
def decoded_losses(given: Gathered, bench: Bench) -> dict[str, float]:
    """Mean loss with x̂ for the rows that the MLP reads: its value, and what is known of it if the
    MLP is the sum of single latents' effects, with each row's bound on what they miss.

    By the lemmas, whose roundings outward it has; the surrogate's own rounding is left out, so it
    is no certificate.
    """
    coder = {**given.coder, "affine": torch.zeros(3, len(given.weights["out"]))}
    codes = parts.Codes(coder["index"], coder["strength"])
    prepared = prepare(given.weights, coder, set(DECODED))
    missed = errors(DECODED, prepared, codes, given.x_RD)
    truth = Truth(given.weights, coder)
    decoded = truth.decoded()
    label_R = bench.data["labels"].flatten()[: len(decoded)]
    alone_RD = decoded + truth.surrogates()["additive"]
    real_RD = decoded + truth.output(decoded)
    found = {"true": _loss(bench, real_RD, torch.zeros(len(decoded)).double(), label_R)}
    return found | {name: _loss(bench, alone_RD, eps, label_R) for name, eps in missed.items()}


def _loss(bench: Bench, x_RD: Tensor, eps_R: Tensor, label_R: Tensor) -> float:
    """At least the mean loss of rows within `eps` of x, none above its label's cap."""
    read, every = out.readout(bench.weights["W_U"]), torch.arange(len(x_RD))
    reach_R = rms_moves(x_RD, eps_R, floor=FLOOR)
    centre_RD = normalised(exactly(x_RD)).value
    apart = out.regions(read, centre_RD, torch.zeros(len(x_RD), 1, dtype=torch.int64))
    leading = out.far(read, apart, every, reach_R)
    own_R = out.labels_far_down(read, apart, every, reach_R, label_R)
    loss_R = out.losses_up(leading, every, own_R)
    return float(torch.minimum(loss_R, out.caps(read)[label_R]).mean())

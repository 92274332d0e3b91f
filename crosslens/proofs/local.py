"""Layer-local certificates: how far one MLP is, at the coder's rows, from a surrogate that treats
latents one by one, by every tier, beside the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosslens.proofs.certificate import Certificate, Ledger, fingerprint
from crosslens.proofs.families.parts import Bounds
from crosslens.proofs.ledger import Cost, total
from crosslens.proofs.ledger_local import brute_cost, fixed_cost, row_cost, times
from crosslens.proofs.lemmas import local_parts as parts
from crosslens.proofs.local_certificate import QUANTITY, Prepared, errors, prepare
from crosslens.proofs.local_gather import Gathered
from crosslens.proofs.local_truth import Truth
from crosslens.proofs.rounding import norm_down

CERTIFIED = "linear/exact"
MIXED = ("linear/neurons", "linear/exact")
SHARES = (0.1, 0.3, 0.6)
"""Of the rows, worst first, that a mixture gives to the dearer of its tiers."""
SPARE = 1 + 2.0**-30
"""Another machine sums in another order: a claim is a hair above what came out here."""
Said = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LocalTier:
    """One way to bound a site's error, its cost, and the true value of what it bounds."""

    name: str
    bound: float
    """At least the mean over the rows."""
    true: float
    fixed: Cost
    """What more rows would not add to."""
    rows: Cost

    @property
    def cost(self) -> Cost:
        return self.fixed + self.rows

    def plain(self, output: float, n_rows: int, brute: float) -> dict[str, Any]:
        """JSON-able; ratios are to `output`, `tokens_to_pay` is how many tokens have to share the
        tables for all to cost no more than `brute` flops each (None: no number does)."""
        saved = brute - self.rows.flops / n_rows
        return {
            "tokens_to_pay": math.ceil(self.fixed.flops / saved) if saved > 0 else None,
            "name": self.name,
            "bound": self.bound,
            "flops": self.cost.flops,
            "bits": self.cost.bits,
            "true": self.true,
            "ratio": self.bound / output if output else None,
            "true_ratio": self.true / output if output else None,
            "flops_fixed": self.fixed.flops,
            "flops_per_token": self.rows.flops / n_rows,
        }


@dataclass(frozen=True, kw_only=True)
class LocalSite:
    """What is proved of one MLP."""

    given: Gathered
    affine_3N: Tensor
    tiers: tuple[LocalTier, ...]
    """Of the interaction, dearest first within a surrogate."""
    transition: LocalTier
    coder: LocalTier
    output: float
    """At most the mean ‖f(x̂)‖."""
    row_norm: float
    """At most the mean ‖x‖."""
    whole_true: Mapping[str, float]
    """Surrogate → the mean ‖f(x) − surrogate‖, in plain float64."""
    worst_R: Tensor
    """Each row's bound by the cheaper tier of the mixtures."""

    @property
    def brute(self) -> Cost:
        return brute_cost(self.given.size, self.given.gated)

    def tier(self, name: str) -> LocalTier:
        """The tier of that name."""
        return next(tier for tier in self.tiers if tier.name == name)

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        n_rows = len(self.given.x_RD)
        per_row = self.brute.flops / n_rows
        best = min(self.tiers, key=lambda tier: tier.bound)
        surrogate = best.name.split("/")[0].removeprefix("mixed ")
        return {
            "site": self.given.site,
            "layer": self.given.layer,
            "kind": self.given.kind,
            "gated": self.given.gated,
            "tokens": n_rows,
            "latents": self.given.size["F"],
            "most_active": self.given.size["K"],
            "output": self.output,
            "row_norm": self.row_norm,
            "flops_brute": self.brute.flops,
            "brute_per_token": per_row,
            "tiers": [tier.plain(self.output, n_rows, per_row) for tier in self.tiers],
            "transition": self.transition.plain(self.output, n_rows, per_row),
            "coder": self.coder.plain(self.row_norm, n_rows, per_row),
            "whole": {
                "surrogate": surrogate,
                "bound": self.transition.bound + best.bound,
                "true": self.whole_true[surrogate],
            },
        }


@torch.no_grad()
def local(given: Gathered, said: Said) -> LocalSite:
    """All tiers of one site."""
    coder = {**given.coder, "affine": fitted(given)}
    said(f"{given.site}: tables")
    prepared = prepare(given.weights, coder, set(QUANTITY))
    codes = parts.Codes(coder["index"], coder["strength"].double())
    truth = _truths(given, coder)
    said(f"{given.site}: bounds by {len(QUANTITY)} tiers")
    found = errors(QUANTITY, prepared, codes, given.x_RD)
    tiers = {
        name: _tier(name, float(bound_R.mean()), truth[name.split("/")[0]], given)
        for name, bound_R in found.items()
    }
    mixed = _mixtures(given, found, truth["linear"])
    own = [tier for name, tier in tiers.items() if QUANTITY[name] == "interaction"]
    return LocalSite(
        given=given,
        affine_3N=coder["affine"],
        tiers=(*own, *mixed),
        transition=tiers["transition/ball"],
        coder=tiers["coder/exact"],
        output=_output(prepared, codes),
        row_norm=float(norm_down(given.x_RD).mean()),
        whole_true={name.removeprefix("whole "): v for name, v in truth.items() if "whole" in name},
        worst_R=found[MIXED[0]],
    )


def _tier(name: str, bound: float, true: float, given: Gathered) -> LocalTier:
    size, gated = given.size, given.gated
    return LocalTier(
        name=name,
        bound=bound * SPARE,
        true=true,
        fixed=fixed_cost({name}, size, gated),
        rows=times(row_cost(name, size, gated), size["R"]),
    )


def _mixtures(given: Gathered, found: Mapping[str, Tensor], true: float) -> list[LocalTier]:
    """The rows that the cheaper tier bounds worst go to the dearer."""
    size, gated = given.size, given.gated
    cheap, dear = (found[name] for name in MIXED)
    made = []
    for share in SHARES:
        worst = worst_rows(cheap, share)
        bound = float(torch.where(worst, dear, cheap).mean())
        counts = zip(MIXED, (int((~worst).sum()), int(worst.sum())), strict=True)
        made.append(
            LocalTier(
                name=f"mixed linear/{round(100 * share)} %",
                bound=bound * SPARE,
                true=true,
                fixed=fixed_cost(set(MIXED), size, gated),
                rows=total(
                    Cost(bits=size["R"]),
                    *(times(row_cost(name, size, gated), n) for name, n in counts),
                ),
            )
        )
    return made


def worst_rows(bound_R: Tensor, share: float) -> Tensor:
    """That share of the rows, with the largest bounds (a mask)."""
    mask = torch.zeros(len(bound_R), dtype=torch.bool)
    mask[bound_R.argsort(descending=True, stable=True)[: round(share * len(bound_R))]] = True
    return mask


def _truths(given: Gathered, coder: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean true values of what tiers bound, by the tiers' first words, and `whole SURROGATE`."""
    truth = Truth(given.weights, coder)
    decoded = truth.decoded()
    at_decoded, at_x = truth.output(decoded), truth.output(given.x_RD)

    def mean(x_RD: Tensor) -> float:
        return float(x_RD.norm(dim=1).mean())

    found = {"transition": mean(at_x - at_decoded), "coder": mean(given.x_RD - decoded)}
    for name, surrogate in truth.surrogates().items():
        found[name] = mean(at_decoded - surrogate)
        found[f"whole {name}"] = mean(at_x - surrogate)
    return found


def _output(prepared: Prepared, codes: parts.Codes) -> float:
    """At most the mean ‖f(x̂)‖."""
    decoded = parts.decoded(prepared.bias_D, prepared.decoder_FD, codes)
    made = parts.output(prepared.block, decoded)
    return float(norm_down((made.mid.abs() - made.rad).clamp_min(0)).mean()) / SPARE


@torch.no_grad()
def fitted(given: Gathered) -> Tensor:
    """c, p, q of the linear surrogate [3, N]: least squares of each neuron over the rows.

    A hint: any numbers are sound.
    """
    blank = {**given.coder, "affine": torch.zeros(3, 1)}
    truth = Truth(given.weights, blank)
    gate, value = truth.arguments(truth.decoded())
    hidden = truth.hidden(gate, value)
    second = torch.zeros_like(gate) if value is None else value
    design = torch.stack([torch.ones_like(gate), second, gate], -1).transpose(0, 1)
    square = design.transpose(1, 2) @ design
    ridge = 1e-9 * square.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-300)
    square = square + ridge[:, None, None] * torch.eye(3, dtype=torch.float64)
    right = design.transpose(1, 2) @ hidden.T[..., None]
    found: Tensor = torch.linalg.solve(square, right)[..., 0].T
    return found.nan_to_num(0.0, 0.0, 0.0).contiguous()


def certificate(site: LocalSite, name: str) -> tuple[Certificate, dict[str, dict[str, Tensor]]]:
    """A certificate of one tier (a mixture's too), and the weights and data it is about."""
    given = site.given
    tier = {t.name: t for t in (*site.tiers, site.transition, site.coder)}[name]
    coder = {**given.coder, "affine": site.affine_3N}
    tiers = {"all": name}
    if name.startswith("mixed "):
        share = float(name.split("/")[1].removesuffix(" %")) / 100
        coder["group"] = worst_rows(site.worst_R, share).long()
        tiers = dict(zip(("0 easy", "1 worst"), MIXED, strict=True))
    beside = {"weights": dict(given.weights), "data": {"rows": given.x_RD.view(torch.int64)}}
    made = Certificate(
        family="local_mlp" if given.gated else "local_mlp_plain",
        kind="site_error",
        bound=tier.bound,
        hashes={n: fingerprint(t) for n, t in {**beside, "coder": coder}.items()},
        tiers=tiers,
        ledger=Ledger(
            matmul=tier.cost.matmul,
            elementwise=tier.cost.elementwise,
            bits=tier.cost.bits,
            search_flops=sum(other.cost.flops for other in site.tiers),
            attempts=len(site.tiers),
        ),
        coder=coder,
        site=QUANTITY.get(name, "interaction"),
    )
    return made, beside


def holds(found: Bounds, claimed: Certificate) -> bool:
    """Whether recomputed bounds are as good as the claim."""
    return found.sites[claimed.site] <= claimed.bound and found.cost == claimed.ledger.cost

"""Layer-local certificates: what the checker accepts, what it refuses, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crosslens.proofs import checker
from crosslens.proofs.certificate import Certificate, Refused, fingerprint, load, read_tensors, save
from crosslens.proofs.families.parts import Asked
from crosslens.proofs.ledger_local import brute_cost
from crosslens.proofs.local import LocalSite, certificate, local
from crosslens.proofs.local_certificate import QUANTITY, evaluate
from crosslens.proofs.local_truth import Truth
from tests.proofs_local_toy import SHAPES, Sizes, Tensors, gathered, loops, toy


def silent(_: str) -> None:
    pass


def made(shape: tuple[str, bool, str], seed: int = 0, rows: int = 12) -> LocalSite:
    weights, coder, x = toy(*shape, seed=seed, sizes=Sizes(rows=rows))
    return local(gathered(weights, coder, x), silent)


def means(site: LocalSite) -> dict[str, float]:
    """True means by the loops."""
    coder = {**site.given.coder, "affine": site.affine_3N}
    x = site.given.x_RD
    told = [loops(dict(site.given.weights), coder, x, row) for row in range(len(x))]
    return {name: sum(each[name] for each in told) / len(told) for name in told[0]}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tier_says_bound_and_truth(shape: tuple[str, bool, str]) -> None:
    site = made(shape)
    true = means(site)
    for tier in (*site.tiers, site.transition, site.coder):
        name = tier.name.split("/")[0].removeprefix("mixed ")
        assert tier.true == pytest.approx(true[name], abs=1e-9)
        assert tier.bound >= tier.true * (1 - 1e-12)
    plain = site.plain()
    for told in plain["tiers"]:
        paid, saved = told["tokens_to_pay"], plain["brute_per_token"] - told["flops_per_token"]
        assert (paid is None) == (saved <= 0)
        assert paid is None or (paid - 1) * saved < told["flops_fixed"] <= paid * saved
    assert plain["whole"]["bound"] >= plain["whole"]["true"] * (1 - 1e-12)
    assert plain["tiers"][0].keys() >= {"name", "bound", "flops", "bits", "true", "ratio"}
    truth = Truth(site.given.weights, {**site.given.coder, "affine": site.affine_3N})
    output = float(truth.output(truth.decoded()).norm(dim=1).mean())
    assert output * (1 - 1e-7) <= site.output <= output
    assert site.brute == brute_cost(site.given.size, site.given.gated)


def test_mixtures_lie_between_their_tiers() -> None:
    site = made(("silu", True, "rms"))
    cheap, dear = site.tier("linear/neurons"), site.tier("linear/exact")
    before = cheap
    for share in (10, 30, 60):
        mixed = site.tier(f"mixed linear/{share} %")
        assert dear.bound <= mixed.bound <= before.bound
        assert before.rows.flops < mixed.rows.flops < dear.rows.flops
        before = mixed


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5]])
@pytest.mark.parametrize("tier", [*QUANTITY, "mixed linear/30 %"])
def test_certificates_are_accepted_and_a_hair_less_is_not(
    shape: tuple[str, bool, str], tier: str, tmp_path: Path
) -> None:
    if tier == "nothing/cap" and shape[2] == "none":
        return
    site = made(shape)
    claim, beside = certificate(site, tier)
    save(claim, tmp_path / "c", beside)
    read = load(tmp_path / "c")
    weights = read_tensors(tmp_path / "c" / "weights.safetensors")
    data = read_tensors(tmp_path / "c" / "data.safetensors")
    found = checker.check(read, weights, data)
    assert found.accepted, found.reason
    less = replace(read, bound=read.bound * (1 - 1e-8))
    assert not checker.check(less, weights, data).accepted
    cheaper = replace(read, ledger=replace(read.ledger, matmul=read.ledger.matmul - 1))
    assert "ledger" in checker.check(cheaper, weights, data).reason
    elsewhere = replace(read, site="coder" if read.site != "coder" else "transition")
    assert not checker.check(elsewhere, weights, data).accepted


def signed(claim: Certificate, weights: Tensors, data: Tensors, coder: Tensors) -> Certificate:
    """With matching hashes."""
    given = {"weights": weights, "data": data, "coder": coder}
    return replace(claim, coder=coder, hashes={k: fingerprint(v) for k, v in given.items()})


FAULTS = {
    "other weights": "SHA-256",
    "negative strength": "negative strength",
    "no such latent": "hold a number outside",
    "no such group": "hold a number outside",
    "a form that is none": "no MLP that is known",
    "rows that are no numbers": "finite floats",
    "a decoder of infinities": "finite floats",
    "two quantities": "different things",
    "groups without numbers": "which row is in which",
    "rows of another width": "should be",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_refused_with_the_reason(fault: str) -> None:
    site = made(("silu", True, "rms"))
    claim, beside = certificate(site, "mixed linear/30 %")
    weights, data, coder = beside["weights"], beside["data"], dict(claim.coder)
    match fault:
        case "negative strength":
            coder["strength"] = coder["strength"] - 10
        case "no such latent":
            coder["index"] = coder["index"] + 6
        case "no such group":
            coder["group"] = coder["group"] + 2
        case "a form that is none":
            weights = {**weights, "form": torch.tensor([9.0, 1.0, 0.0]).double()}
        case "rows that are no numbers":
            data = {"rows": torch.full_like(site.given.x_RD, math.nan).view(torch.int64)}
        case "a decoder of infinities":
            coder["decoder"] = coder["decoder"] * math.inf
        case "two quantities":
            claim = replace(claim, tiers={"0": "linear/exact", "1": "coder/exact"})
        case "groups without numbers":
            del coder["group"]
        case "rows of another width":
            data = {"rows": site.given.x_RD[:, :-1].contiguous().view(torch.int64)}
    claim = signed(claim, weights, data, coder)
    if fault == "other weights":
        weights = {**weights, "out": weights["out"] + 1}
    verdict = checker.check(claim, weights, data)
    assert not verdict.accepted
    assert FAULTS[fault] in verdict.reason


def test_what_decodes_to_nothing_has_no_finite_bound() -> None:
    weights, coder, x = toy("silu", True, "rms", sizes=Sizes(rows=3))
    weights["form"][2] = 0.0
    coder |= {"strength": coder["strength"] * 0, "bias": coder["bias"] * 0}
    site = gathered(weights, coder, x)
    asked = Asked(
        tiers={"all": "additive/exact"}, size=site.size, weights=weights, coder=coder,
        data={"rows": x.view(torch.int64)},
    )  # fmt: skip
    with pytest.raises(Refused, match="not finite"):
        evaluate(asked)


@pytest.mark.parametrize("seed", range(60))
def test_corruptions_are_refused_or_sound(seed: int) -> None:
    """Some numbers of some tensor altered, with matching hashes: what is accepted is true."""
    shape = SHAPES[seed % len(SHAPES)]
    site = made(shape, seed=seed % 7, rows=5)
    tier = list(QUANTITY)[seed % len(QUANTITY)]
    if tier == "nothing/cap" and shape[2] == "none":
        return
    claim, beside = certificate(site, tier)
    parts = {"weights": dict(beside["weights"]), "data": {"rows": site.given.x_RD.clone()}}
    parts["coder"] = dict(claim.coder)
    generator = torch.Generator().manual_seed(seed)
    kind = ("weights", "data", "coder")[seed % 3]
    names = [name for name in parts[kind] if name not in ("form", "index", "group")]
    name = names[seed % len(names)]
    factor = 1 + 0.5 * torch.randn(parts[kind][name].shape, generator=generator).double().abs()
    parts[kind][name] = parts[kind][name].double() * factor
    weights, rows, coder = parts["weights"], parts["data"]["rows"], parts["coder"]
    data = {"rows": rows.view(torch.int64)}
    verdict = checker.check(signed(claim, weights, data, coder), weights, data)
    word = tier.split("/")[0]
    true = [loops(weights, coder, rows, row)[word] for row in range(len(rows))]
    assert not verdict.accepted or sum(true) / len(true) <= claim.bound * (1 + 1e-12)


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5], SHAPES[7]])
@pytest.mark.parametrize("tier", list(QUANTITY))
def test_the_ledger_is_what_torch_counts(shape: tuple[str, bool, str], tier: str) -> None:
    weights, coder, x = toy(*shape, sizes=Sizes(rows=6))
    site = gathered(weights, coder, x)
    asked = Asked(
        tiers={"all": tier}, size=site.size, weights=weights, coder=coder,
        data={"rows": x.view(torch.int64)},
    )  # fmt: skip
    cost = evaluate(asked).cost
    assert counted(lambda: evaluate(asked)) == cost.matmul
    more = {**site.size, "R": 60}
    assert cost.elementwise > 0
    assert cost.bits >= (site.size["F"] + 1) * site.size["D"] * 64
    assert brute_cost(more, shape[1]).flops == 10 * brute_cost(site.size, shape[1]).flops


def test_brute_force_is_what_torch_counts() -> None:
    for shape in (SHAPES[0], SHAPES[5]):
        weights, coder, x = toy(*shape)
        site = gathered(weights, coder, x)
        run = partial(Truth(weights, coder).output, x)
        assert counted(run) == brute_cost(site.size, shape[1]).matmul


def test_the_fit_is_the_best_linear_surrogate() -> None:
    """No nearby numbers fit better, neuron by neuron, in least squares."""
    weights, coder, x = toy("silu", True, "rms", sizes=Sizes(rows=40))
    site = local(gathered(weights, coder, x), silent)

    def squares(affine: torch.Tensor) -> torch.Tensor:
        truth = Truth(weights, {**coder, "affine": affine})
        gate, value = truth.arguments(truth.decoded())
        guess = affine[0] + affine[1] * value + affine[2] * gate
        return (truth.hidden(gate, value) - guess).square().sum(0)

    best = squares(site.affine_3N)
    for row in range(3):
        for step in (-1e-3, 1e-3):
            moved = site.affine_3N.clone()
            moved[row] += step
            assert (squares(moved) >= best).all()

"""Certificates of the small language model: groups, budgets, ledgers, lies."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosslens.cli import main
from crosslens.errors import UsageError
from crosslens.proofs import certificate as C
from crosslens.proofs import checker, ledger_lm
from crosslens.proofs.families import parts
from crosslens.proofs.families import small_lm as family
from crosslens.proofs.ladder import small_lm, small_lm_proof
from crosslens.proofs.ladder import small_lm_search as search
from crosslens.proofs.ladder.small_lm_proof import Ask, bounds, prove_case
from crosslens.proofs.tiers import Case, Proved, as_tier, written
from tests.proofs_small_lm import TINY, made, silent
from tests.test_proofs_checker import corrupted, counted

Made = tuple[Case, list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def one() -> Made:
    return made()


@pytest.fixture(scope="module")
def mixed(one: Made) -> Proved:
    return prove_case(one[0], one[1], Ask(budget=0.95), silent)


def true_loss(case: Case) -> float:
    return float(search.truth(case.weights, case.data).loss_N.mean())


def of_tier(case: Case, tier: str, claim: tuple[C.ClaimKind, str] = ("loss", "")) -> C.Certificate:
    found = as_tier(tier, bounds(case, {"all": tier}, case.coder), *claim)
    return written(case, claim, found, {"all": tier}, case.coder, [])


def check(case: Case, certificate: C.Certificate) -> checker.Verdict:
    return checker.check(certificate, case.weights, case.data)


# Mixtures


def test_a_mixture_keeps_its_budget_and_is_sound(one: Made, mixed: Proved) -> None:
    case = one[0]
    assert mixed.verdict.accepted, mixed.verdict.reason
    chosen = mixed.certificate
    assert set(chosen.tiers.values()) == {"regions", "distinct"}
    assert chosen.ledger.cost.flops <= 0.95 * case.brute.flops
    assert case.truth["loss"] <= chosen.bound
    flops = [point.flops for point in mixed.frontier]
    found = [point.bound for point in mixed.frontier]
    assert flops == sorted(flops)
    assert found == sorted(found, reverse=True)
    assert all(bound >= case.truth["loss"] for bound in found)
    for point in mixed.frontier:
        assert point.flops <= point.budget * case.brute.flops


def test_regions_beat_the_baseline_where_the_vocabulary_is_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in real models, most of the flops are the logits'; caching alone stays above."""
    monkeypatch.setattr(small_lm_proof, "BUDGETS", (0.5, 0.6, 0.7, 0.8))
    config = replace(TINY, vocabulary=1000, sequences=120, steps=120)
    case, coders = made(config)
    found = prove_case(case, coders, Ask(budget=0.6), silent)
    assert found.verdict.accepted, found.verdict.reason
    assert all(point.bound < point.baseline for point in found.frontier)
    assert all(case.truth["loss"] <= point.bound for point in found.frontier)
    cost = {tier.name: tier.cost.flops / case.brute.flops for tier in found.tiers}
    assert cost["regions"] < 0.7 < cost["distinct"]


def test_the_baseline_starts_at_what_weights_alone_rule_out(one: Made) -> None:
    """By loops, and never above the certified cap."""
    case = one[0]
    U = case.weights["W_U"].double()
    total = 0.0
    for label in case.data["labels"].flatten()[:20].tolist():
        apart = (U - U[:, label : label + 1]).norm(dim=0) * math.sqrt(len(U))
        total += math.log(sum(math.exp(a) for a in apart.tolist()))
    found = search.unknown(case.weights, case.data["labels"].flatten()[:20])
    assert found == pytest.approx(total / 20)
    assert case.unknown is not None
    assert case.unknown <= bounds(case, {"all": "box"}, case.coder).loss


def test_groups_may_have_any_tier(one: Made) -> None:
    case = one[0]
    shape = case.data["tokens"].shape
    group = torch.arange(math.prod(shape)).reshape(shape) % 6
    tiers = dict(zip("abcdef", family.SMALL_LM.tiers, strict=False))
    coder = {**case.coder, "group": group}
    found = bounds(case, tiers, coder)
    assert case.truth["loss"] <= found.loss
    each = [bounds(case, {"all": tier}, case.coder).loss for tier in tiers.values()]
    assert min(each) <= found.loss <= max(each)
    assert found.sites == {}
    expected = written(case, ("loss", ""), as_tier("x", found, "loss"), tiers, coder, [])
    assert check(case, expected).accepted
    assert checker.check(expected, case.weights, case.data).bounds is not None


def test_a_budget_below_the_base_case_is_refused(one: Made) -> None:
    with pytest.raises(UsageError, match="below the base case"):
        prove_case(one[0], one[1], Ask(budget=1e-6), silent)


# Claims


@pytest.mark.parametrize("tier", ["stream", "regions", "additive"])
def test_errors_at_sites_are_claimed(one: Made, tier: str) -> None:
    case = one[0]
    for site in family.sites(1):
        proof = of_tier(case, tier, ("site_error", site))
        assert check(case, proof).accepted
        better = replace(proof, bound=proof.bound * (1 - 2.0**-29))
        verdict = check(case, better)
        assert not verdict.accepted
        assert f"at {site} is claimed" in verdict.reason


def test_what_is_not_known_of_a_site_is_refused(one: Made) -> None:
    case = one[0]
    proof = of_tier(case, "stream", ("site_error", "embed"))
    elsewhere = check(case, replace(proof, site="resid_post.7"))
    assert "No error is bounded at the site 'resid_post.7'" in elsewhere.reason
    nowhere = check(case, replace(of_tier(case, "box"), kind="site_error", site="embed"))
    assert "known here are: none" in nowhere.reason


def test_a_proof_of_an_error_tells_the_truth_beside(one: Made) -> None:
    ask = Ask(kind="site_error", tier="stream", site="resid_post.0")
    found = prove_case(one[0], one[1], ask, silent).plain()
    assert found["truth"] <= found["bound"] < found["truth"] / 0.99
    assert found["claim"].startswith("mean ‖x − x̂‖ at resid_post.0 ≤ ")
    assert found["checked"] is True
    assert {tier["name"]: tier["bound"] for tier in found["tiers"]}["box"] is None


# On disk


def test_groups_and_sites_are_written_and_read(one: Made, mixed: Proved, tmp_path: Path) -> None:
    case = one[0]
    errors = of_tier(case, "stream", ("site_error", "embed"))
    for proof in (mixed.certificate, errors):
        C.save(proof, tmp_path / "c", {"weights": case.weights, "data": case.data})
        read = C.load(tmp_path / "c")
        assert replace(read, coder={}) == replace(proof, coder={})
        assert check(case, read).accepted


def test_a_certificate_of_the_first_version_is_read(one: Made, tmp_path: Path) -> None:
    case = one[0]
    C.save(of_tier(case, "regions"), tmp_path / "c", {})
    file = tmp_path / "c" / "certificate.json"
    found = json.loads(file.read_text())
    old = {name: value for name, value in found.items() if name != "site"} | {"version": 1}
    file.write_text(json.dumps(old))
    assert check(case, C.load(tmp_path / "c")).accepted
    for change in ({"site": ""}, {"tiers": {"a": "box", "b": "box"}}, {"kind": "site_error"}):
        file.write_text(json.dumps(old | change))
        with pytest.raises(C.Refused):
            C.load(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tiers": {}}, "0 groups"),
        ({"tiers": {"all": "box", "b": "box"}}, "'b'"),
        ({"tiers": {str(i): "box" for i in range(17)}}, "17 groups"),
        ({"tiers": {"": "box"}}, "short text"),
        ({"site": "embed"}, "names a site"),
        ({"kind": "site_error"}, "short text"),
    ],
)
def test_faulty_groups_and_sites_are_refused(
    one: Made, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    C.save(of_tier(one[0], "box"), tmp_path / "c", {})
    file = tmp_path / "c" / "certificate.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(C.Refused, match=reason):
        C.load(tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("index", 24, "codes hold a number"),
        ("region", -1, "regions hold a number"),
        ("answers", 300, "answers hold a number"),
        ("strength", -0.5, "must not be negative"),
        ("decoder", math.inf, "finite"),
    ],
)
def test_hints_out_of_range_are_refused(one: Made, name: str, value: float, reason: str) -> None:
    case = one[0]
    tensor = case.coder[name].clone()
    tensor.view(-1)[3] = value
    with pytest.raises(C.Refused, match=reason):
        bounds(case, {"all": "box"}, {**case.coder, name: tensor})


def test_groups_that_do_not_fit_are_refused(one: Made) -> None:
    case = one[0]
    group = torch.zeros_like(case.data["tokens"])
    for tiers, coder in (
        ({"a": "box", "b": "regions"}, case.coder),
        ({"all": "box"}, {**case.coder, "group": group}),
        ({"a": "box", "b": "regions"}, {**case.coder, "group": group + 2}),
    ):
        with pytest.raises(C.Refused, match="group"):
            bounds(case, tiers, coder)
    with pytest.raises(C.Refused, match="int64"):
        bounds(case, {"all": "box"}, {**case.coder, "region": case.coder["region"].double()})
    with pytest.raises(C.Refused, match="one group of inputs"):
        checker.bounds("max_of_k", {"a": "box"}, {}, {}, {})


def test_what_takes_too_much_is_refused(one: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, reason in (("MOST_FLOPS", "flops, more"), ("MOST_NUMBERS", "numbers")):
        with monkeypatch.context() as patch:
            patch.setattr(parts, name, 6000)
            with pytest.raises(C.Refused, match=reason):
                bounds(one[0], {"all": "distinct"}, one[0].coder)


# Lies


def test_corruptions_are_refused_or_sound(one: Made, mixed: Proved) -> None:
    """Half keep the old hashes, half come with new ones."""
    case = one[0]
    proofs = [mixed.certificate, of_tier(case, "regions"), of_tier(case, "codes")]
    outcomes = {"refused": 0, "accepted": 0}
    for seed in range(300):
        proof = proofs[seed % 3]
        given = {"coder": proof.coder, "data": case.data, "weights": case.weights}
        part = ("coder", "coder", "weights", "data")[seed // 3 % 4]
        given[part] = corrupted(given[part], seed)
        hashes = {name: C.fingerprint(tensors) for name, tensors in given.items()}
        lie = replace(
            proof,
            coder=given["coder"],
            hashes=hashes if seed % 2 else proof.hashes,
            bound=proof.bound * (1.0, 1.02, 0.9)[seed // 12 % 3],
        )
        verdict = checker.check(lie, given["weights"], given["data"])
        outcomes["accepted" if verdict.accepted else "refused"] += 1
        if verdict.accepted:
            now = replace(case, weights=given["weights"], data=given["data"])
            assert true_loss(now) <= lie.bound
        else:
            assert verdict.reason
    assert outcomes["refused"] > 150
    assert outcomes["accepted"] > 20


def test_a_lie_about_groups_is_refused_or_sound(one: Made, mixed: Proved) -> None:
    """Cheaper tiers and shuffled groups under the old ledger and bound."""
    case, proof = one[0], mixed.certificate
    names = sorted(proof.tiers)
    swapped = dict(zip(names, [proof.tiers[name] for name in reversed(names)], strict=True))
    assert not check(case, replace(proof, tiers=swapped)).accepted
    assert not check(case, replace(proof, tiers=dict.fromkeys(names, "box"))).accepted
    for seed in range(5):
        order = torch.randperm(240, generator=torch.Generator().manual_seed(seed))
        group = proof.coder["group"].flatten()[order].reshape(proof.coder["group"].shape)
        coder = {**proof.coder, "group": group}
        hashes = {**proof.hashes, "coder": C.fingerprint(coder)}
        verdict = check(case, replace(proof, coder=coder, hashes=hashes))
        assert not verdict.accepted or true_loss(case) <= proof.bound


# Ledger


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("tier", family.SMALL_LM.tiers)
def test_the_ledger_is_what_torch_counts(one: Made, tier: str, layers: int) -> None:
    case = one[0]
    if layers == 2:
        config = replace(TINY, layers=2, steps=1, coder=replace(TINY.coder, steps=1))
        case = made(config, trained=False)[0]
    found = counted(lambda: bounds(case, {"all": tier}, case.coder))
    assert found == bounds(case, {"all": tier}, case.coder).cost.matmul


def test_a_mixtures_ledger_is_what_torch_counts(one: Made, mixed: Proved) -> None:
    proof = mixed.certificate
    found = counted(lambda: bounds(one[0], proof.tiers, proof.coder))
    assert found == proof.ledger.matmul


def test_brute_force_is_what_torch_counts(one: Made) -> None:
    case = one[0]
    found = counted(lambda: small_lm.forward(case.weights, case.data["tokens"]))
    assert found == case.brute.matmul == ledger_lm.brute_force(TINY.sizes).matmul


def test_bits_are_those_of_what_the_tiers_look_at(one: Made) -> None:
    case, size = one[0], small_lm_proof.asked_for(one[0], one[0].coder, {"all": "box"}).size
    assert ledger_lm.bits(size, frozenset({"box"}), 1) == 0
    codes = 3 * 25 * 16 * 64 + size["C"] * 4 * (5 + 64) + 240 * math.ceil(math.log2(size["C"]))
    assert ledger_lm.bits(size, frozenset({"codes"}), 1) == codes
    hints = size["C"] * 12 * 9 + 16 * 3 * 64
    assert bounds(case, {"all": "regions"}, case.coder).cost.bits == codes + hints
    assert ledger_lm.bits(size, frozenset({"box", "codes"}), 2) == codes + 240


# The command


FLAGS = ["small-lm", "--vocabulary", "300", "--length", "6", "--width", "16", "--heads", "2"]
FLAGS += ["--neurons", "24", "--sequences", "40", "--steps", "40", "--batch", "16"]
FLAGS += ["--coder.features", "24", "--coder.active", "4", "--coder.steps", "20"]
FLAGS += ["--coder.rows", "128"]


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_lm, "MOST_CHARACTERS", 150_000)


@pytest.mark.usefixtures("little_text")
def test_the_command_prints_proves_and_keeps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "proof"
    assert main(["prove", *FLAGS, "--budget", "0.7", "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    fields = {"claim", "bound", "truth", "flops", "flops_brute", "bits", "tiers", "checked"}
    assert found.keys() >= fields | {"baseline", "frontier", "layers"}
    assert found["checked"] is True
    assert found["truth"] <= found["bound"]
    assert found["flops"] <= 0.7 * found["flops_brute"]
    names = [tier["name"] for tier in found["tiers"]]
    assert names == ["brute force", *family.SMALL_LM.tiers, "mixture"]
    assert all(point.keys() >= {"budget", "bound", "baseline"} for point in found["frontier"])
    assert [layer["site"] for layer in found["layers"]] == ["resid_mid.0", "resid_post.0"]
    assert main(["prove", "check", str(out)]) == 0
    assert "accepted: loss ≤ " in capsys.readouterr().out


@pytest.mark.usefixtures("little_text")
def test_the_command_speaks_to_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", *FLAGS, "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "mean error at" in text
    assert "budget" in text


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tier", "region"], "regions"),
        (["--claim", "site_error"], "goes with a --site"),
        (["--claim", "site_error", "--site", "logits"], "one of embed"),
        (["--claim", "accuracy", "--tier", "mixture"], "spends its budget on loss"),
        (["--layers", "3"], "1 or 2 layers"),
        (["--vocabulary", "100"], "300 or more"),
        (["--budget", "-1"], "share of brute force"),
        (["--budget", "1e-6"], "below the base case"),
        (["--coder.active", "0"], "coder.active"),
    ],
)
def test_a_wrong_command_says_what_to_do(
    capsys: pytest.CaptureFixture[str], flags: list[str], reason: str
) -> None:
    assert main(["prove", "small-lm", *flags]) == 2
    assert reason in capsys.readouterr().err

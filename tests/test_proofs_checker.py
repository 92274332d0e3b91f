"""Certificates: what is accepted holds, and what is damaged is refused or still holds."""

from __future__ import annotations

import ast
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from crosslens.errors import UsageError
from crosslens.proofs import certificate as C
from crosslens.proofs import checker, ledger
from crosslens.proofs.families import parts
from crosslens.proofs.ladder import max_of_k, modular_addition
from crosslens.proofs.ladder.max_of_k import MaxOfK
from crosslens.proofs.ladder.modular_addition import ModularAddition
from crosslens.proofs.lemmas import max_of_k as max_lemma
from crosslens.proofs.lemmas import modular_addition as mod_lemma
from crosslens.proofs.tiers import Case, Proved, baseline, certify, run_tier

ROOM = Path(checker.__file__).parent
JUDGES = [ROOM / "checker.py", ROOM / "families" / "parts.py", ROOM / "certificate.py"]
"""What decides, for every kind of model."""
TRUSTED = [
    *sorted((ROOM / "lemmas").glob("*.py")),
    *sorted((ROOM / "families").glob("*.py")),
    *(
        ROOM / f"{name}.py"
        for name in ("rounding", "ledger", "ledger_lm", "ledger_local", "local_certificate")
    ),
    *JUDGES,
]


def silent(_: str) -> None:
    pass


SMALL_MAX = MaxOfK(vocabulary=7, length=3, width=12, head=12, steps=400, batch=128)
SMALL_MOD = ModularAddition(modulus=7, width=10, neurons=16, rank=6, steps=250)


@pytest.fixture(scope="module")
def largest() -> Case:
    return max_of_k.case(SMALL_MAX, max_of_k.train(SMALL_MAX, silent))


@pytest.fixture(scope="module")
def modular() -> Case:
    return modular_addition.case(SMALL_MOD, modular_addition.train(SMALL_MOD, silent))


def certified(case: Case, tier: str, kind: C.ClaimKind = "accuracy") -> Proved:
    return certify(case, kind, (run_tier(case, kind, tier),), tier, silent)


# The truth, over the reals as far as float64 goes: the model itself, sequence by sequence.


def sequences(case: Case) -> Tensor:
    V, K = case.data["domain"].tolist()
    return torch.tensor(list(itertools.product(range(V), repeat=K)))


def margins(case: Case) -> Tensor:
    """z_right − the largest other z, for every input."""
    weights = {name: tensor.double() for name, tensor in case.weights.items()}
    if case.family == "max_of_k":
        inputs = sequences(case)
        logits, label = max_of_k.forward(weights, inputs), inputs.amax(1)
    else:
        logits = modular_addition.forward(weights, case.data["points"])
        label = case.data["labels"]
    right = logits.gather(1, label[:, None])
    others = logits.scatter(1, label[:, None], -math.inf).amax(1, keepdim=True)
    return (right - others)[:, 0]


def true_accuracy(case: Case) -> float:
    """With everything that is too near to tell counted as right."""
    return float((margins(case) > -1e-12).double().mean())


def true_loss(case: Case) -> float:
    weights = {name: tensor.double() for name, tensor in case.weights.items()}
    logits = modular_addition.forward(weights, case.data["points"])
    return float(torch.nn.functional.cross_entropy(logits, case.data["labels"]))


# What a tier proves is true


@pytest.mark.parametrize("steps", [0, 60, 400])
@pytest.mark.parametrize("length", [2, 3, 4])
def test_every_tier_of_max_of_k_is_below_the_truth(steps: int, length: int) -> None:
    config = replace(SMALL_MAX, length=length, steps=max(steps, 1), seed=steps + length)
    weights = max_of_k.train(config, silent) if steps else max_of_k.initial(config)
    case = max_of_k.case(config, weights)
    true = margins(case)
    right = int((true > 1e-9).sum())
    table = max_lemma.tables(case.weights, case.coder["decoder"])
    assert float(table.base) == 0
    by_codes = max_lemma.certified_by_codes(table)
    by_pairs = max_lemma.certified_by_pairs(table)
    by_pessimum = max_lemma.certified_by_pessimum(table)
    assert right <= by_codes <= int((true > -1e-12).sum())
    assert max_lemma.certified_by_box(table) <= by_pessimum <= by_pairs <= by_codes
    assert case.truth["accuracy"] == pytest.approx(right / len(true))
    if steps == 400:
        assert by_pairs > 0.8 * right


def classes(case: Case) -> Iterator[tuple[int, ...]]:
    """For every class that the theorem speaks of, what the brute force over it counts."""
    inputs, right = sequences(case), margins(case) > 1e-9
    V, K = case.data["domain"].tolist()
    for m, at in itertools.product(range(V), itertools.product((False, True), repeat=K - 1)):
        for q in range(m + 1):
            if not any(at) and q != m:
                continue
            here = (inputs[:, -1] == q) & (inputs.amax(1) == m)
            for place, largest in enumerate(at):
                here &= (inputs[:, place] == m) == largest
            best = 0
            for r in range(m) if not all(at) else (m,):
                free = [j for j, is_m in enumerate(at) if not is_m]
                within = here & (inputs[:, free] <= r).all(1)
                if bool(within.any()) and bool(right[within].all()):
                    best = int(within.sum())
            yield (m, q, best)


def test_pairs_count_exactly_the_classes_that_are_right(largest: Case) -> None:
    """The pair tier takes each v's worst sequence: no class is lost but where the minima of
    different places cannot be had at once, and they can, places being free."""
    table = max_lemma.tables(largest.weights, largest.coder["decoder"])
    expected = sum(count for _, _, count in classes(largest))
    assert max_lemma.certified_by_pairs(table) == expected


@pytest.mark.parametrize("steps", [1, 40, 250])
@pytest.mark.parametrize("tier", modular_addition.TIERS)
def test_every_tier_of_addition_is_on_the_safe_side(steps: int, tier: str) -> None:
    config = replace(SMALL_MOD, steps=steps, seed=steps)
    case = modular_addition.case(config, modular_addition.train(config, silent))
    assert run_tier(case, "accuracy", tier).bound <= true_accuracy(case)
    assert run_tier(case, "loss", tier).bound >= true_loss(case)


def test_exact_codes_lose_nothing_on_addition(modular: Case) -> None:
    assert (
        run_tier(modular, "accuracy", "codes").bound
        >= float((margins(modular) > 1e-9).double().mean()) - 1e-12
    )
    loss = run_tier(modular, "loss", "codes").bound
    assert 0.99 * loss < true_loss(modular) <= loss


@pytest.mark.parametrize("hinted", [False, True])
def test_logits_are_within_the_error_everywhere(modular: Case, hinted: bool) -> None:
    """Point by point, answer by answer, in exact rationals."""
    hint = (modular.coder["left"], modular.coder["right"])
    table = mod_lemma.tables(modular.weights, modular.coder["decoder"])
    read = mod_lemma.factors(table, hint if hinted else None)
    points = modular.data["points"][::11]
    found: list[tuple[Tensor, Tensor]] = []
    # What `by_codes` passes on to be judged is what the lemma bounds.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mod_lemma, "margin_correct", lambda z, e, y: found.append((z, e)) or y > 0)
        given = mod_lemma.Points(points, modular.data["labels"][::11])
        mod_lemma.by_codes(table, read, given)
    logits, error = found[0]
    for n, point in enumerate(points.tolist()):
        for v, true in enumerate(rational_logits(modular.weights, point)):
            off = abs(true - Fraction(float(logits[n, v])))
            assert off <= Fraction(float(error[n, v]))


def rational_logits(weights: Mapping[str, Tensor], point: list[int]) -> list[Fraction]:
    def rows(name: str) -> list[list[Fraction]]:
        return [[Fraction(v) for v in row] for row in weights[name].double().tolist()]

    def times(x: list[Fraction], W: list[list[Fraction]]) -> list[Fraction]:
        return [sum(a * row[j] for a, row in zip(x, W, strict=True)) for j in range(len(W[0]))]

    embedding = weights["W_E"].double()
    x = [
        Fraction(float(p)) + Fraction(float(q))
        for p, q in zip(embedding[0, point[0]], embedding[1, point[1]], strict=True)
    ]
    bias = [Fraction(float(b)) for b in weights["b_in"]]
    pre = [a + b for a, b in zip(times(x, rows("W_in")), bias, strict=True)]
    hidden = [max(a, Fraction(0)) for a in pre]
    out = [a + b for a, b in zip(x, times(hidden, rows("W_out")), strict=True)]
    return times(out, rows("W_U"))


def test_a_wrong_coder_only_loosens(largest: Case, modular: Case) -> None:
    for case, tier in ((largest, "pairs"), (modular, "codes")):
        bounds = []
        for size in (0.0, 1e-3, 3e-2, 10.0):
            generator = torch.Generator().manual_seed(1)
            decoder = case.coder["decoder"]
            noise = torch.randn(decoder.shape, generator=generator, dtype=torch.float64)
            off = replace(case, coder={"decoder": decoder + size * noise})
            bounds.append(run_tier(off, "accuracy", tier).bound)
        assert bounds[0] >= bounds[1] >= bounds[2] >= bounds[3]
        assert bounds[3] < bounds[0] <= true_accuracy(case)


def test_other_weights_have_another_bound(largest: Case, modular: Case) -> None:
    for case, tier, name in ((largest, "pairs", "W_V"), (modular, "codes", "W_out")):
        before = run_tier(case, "accuracy", tier).bound
        weights = {**case.weights, name: case.weights[name] * 0.05}
        after = replace(case, weights=weights)
        assert run_tier(after, "accuracy", tier).bound <= true_accuracy(after)
        assert run_tier(after, "accuracy", tier).bound != before
    changed = replace(modular, weights={**modular.weights, "W_U": modular.weights["W_U"] * 1.001})
    assert run_tier(changed, "loss", "codes").bound != run_tier(modular, "loss", "codes").bound


def test_the_baseline_is_a_line_from_knowing_nothing_to_running_everything(
    modular: Case,
) -> None:
    box = run_tier(modular, "loss", "box")
    half = modular.brute.flops // 2
    truth = modular.truth["loss"]
    assert baseline(modular, "accuracy", (), half) == pytest.approx(
        modular.truth["accuracy"] / 2, rel=1e-3
    )
    assert baseline(modular, "loss", (box,), half) == pytest.approx(
        (truth + box.bound) / 2, rel=1e-3
    )
    assert baseline(modular, "loss", (box,), 10 * half) == truth


# Certificates


def test_a_certificate_is_written_read_and_accepted(
    largest: Case, modular: Case, tmp_path: Path
) -> None:
    for case, tier in ((largest, "pairs"), (modular, "factors")):
        proved = certified(case, tier)
        assert proved.verdict.accepted, proved.verdict.reason
        folder = tmp_path / case.family
        C.save(proved.certificate, folder, {"weights": case.weights, "data": case.data})
        C.save(proved.certificate, folder, {"weights": case.weights, "data": case.data})
        read = C.load(folder)
        weights = C.read_tensors(folder / "weights.safetensors")
        verdict = checker.check(read, weights, C.read_tensors(folder / "data.safetensors"))
        assert verdict.accepted
        assert replace(read, coder={}) == replace(proved.certificate, coder={})
        assert not list(tmp_path.glob(".*"))


def test_a_folder_with_something_else_is_not_replaced(modular: Case, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="no certificate"):
        C.save(certified(modular, "codes").certificate, tmp_path / "mine", {})


@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_a_claim_a_hair_better_than_what_holds_is_refused(modular: Case, kind: C.ClaimKind) -> None:
    proved = certified(modular, "codes", kind)
    bound = run_tier(modular, kind, "codes").bound
    better = math.nextafter(bound, math.inf if kind == "accuracy" else -math.inf)
    verdict = checker.check(
        replace(proved.certificate, bound=better), modular.weights, modular.data
    )
    assert not verdict.accepted
    assert "is claimed" in verdict.reason
    worse = replace(proved.certificate, bound=bound * (0.5 if kind == "accuracy" else 2.0))
    assert checker.check(worse, modular.weights, modular.data).accepted


def test_what_belongs_to_another_proof_is_refused(largest: Case, modular: Case) -> None:
    proved = certified(modular, "factors").certificate
    cheaper = replace(proved.ledger, matmul=proved.ledger.matmul // 2)
    other = {**modular.weights, "b_in": modular.weights["b_in"] + 1}
    fewer = {name: tensor[1:] for name, tensor in modular.data.items()}
    wrong = [
        (proved, other, modular.data, "weights are not those"),
        (proved, modular.weights, fewer, "data are not those"),
        (replace(proved, ledger=cheaper), modular.weights, modular.data, "ledger says"),
        (replace(proved, family="gpt"), modular.weights, modular.data, "family 'gpt'"),
        (replace(proved, tiers={"all": "magic"}), modular.weights, modular.data, "no tier 'magic'"),
        (replace(proved, tiers={"all": "codes"}), modular.weights, modular.data, "without factors"),
        (
            replace(proved, family="max_of_k", tiers={"all": "box"}),
            modular.weights,
            modular.data,
            "needed are",
        ),
    ]
    for certificate, weights, data, reason in wrong:
        verdict = checker.check(certificate, weights, data)
        assert not verdict.accepted
        assert reason in verdict.reason


def test_what_takes_too_much_is_refused(
    largest: Case, modular: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, reason in (("MOST_FLOPS", "flops, more"), ("MOST_NUMBERS", "numbers")):
        with monkeypatch.context() as patch:
            patch.setattr(parts, name, 1000)
            for case in (largest, modular):
                with pytest.raises(C.Refused, match=reason):
                    run_tier(case, "accuracy", "codes")


JSON_FAULTS = {
    "newer": (lambda f: f.update(version=3), "newer version"),
    "no version": (lambda f: f.pop("version"), "version"),
    "truth for version": (lambda f: f.update(version=True), "version"),
    "other format": (lambda f: f.update(format="x"), "no certificate"),
    "unknown claim": (lambda f: f.update(kind="luck"), "luck"),
    "text for bound": (lambda f: f.update(bound="0.5"), "finite"),
    "infinite bound": (lambda f: f.update(bound=1e999), "finite"),
    "no bound": (lambda f: f.pop("bound"), "'bound'"),
    "one field more": (lambda f: f.update(more=1), "'more'"),
    "short hash": (lambda f: f["hashes"].update(data="ab"), "SHA-256"),
    "hashes gone": (lambda f: f.update(hashes=[]), "JSON object"),
    "negative cost": (lambda f: f["ledger"].update(bits=-1), "bits"),
    "fractional cost": (lambda f: f["ledger"].update(bits=1.5), "bits"),
    "long family": (lambda f: f.update(family="x" * 1000), "short text"),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_a_faulty_certificate_says_what_is_wrong(modular: Case, tmp_path: Path, fault: str) -> None:
    C.save(certified(modular, "codes").certificate, tmp_path / "c", {})
    file = tmp_path / "c" / "certificate.json"
    found = json.loads(file.read_text())
    change, reason = JSON_FAULTS[fault]
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(C.Refused, match=reason):
        C.load(tmp_path / "c")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff", '{"a": NaN}'])
def test_what_is_no_certificate_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "certificate.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(C.Refused):
        C.load(tmp_path)


def test_a_certificate_that_is_not_whole_or_too_large_is_refused(
    modular: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(C.Refused, match="does not exist"):
        C.load(tmp_path / "nowhere")
    C.save(certified(modular, "codes").certificate, tmp_path / "c", {})
    (tmp_path / "c" / "coder.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(C.Refused, match="damaged"):
        C.load(tmp_path / "c")
    monkeypatch.setattr(C, "LARGEST_JSON", 10)
    with pytest.raises(C.Refused, match="bytes"):
        C.load(tmp_path / "c")


# A thousand corruptions


def corrupted(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """One tensor changed: a number, a bit, a row, a shape, a type, a name."""
    generator = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    names = sorted(tensors)
    name = names[pick(len(names))]
    tensor = tensors[name].clone()
    flat = tensor.reshape(-1)
    at = pick(len(flat))
    match pick(9):
        case 0:
            flat[at] = torch.randn((), generator=generator).mul(3).to(flat.dtype)
        case 1:
            raw = flat.view(torch.uint8)
            raw[pick(len(raw))] ^= 1 << pick(8)
        case 2:
            tensor = -tensor
        case 3:
            tensor[pick(len(tensor))] = tensor[pick(len(tensor))].clone()
        case 4:
            tensor = tensor[1:]
        case 5:
            tensor = tensor.int() if tensor.is_floating_point() else tensor.double()
        case 6:
            return {key: value for key, value in tensors.items() if key != name}
        case 7:
            tensor = tensor.flip(0)
        case _:
            tensor = tensor * 1e30 if tensor.is_floating_point() else tensor + 1
    return {**tensors, name: tensor}


@pytest.mark.parametrize("family", ["max_of_k", "modular_addition"])
def test_a_thousand_corruptions_are_refused_or_sound(
    family: str, largest: Case, modular: Case
) -> None:
    """Half keep the old hashes, half come with new ones: a liar can hash too."""
    case, tiers = (
        (largest, ("pairs", "pessimum", "codes"))
        if family == "max_of_k"
        else (modular, ("factors", "codes", "pairs"))
    )
    proofs = [certified(case, tier).certificate for tier in tiers]
    outcomes = {"refused": 0, "accepted": 0}
    for seed in range(520):
        proof = proofs[seed % 3]
        given = {"coder": proof.coder, "data": case.data, "weights": case.weights}
        part = ("coder", "weights", "data")[seed // 3 % 3]
        given[part] = corrupted(given[part], seed)
        hashes = {name: C.fingerprint(tensors) for name, tensors in given.items()}
        lie = replace(
            proof,
            coder=given["coder"],
            hashes=hashes if seed % 2 else proof.hashes,
            bound=proof.bound * (1.0, 0.999, 0.5)[seed // 9 % 3],
        )
        verdict = checker.check(lie, given["weights"], given["data"])
        outcomes["accepted" if verdict.accepted else "refused"] += 1
        if verdict.accepted:
            now = replace(case, weights=given["weights"], data=given["data"])
            assert lie.bound <= true_accuracy(now)
        else:
            assert verdict.reason
    assert outcomes["refused"] > 260
    assert outcomes["accepted"] > 20


def test_corrupted_files_are_refused_or_the_same(modular: Case, tmp_path: Path) -> None:
    proved = certified(modular, "codes").certificate
    C.save(proved, tmp_path / "c", {"weights": modular.weights, "data": modular.data})
    for seed in range(200):
        torch.manual_seed(seed)
        name = ("certificate.json", "coder.safetensors")[seed % 2]
        file = tmp_path / "c" / name
        whole = file.read_bytes()
        bad = bytearray(whole)
        at = int(torch.randint(len(bad), ()))
        if seed % 5 == 0:
            bad = bad[:at]
        else:
            bad[at] ^= 1 << int(torch.randint(8, ()))
        file.write_bytes(bytes(bad))
        try:
            read = C.load(tmp_path / "c")
        except C.Refused:
            continue
        finally:
            file.write_bytes(whole)
        verdict = checker.check(read, modular.weights, modular.data)
        assert not verdict.accepted or read.bound <= true_accuracy(modular)


# What is trusted is small, and the ledger is right


def test_the_checker_is_small_and_imports_no_search() -> None:
    """500 lines decide; each kind of model adds at most 300 that say which lemmas apply."""
    assert sum(len(file.read_text().splitlines()) for file in JUDGES) <= 500
    for file in TRUSTED:
        assert len(file.read_text().splitlines()) <= 350
    own = ("errors", "storage", *(f"proofs.{file.stem}" for file in TRUSTED))
    own += ("proofs.lemmas", "proofs.families")
    allowed = tuple(f"crosslens.{name}" for name in own)
    outside = {"torch", "jaxtyping", "safetensors", *sys.stdlib_module_names}
    for file in TRUSTED:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [f"{node.module}.{a.name}" for a in node.names]
            for name in names:
                assert name.startswith(allowed) or name.split(".")[0] in outside, (
                    f"{file.name} imports {name}"
                )


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("tier", max_of_k.TIERS)
def test_the_ledger_of_max_of_k_is_what_torch_counts(largest: Case, tier: str) -> None:
    found = counted(lambda: run_tier(largest, "accuracy", tier))
    assert found == ledger.max_of_k(tier, SMALL_MAX.sizes).matmul


@pytest.mark.parametrize("tier", modular_addition.TIERS)
def test_the_ledger_of_addition_is_what_torch_counts(modular: Case, tier: str) -> None:
    found = counted(lambda: run_tier(modular, "accuracy", tier))
    rank = SMALL_MOD.rank if tier == "factors" else 0
    assert found == ledger.modular_addition(tier, {**SMALL_MOD.sizes, "R": rank}).matmul


def test_brute_force_is_what_torch_counts(largest: Case, modular: Case) -> None:
    inputs = sequences(largest)
    found = counted(lambda: max_of_k.forward(largest.weights, inputs))
    assert found == largest.brute.matmul
    points = modular.data["points"]
    assert (
        counted(lambda: modular_addition.forward(modular.weights, points)) == modular.brute.matmul
    )

"""Layer-local bounds: never below the loops, tight where they can be, and never fooled."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from crosslens.proofs.lemmas import local_mlp as lemma
from crosslens.proofs.lemmas import local_parts as parts
from crosslens.proofs.local_certificate import QUANTITY, errors, prepare
from crosslens.proofs.local_truth import Truth
from crosslens.proofs.rounding import exact
from tests.proofs_local_toy import SHAPES, SURROGATES, Sizes, Tensors, loops, toy


def bounds(tier: str, weights: Tensors, coder: Tensors, x: torch.Tensor) -> torch.Tensor:
    codes = parts.Codes(coder["index"], coder["strength"])
    return errors((tier,), prepare(weights, coder, {tier}), codes, x)[tier]


def truth_of(tier: str) -> str:
    return tier.split("/")[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_no_bound_is_below_the_loops(shape: tuple[str, bool, str], seed: int) -> None:
    weights, coder, x = toy(*shape, seed=seed)
    told = [loops(weights, coder, x, row) for row in range(len(x))]
    for tier in QUANTITY:
        true = torch.tensor([each[truth_of(tier)] for each in told], dtype=torch.float64)
        found = bounds(tier, weights, coder, x)
        assert (found >= true * (1 - 1e-12)).all(), tier
        if tier.endswith("exact"):
            assert (found <= true * (1 + 1e-9) + 1e-9).all(), tier


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_truth_equals_the_loops(shape: tuple[str, bool, str]) -> None:
    weights, coder, x = toy(*shape, seed=5)
    truth = Truth(weights, coder)
    decoded = truth.decoded()
    at_decoded, at_x = truth.output(decoded), truth.output(x)
    surrogates = truth.surrogates()
    for row in range(len(x)):
        told = loops(weights, coder, x, row)
        assert float((x - decoded)[row].norm()) == pytest.approx(told["coder"])
        assert float((at_x - at_decoded)[row].norm()) == pytest.approx(told["transition"])
        for name in SURROGATES:
            missed = float((at_decoded - surrogates[name])[row].norm())
            assert missed == pytest.approx(told[name], abs=1e-9)
            whole = float((at_x - surrogates[name])[row].norm())
            assert whole == pytest.approx(told[f"whole {name}"], abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_way_is_never_worse_than_its_shortcut(shape: tuple[str, bool, str]) -> None:
    weights, coder, x = toy(*shape, seed=7)
    for surrogate in ("additive", "given bias", "linear"):
        exactly = bounds(f"{surrogate}/exact", weights, coder, x)
        assert (exactly <= bounds(f"{surrogate}/neurons", weights, coder, x) * (1 + 1e-9)).all()
    by_neuron = bounds("additive/neurons", weights, coder, x)
    assert (by_neuron <= bounds("additive/sizes", weights, coder, x) * (1 + 1e-9)).all()
    dominant = bounds("dominance/exact", weights, coder, x)
    assert (dominant <= bounds("dominance/sizes", weights, coder, x) * (1 + 1e-9)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_no_search_over_codes_gets_above_a_bound(shape: tuple[str, bool, str]) -> None:
    """Hill climbing on true / bound, one row, over strengths."""
    weights, coder, x = toy(*shape, seed=11, sizes=Sizes(rows=24))
    generator = torch.Generator().manual_seed(0)
    for tier in ("additive/neurons", "additive/sizes", "additive/pairs", "dominance/sizes"):
        strength = coder["strength"].clone()
        best = torch.zeros(len(x), dtype=torch.float64)
        for step in range(12):
            factor = (torch.randn(strength.shape, generator=generator) * 0.8**step).exp().double()
            tried = {**coder, "strength": strength * factor}
            truth = Truth(weights, tried)
            missed = truth.output(truth.decoded()) - truth.surrogates()[truth_of(tier)]
            ratio = missed.norm(dim=1) / bounds(tier, weights, tried, x).clamp_min(1e-300)
            better = ratio > best
            best = torch.where(better, ratio, best)
            strength = torch.where(better[:, None], tried["strength"], strength)
        assert 0.01 < float(best.max()) <= 1 + 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-3, 0.3, 4.0])
def test_no_search_moves_the_mlp_further(shape: tuple[str, bool, str], eps: float) -> None:
    """Ascent over x on the sphere around x̂ that the bound is told of."""
    weights, coder, _ = toy(*shape, seed=3, sizes=Sizes(rows=16))
    truth = Truth(weights, coder)
    decoded = truth.decoded()
    start = truth.output(decoded)
    way = torch.randn(decoded.shape, generator=torch.Generator().manual_seed(1)).double()
    most = torch.zeros(len(way), dtype=torch.float64)
    for step in range(30):
        way = (way / way.norm(dim=1, keepdim=True)).requires_grad_(True)
        moved = (truth.output(decoded + eps * way) - start).norm(dim=1)
        (slope,) = torch.autograd.grad(moved.sum(), way)
        most = torch.maximum(most, moved.detach())
        way = way.detach() + 0.8**step * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-300)
    x = decoded + eps * way / way.norm(dim=1, keepdim=True)
    found = bounds("transition/ball", weights, coder, x)
    assert (found * (1 + 1e-9) >= most).all()
    assert float(most.max()) > 0


def single(
    kind: str, gate: list[float], value: list[float] | None = None
) -> tuple[Tensors, Tensors]:
    """One neuron with the given contributions (the last is the bias's), one output, no norm."""
    n = len(gate) - 1
    columns = [gate] if value is None else [gate, value]
    rows = torch.tensor(columns, dtype=torch.float64).T
    width = rows.shape[1]
    weights, coder, _ = toy(kind, value is not None, "none", sizes=Sizes(1, n, n, width, 1))
    unit = torch.eye(width, dtype=torch.float64)
    weights |= {"gate": unit[:, :1].contiguous(), "b_gate": torch.zeros(1).double()}
    if value is not None:
        weights |= {"value": unit[:, 1:].contiguous(), "b_value": torch.zeros(1).double()}
    weights["out"] = torch.tensor([[3.0, 4.0, 0.0][:width]], dtype=torch.float64)
    coder |= {"decoder": rows[:-1].contiguous(), "bias": rows[-1].contiguous()}
    coder |= {"index": torch.arange(n)[None], "strength": torch.ones(1, n).double()}
    return weights, coder


TIGHT = [
    ("additive/exact", "relu", [3.0, -1.0], None, 1.0),
    ("additive/neurons", "relu", [3.0, -1.0], None, 1.0),
    ("additive/sizes", "relu", [3.0, -1.0], None, 1.0),
    ("additive/pairs", "relu", [1.0, -1.0], None, 1.0),
    ("dominance/sizes", "relu", [2.0, 1.0], None, 1.0),
    ("dominance/exact", "relu", [2.0, 1.0], None, 1.0),
    ("additive/neurons", "relu", [0.0, 3.0], [1.0, 0.0], 3.0),
    ("additive/sizes", "relu", [0.0, 3.0], [1.0, 0.0], 3.0),
    ("additive/pairs", "relu", [0.0, 3.0], [1.0, 0.0], 3.0),
    ("given bias/exact", "relu", [2.0, -3.0, -1.0], None, 1.0),
    ("given bias/neurons", "relu", [2.0, -3.0, -1.0], None, 1.0),
]
"""Tier, φ, gates and values of the contributions, |e| of the neuron."""


@pytest.mark.parametrize(("tier", "kind", "gate", "value", "error"), TIGHT)
def test_bounds_are_tight(
    tier: str, kind: str, gate: list[float], value: list[float] | None, error: float
) -> None:
    weights, coder = single(kind, gate, value)
    true = loops(weights, coder, torch.zeros(1, len(coder["bias"])).double(), 0)[truth_of(tier)]
    assert true == pytest.approx(error * float(weights["out"].norm()))
    found = float(bounds(tier, weights, coder, torch.zeros(1, len(coder["bias"])).double()))
    assert 0.99 * found < true <= found * (1 + 1e-12)


def test_the_linear_surrogate_the_transition_and_the_cap_are_tight() -> None:
    weights, coder = single("relu", [3.0, 2.0])
    coder["affine"] = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    x = torch.tensor([[7.0]], dtype=torch.float64)
    for tier, true in (
        ("linear/exact", 3.0),  # relu(5) = 5 against 1 + 5, written by 3
        ("linear/neurons", 3.0),
        ("transition/ball", 6.0),  # from 5 to 7
        ("coder/exact", 2.0),
    ):
        found = float(bounds(tier, weights, coder, x))
        assert 0.99 * found < true <= found
    # With a norm and one coordinate, n(x) is the gain's size whatever x.
    weights |= {"form": torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)}
    weights |= {"gain": torch.tensor([2.0], dtype=torch.float64)}
    found = float(bounds("nothing/cap", weights, coder, x))
    assert 0.99 * found < 6.0 <= found


@pytest.mark.parametrize("seed", range(4))
def test_neurons_errors_hold_in_rationals(seed: int) -> None:
    """Without a norm and with ReLU all is rational: the ball around e must hold the real one."""
    weights, coder, _ = toy("relu", False, "none", seed=seed, sizes=Sizes(3, 4, 6, 5, 7))
    block = prepare(weights, coder, set()).block
    rows = torch.cat([coder["decoder"], coder["bias"][None]])
    into = parts.branch(block, block.gate_DN, block.b_gate_N, rows)
    codes = parts.Codes(coder["index"], coder["strength"])
    own = parts.Inputs(parts.contributions(into, codes, exact(torch.ones(3).double())), None)
    found = lemma.missed("relu", lemma.summed(own), own, "additive", coder["affine"])
    for row in range(3):
        for n in range(7):
            column = [Fraction(v) for v in weights["gate"][:, n].tolist()]

            def brought(values: list[float], column: list[Fraction] = column) -> Fraction:
                return sum(
                    (Fraction(v) * w for v, w in zip(values, column, strict=True)), Fraction(0)
                )

            y = [
                Fraction(float(a)) * brought(coder["decoder"][int(i)].tolist())
                for i, a in zip(coder["index"][row], coder["strength"][row], strict=True)
            ]
            y.append(brought(coder["bias"].tolist()) + Fraction(float(weights["b_gate"][n])))
            positive = sum((each for each in y if each > 0), Fraction(0))
            negative = sum((-each for each in y if each < 0), Fraction(0))
            error = -min(positive, negative)  # I1: the whole less the sum of the parts
            mid, rad = Fraction(float(found.mid[row, n])), Fraction(float(found.rad[row, n]))
            assert abs(error - mid) <= rad
            assert float(rad) <= 1e-12 * (1 + float(positive + negative))


@pytest.mark.parametrize("shape", SHAPES[:6])
@pytest.mark.parametrize("seed", range(8))
def test_a_spoilt_coder_loosens_and_stays_sound(shape: tuple[str, bool, str], seed: int) -> None:
    """Whatever the codes, decoder and surrogate: ‖f(x) − surrogate‖ ≤ transition + interaction."""
    weights, coder, x = toy(*shape, seed=1)
    generator = torch.Generator().manual_seed(seed)
    spoilt = dict(coder)
    name = ("decoder", "strength", "bias", "affine")[seed % 4]
    noise = torch.randn(coder[name].shape, generator=generator).double()
    spoilt[name] = coder[name] + 3 * noise
    spoilt["strength"] = spoilt["strength"].abs()
    if seed >= 4:
        spoilt["index"] = coder["index"].flip(0).roll(seed, 1)
        spoilt["index"][:, 1] = spoilt["index"][:, 0]  # the same latent twice
    told = [loops(weights, spoilt, x, row) for row in range(len(x))]
    moved = bounds("transition/ball", weights, spoilt, x)
    for tier in QUANTITY:
        true = torch.tensor([each[truth_of(tier)] for each in told], dtype=torch.float64)
        found = bounds(tier, weights, spoilt, x)
        assert (found >= true * (1 - 1e-12)).all(), tier
        if QUANTITY[tier] == "interaction":
            whole = [each[f"whole {truth_of(tier)}"] for each in told]
            assert (found + moved >= torch.tensor(whole).double() * (1 - 1e-12)).all()
    drift = bounds("coder/exact", weights, spoilt, x).mean()
    if name in ("decoder", "strength", "bias"):
        assert drift > bounds("coder/exact", weights, coder, x).mean() * 0.5


def test_other_weights_have_another_bound() -> None:
    weights, coder, x = toy("silu", True, "rms", seed=2)
    for tier in QUANTITY:
        before = bounds(tier, weights, coder, x)
        for name in ("gate", "value", "out"):
            other = {**weights, name: weights[name] * 1.01}
            if tier != "coder/exact":
                assert not torch.equal(bounds(tier, other, coder, x), before)


def test_rows_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, coder, x = toy("gelu", True, "rms", seed=9)
    whole = {tier: bounds(tier, weights, coder, x) for tier in QUANTITY}
    monkeypatch.setattr("crosslens.proofs.local_certificate.AT_ONCE", 1)
    for tier, found in whole.items():
        torch.testing.assert_close(bounds(tier, weights, coder, x), found, rtol=1e-9, atol=0)

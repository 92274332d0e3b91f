"""The two theorems with wide radii: tables hold the truth, and counts survive the worst corner."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from crosslens.proofs.ladder import max_of_k, modular_addition
from crosslens.proofs.lemmas import max_of_k as max_lemma
from crosslens.proofs.lemmas import modular_addition as mod_lemma
from crosslens.proofs.rounding import Ball

MAX = max_of_k.MaxOfK(vocabulary=5, length=3, width=6, head=4, steps=1)
MOD = modular_addition.ModularAddition(modulus=5, width=6, neurons=9, steps=1)


def held(ball: Ball, true: Tensor) -> None:
    assert ((ball.mid - true).abs() <= ball.rad).all()


def noisy(decoder: Tensor, size: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return decoder + size * torch.randn(decoder.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [0.0, 1e-6, 0.1, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_tables_of_a_wrong_coder_hold_the_models_own(size: float, seed: int) -> None:
    w = {name: tensor.double() for name, tensor in max_of_k.initial(MAX).items()}
    x = w["W_P"][:, None] + w["W_E"]
    found = max_lemma.tables(w, noisy(x, size, seed))
    held(found.score_QKT, torch.einsum("qh,kth->qkt", x[-1] @ w["W_Q"], x @ w["W_K"]))
    held(found.direct_QV, x[-1] @ w["W_U"])
    held(found.written_KTV, x @ w["W_V"] @ w["W_O"] @ w["W_U"])
    v = {name: tensor.double() for name, tensor in modular_addition.initial(MOD).items()}
    table = mod_lemma.tables(v, noisy(v["W_E"], size, seed))
    held(table.pre_2TN, v["W_E"] @ v["W_in"])
    held(table.direct_2TV, v["W_E"] @ v["W_U"])
    held(table.read_NV, v["W_out"] @ v["W_U"])


def test_radii_are_attained() -> None:
    """A coder that is off along the one direction that is read is off by the whole radius."""
    one = torch.ones(2, 1, dtype=torch.float64)
    unit = torch.ones(1, 1, dtype=torch.float64)
    w = {"W_E": one, "W_P": 0 * one, "W_Q": unit, "W_K": unit, "W_V": unit, "W_O": unit}
    found = max_lemma.tables(w | {"W_U": one.T}, torch.full((2, 2, 1), 0.5, dtype=torch.float64))
    for ball, true in ((found.score_QKT, 1.0), (found.direct_QV, 1.0), (found.written_KTV, 1.0)):
        off = float((ball.mid - true).abs().max())
        assert 0.99 * float(ball.rad.max()) < off <= float(ball.rad.max())


def realisation(tables: max_lemma.Tables, seed: int) -> list[Tensor]:
    """One set of reals within the balls: corners, with every fourth all but one sign alike."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for ball in (tables.score_QKT, tables.direct_QV, tables.written_KTV):
        sign = torch.randn(ball.mid.shape, generator=generator, dtype=torch.float64).sign()
        found.append(ball.mid + sign * ball.rad * (1 - 1e-12))
    return found


def right(sequence: tuple[int, ...], reals: list[Tensor]) -> bool:
    """The model's answer from its tables, by the plain formula."""
    score, direct, written = reals
    places = range(len(sequence))
    weight = torch.stack([score[sequence[-1], j, t] for j, t in enumerate(sequence)]).softmax(0)
    z = direct[sequence[-1]] + sum(weight[j] * written[j, sequence[j]] for j in places)
    m = max(sequence)
    return all(float(z[m]) > float(z[v]) for v in range(len(z)) if v != m)


def random_tables(seed: int, radius: float) -> max_lemma.Tables:
    """Tables of a model that mostly answers right, with radii up to `radius`."""
    generator = torch.Generator().manual_seed(seed)
    V, K = 4, 3

    def ball(*shape: int, middle: Tensor) -> Ball:
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
        rad = radius * torch.rand(*shape, generator=generator, dtype=torch.float64)
        return Ball(middle + 0.4 * noise, rad)

    tokens = torch.arange(V, dtype=torch.float64)
    return max_lemma.Tables(
        ball(V, K, V, middle=3 * tokens),
        ball(V, V, middle=torch.zeros(V, V, dtype=torch.float64)),
        ball(K, V, V, middle=4 * torch.eye(V, dtype=torch.float64)),
        torch.zeros(()),
    )


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_counts_hold_for_whatever_is_within_the_radii(seed: int, radius: float) -> None:
    tables = random_tables(seed, radius)
    sequences = list(itertools.product(range(4), repeat=3))
    survivors = set(sequences)
    for draw in range(25):
        reals = realisation(tables, draw)
        survivors = {sequence for sequence in survivors if right(sequence, reals)}
    for count in (
        max_lemma.certified_by_codes,
        max_lemma.certified_by_pairs,
        max_lemma.certified_by_pessimum,
        max_lemma.certified_by_box,
    ):
        assert count(tables) <= len(survivors)
    if radius <= 0.1:
        assert max_lemma.certified_by_pairs(tables) > 20


def test_a_radius_of_the_margin_is_what_it_takes() -> None:
    """Two tokens, two places: (1, 1) has margin 2. Radii that add up to 2 undo it, 0.99 do not."""
    zero = torch.zeros(2, 2, 2, dtype=torch.float64)
    own = torch.tensor([[-1.0, -1.0], [-1.0, 1.0]]).double()
    for share, expected in ((0.99, True), (1.0, False)):
        rad = torch.full((2, 2), share / 2, dtype=torch.float64)
        tables = max_lemma.Tables(
            Ball(zero, zero),
            Ball(own, rad),
            Ball(zero, torch.full((2, 2, 2), share / 2, dtype=torch.float64)),
            torch.zeros(()),
        )
        weight = max_lemma._weights(tables, 1, apart=True)
        assert bool((weight[1, :, 1, 0] > 0).all()) is expected


@pytest.mark.parametrize("low", [1.0, 2.0])
def test_a_losing_place_counts_with_its_largest_exponential(low: float) -> None:
    """Place 1 wins with weight 1, place 2 loses with weight up to e^r: right only for r < 0."""
    score = torch.zeros(2, 2, 2, dtype=torch.float64)
    rad = torch.zeros(2, 2, 2, dtype=torch.float64)
    rad[:, 1] = 0.5
    written = torch.zeros(2, 2, 2, dtype=torch.float64)
    written[0, :, 1], written[1, :, 0] = low, 1.5
    none = torch.zeros(2, 2, dtype=torch.float64)
    tables = max_lemma.Tables(
        Ball(score, rad), Ball(none, none), Ball(written, 0 * written), torch.zeros(())
    )
    # (1, 1) is right iff low > 1.5 e^(S_2), and S_2 may be 0.5: 1.5 e^0.5 = 2.47.
    assert max_lemma.certified_by_pairs(tables) == 0
    assert max_lemma.certified_by_codes(tables) == 0


def judged(tables: mod_lemma.Tables, points: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    """The logits and their error that a first-order tier judges points by."""
    found: list[tuple[Tensor, Tensor]] = []
    labels = torch.zeros(len(points), dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mod_lemma, "margin_correct", lambda z, e, y: found.append((z, e)) or y > 0)
        mod_lemma.by_features(tables, mod_lemma.Points(points, labels), pairs=pairs)
    return found[0]


def between(z: Tensor) -> Tensor:
    """z_v − z_w for all pairs of answers."""
    return z[:, :, None] - z[:, None, :]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_first_order_tiers_hold_between_any_two_answers(seed: int, pairs: bool) -> None:
    config = modular_addition.ModularAddition(modulus=5, width=6, neurons=9, steps=1, seed=seed)
    w = {name: tensor.double() for name, tensor in modular_addition.initial(config).items()}
    w["b_in"] = noisy(w["b_in"], 0.5, seed)
    points = modular_addition.domain(5)["points"]
    tables = mod_lemma.tables(w, noisy(w["W_E"], 0.01, seed))
    logits, error = judged(tables, points, pairs)
    off = (between(modular_addition.forward(w, points)) - between(logits)).abs()
    assert (off <= error[:, :, None] + error[:, None, :]).all()
    assert float(off.max()) > 0.1


@pytest.mark.parametrize("pairs", [False, True])
def test_first_order_tiers_are_tight(pairs: bool) -> None:
    """Two contributions 2 and −2 of one neuron that answer 0 reads: apart 2, together 0."""
    pre = torch.tensor([[[2.0]], [[-2.0]]]).double()
    zero = torch.zeros(2, 1, 2, dtype=torch.float64)
    read = torch.tensor([[1.0, 0.0]]).double()
    tables = mod_lemma.Tables(
        Ball(pre, 0 * pre),
        Ball(zero, zero),
        Ball(read, 0 * read),
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(()),
    )
    logits, error = judged(tables, torch.zeros(1, 2, dtype=torch.int64), pairs)
    assert float(logits[0, 0] - logits[0, 1]) == 2.0
    assert 2.0 <= float(error.sum()) < 2.0 / 0.99


@pytest.mark.parametrize("seed", range(4))
def test_the_box_holds_every_logit(seed: int) -> None:
    config = modular_addition.ModularAddition(modulus=5, width=6, neurons=9, steps=1, seed=seed)
    w = {name: tensor.double() for name, tensor in modular_addition.initial(config).items()}
    data, found = modular_addition.domain(5), []
    tables = mod_lemma.tables(w, noisy(w["W_E"], 0.01, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mod_lemma, "margin_correct", lambda z, e, y: found.append((z, e)) or y > 0)
        mod_lemma.by_box(tables, mod_lemma.Points(data["points"], data["labels"]))
    logits, error = found[0]
    assert ((modular_addition.forward(w, data["points"]) - logits).abs() <= error).all()

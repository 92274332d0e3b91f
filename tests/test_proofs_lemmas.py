"""Each lemma: no search inside its ball finds more, and 0.99 of it fails where it is attained."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from crosslens.errors import UsageError
from crosslens.functional.interactions import activation
from crosslens.proofs.lemmas import attention, boxes, interaction, logits, normalisation, residual
from crosslens.proofs.lemmas import neurons as N

CASES = range(6)


def rows(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def scalar(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def inside(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x moved into the ball ‖x‖ ≤ eps, a hair within so that rounding leaves it there."""
    return x * (eps / x.norm()).clamp_max(1) * (1 - 1e-14)


def most(value: Callable[[torch.Tensor], torch.Tensor], size: int, eps: float, seed: int) -> float:
    """The largest `value(e)` that ascent along the gradient finds within ‖e‖ ≤ eps."""
    best = 0.0
    for start in range(4):
        e = inside(rows(size, seed=seed * 10 + start, scale=10.0), eps)
        for step in range(25):
            e.requires_grad_(True)
            found = value(e)
            (slope,) = torch.autograd.grad(found, e)
            best = max(best, float(found.detach()))
            length = eps * 0.5 * 0.85**step / slope.norm().clamp_min(1e-300)
            e = inside((e + length * slope).detach(), eps)
    return best


@pytest.mark.parametrize("kind", N.KINDS)
def test_slopes_and_gaps_are_suprema(kind: N.Kind) -> None:
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64).requires_grad_(True)
    phi = activation(kind)(z)
    (slope,) = torch.autograd.grad(phi.sum(), z)
    assert 0.999 * N.SLOPE[kind] < float(slope.abs().max()) <= N.SLOPE[kind]
    gap = (torch.relu(z) - phi).detach()
    assert float(gap.max()) <= N.GAP[kind]
    assert float(gap.max()) >= 0.999 * N.GAP[kind]
    found = N.gap_up(kind, z.detach())
    assert (found >= gap - 1e-14).all()  # the difference itself errs
    assert (found <= gap * (1 + 1e-9) + 1e-9).all()
    far = gap[z.detach() > 1.3]
    assert (far.diff() <= 1e-12).all()  # what the proof for neurons that are off leans on


@pytest.mark.parametrize("kind", N.KINDS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_no_move_within_reach_is_larger(kind: N.Kind, scale: float) -> None:
    pre, reach = rows(400, seed=1, scale=4.0), rows(400, seed=2, scale=scale).abs()
    bound = N.neuron_moves(kind, pre, reach)
    phi = activation(kind)
    for share in torch.linspace(-1, 1, 401, dtype=torch.float64):
        # relu(z) − φ(z) by differences in float64 carries an error of its own, near 1e-15.
        assert ((phi(pre + share * reach) - phi(pre)).abs() <= bound + 1e-14).all()


def test_moves_are_tight() -> None:
    pre, reach = torch.tensor([-1.0, 2.0, -1.0]).double(), torch.tensor([3.0, 1.0, 0.5]).double()
    bound = N.neuron_moves("relu", pre, reach)
    true = torch.tensor([2.0, 1.0, 0.0]).double()
    assert (bound >= true).all()
    assert (0.99 * bound[:2] < true[:2]).all()
    assert float(bound[2]) < 1e-300
    steep = N.neuron_moves("silu", torch.tensor([2.3994]).double(), torch.tensor([1e-3]).double())
    silu = activation("silu")
    moved = silu(torch.tensor([2.4004]).double()) - silu(torch.tensor([2.3994]).double())
    assert 0.99 * float(steep) < float(moved) <= float(steep)


def test_an_unknown_nonlinearity_is_refused() -> None:
    with pytest.raises(UsageError, match="'tanh'"):
        N.require("tanh")


@pytest.mark.parametrize("kind", N.KINDS)
@pytest.mark.parametrize("seed", CASES)
def test_no_search_moves_an_mlp_further(kind: N.Kind, seed: int) -> None:
    W_in, W_out = rows(5, 9, seed=seed), rows(9, 5, seed=seed + 100)
    pre, phi, eps = rows(9, seed=seed + 200), activation(kind), 0.1 * 3**seed / 10
    bound = N.mlp_moves(kind, pre, W_in, W_out, scalar(eps))
    start = phi(pre) @ W_out
    found = most(lambda e: ((phi(pre + e @ W_in)) @ W_out - start).norm(), 5, eps, seed)
    assert 0 < found <= float(bound)
    if kind == "relu":
        split = float(N.stable_mlp_moves(pre, W_in, W_out, scalar(eps)))
        assert found <= split <= float(bound)


def test_the_mlp_bounds_are_tight() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    bound = N.mlp_moves("relu", scalar(5.0)[None], 3 * one, 2 * one, scalar(0.5))
    assert 3.0 <= float(bound) < 3.0 / 0.99
    # Two neurons that are on cancel: their joint map is zero, apart they would pay 2 eps.
    W_in, W_out = torch.ones(1, 2).double(), torch.tensor([[1.0], [-1.0]]).double()
    joint = N.stable_mlp_moves(torch.tensor([5.0, 5.0]).double(), W_in, W_out, scalar(0.5))
    assert float(joint) < 1e-10
    sides = torch.tensor([3.0, 4.0]).double()
    assert 25.0 <= float(N.written_up(sides, sides[:, None])) < 25.0 / 0.99


@pytest.mark.parametrize("kind", N.KINDS)
def test_gated_moves(kind: N.Kind) -> None:
    gate, value = rows(300, seed=1, scale=3.0), rows(300, seed=2, scale=3.0)
    reach = (rows(300, seed=3).abs(), rows(300, seed=4).abs())
    bound, phi = N.gated_moves(kind, gate, value, reach), activation(kind)
    start = value * phi(gate)
    for seed in range(200):
        g = gate + (rows(300, seed=seed + 10).clamp(-1, 1)) * reach[0]
        u = value + (rows(300, seed=seed + 900).clamp(-1, 1)) * reach[1]
        assert ((u * phi(g) - start).abs() <= bound + 1e-13).all()
    both = (scalar(1.0)[None], scalar(1.0)[None])
    tight = N.gated_moves("relu", scalar(2.0)[None], scalar(3.0)[None], both)
    assert 4 * 3 - 3 * 2 <= float(tight) < 6.0 / 0.99


@pytest.mark.parametrize("kind", N.KINDS)
@pytest.mark.parametrize("seed", CASES)
def test_interaction_is_within_its_bounds(kind: N.Kind, seed: int) -> None:
    y = rows(200, 2 + seed, seed=seed, scale=2.0)
    phi = activation(kind)
    true = (phi(y).sum(-1) - phi(y.sum(-1))).abs()
    assert (interaction.additive_up(kind, y) >= true - 1e-14).all()
    if kind == "relu":
        exact = interaction.additive_up(kind, y)
        assert torch.allclose(exact, true, atol=1e-12)
        assert (interaction.coupled_up(y) >= exact * (1 - 1e-14)).all()
        largest = y.gather(1, y.abs().argmax(1, keepdim=True))[:, 0]
        alone = (torch.relu(y.sum(-1)) - torch.relu(largest)).abs()
        assert (interaction.dominance_up(y) >= alone - 1e-14).all()
    u = rows(200, 2 + seed, seed=seed + 50)
    gated = ((u.sum(-1)) * phi(y.sum(-1)) - (u * phi(y)).sum(-1)).abs()
    assert (interaction.gated_up(kind, u, y) >= gated - 1e-13).all()


def test_interaction_bounds_are_tight() -> None:
    y = torch.tensor([[3.0, -2.0]]).double()
    for bound in (
        interaction.additive_up("relu", y),
        interaction.coupled_up(y),
        interaction.dominance_up(torch.tensor([[3.0, 2.0]]).double()),
    ):
        assert 2.0 <= float(bound) < 2.0 / 0.99
    # φ(1.2785 − 1.2785) = 0, while each gives: the peak of h twice, less min(P, Q) and h(0).
    z = torch.tensor([[-1.2785, -1.2785]]).double()
    silu = activation("silu")
    true = float((silu(z).sum() - silu(z.sum())).abs())
    found = float(interaction.additive_up("silu", z))
    assert true <= found
    one = torch.ones(1, 2, dtype=torch.float64)
    gated = interaction.gated_up("relu", one, one)
    assert 2.0 <= float(gated) < 2.0 / 0.99


@pytest.mark.parametrize("seed", CASES)
def test_the_pair_table_bounds_every_code(seed: int) -> None:
    W, out = rows(4, 7, seed=seed), rows(7, seed=seed + 9).abs()
    table = interaction.pair_table(W, out)
    strengths = rows(300, 4, seed=seed + 20, scale=2.0).abs()
    y = strengths[:, :, None] * W
    true = (torch.relu(y).sum(1) - torch.relu(y.sum(1))) @ out
    assert (interaction.pairs_up(strengths, table.expand(300, 4, 4)) >= true * (1 - 1e-13)).all()


def test_the_pair_table_is_tight_for_two_equal_opposites() -> None:
    W = torch.tensor([[1.0, 2.0], [-1.0, 2.0]]).double()
    table = interaction.pair_table(W, torch.tensor([3.0, 5.0]).double())
    found = float(interaction.pairs_up(torch.ones(2).double(), table))
    assert 3.0 <= found < 3.0 / 0.99
    size = interaction.spread_up(
        torch.tensor([3.0, 4.0]).double(), torch.tensor([3.0, 4.0]).double()
    )
    assert 25.0 <= float(size) < 25.0 / 0.99


@pytest.mark.parametrize("seed", CASES)
def test_one_layer_of_the_recursion(seed: int) -> None:
    F, D, M = 6, 4, 8
    dec, after = rows(F, D, seed=seed), rows(F, D, seed=seed + 1)
    W_in, W_out = rows(D, M, seed=seed + 2), rows(M, D, seed=seed + 3)
    a = torch.relu(rows(50, F, seed=seed + 4))
    x = a @ dec + 0.1 * rows(50, D, seed=seed + 5)
    before = (x - a @ dec).norm(dim=-1) * (1 + 1e-14)
    pre = (a @ dec) @ W_in
    single = a[:, :, None] * (dec @ W_in)
    table = residual.transition_table(dec, after, W_in, W_out)
    step = residual.Step(
        before,
        N.mlp_moves("relu", pre, W_in, W_out, before),
        N.written_up(interaction.additive_up("relu", single.transpose(1, 2)), W_out),
        residual.transition_up(a, table.expand(50, F), scalar(0.0)),
    )
    true = (x + torch.relu(x @ W_in) @ W_out - a @ after).norm(dim=-1)
    assert (step.after >= true).all()
    one = torch.ones(1, 1, dtype=torch.float64)
    tight = residual.transition_table(one, 0 * one, one, one)
    assert 2.0 <= float(tight) < 2.0 / 0.99
    assert float(residual.transition_up(-one, one, scalar(0.0))) == math.inf


def test_the_base_case_is_exact() -> None:
    p, q = rows(20, 5, seed=0).float(), rows(20, 5, seed=1).float()
    total = p.double() + q.double()
    assert float(residual.base_up((p, q), total).max()) == 0
    off = total.clone()
    off[:, 0] += 3.0
    found = residual.base_up((p, q), off)
    assert (found >= 3.0 - 1e-12).all()
    assert (0.99 * found < 3.0).all()
    # 1 + 2^-60 is no float: what is lost is counted.
    tiny = residual.base_up(
        (torch.ones(1, 1), torch.full((1, 1), 2.0**-60)), torch.ones(1, 1).double()
    )
    assert 2.0**-60 <= float(tiny) < 2.0**-60 / 0.99


def rms(x: torch.Tensor, floor: float) -> torch.Tensor:
    return x / (x.square().mean() + floor).sqrt()


@pytest.mark.parametrize("floor", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("seed", CASES)
def test_no_search_moves_a_norm_further(seed: int, floor: float) -> None:
    x, gain = rows(6, seed=seed), rows(6, seed=seed + 30)
    eps = 0.05 * 2.5**seed

    def moved(e: torch.Tensor) -> torch.Tensor:
        return (gain * (rms(x + e, floor) - rms(x, floor))).norm()

    def layer(e: torch.Tensor) -> torch.Tensor:
        z = x + e
        return (gain * (rms(z - z.mean(), floor) - rms(x - x.mean(), floor))).norm()

    bound = normalisation.rms_moves(x, scalar(eps), gain, floor)
    assert 0 < most(moved, 6, eps, seed) <= float(bound)
    centred = normalisation.layer_moves(x, scalar(eps), gain, floor)
    assert 0 < most(layer, 6, eps, seed) <= float(centred)


def test_the_norm_bounds_are_tight() -> None:
    x = torch.tensor([1.0, 0.0]).double()
    # Turned right round: x to −x moves the normalised row by 2 √2, the most there is.
    bound = float(normalisation.rms_moves(x, scalar(2.0)))
    assert 2 * math.sqrt(2) <= bound < 2 * math.sqrt(2) / 0.99
    # A small step across the row: Dunkl–Williams is attained in the limit.
    small = float(normalisation.rms_moves(x, scalar(0.01)))
    true = float((rms(torch.tensor([1.0, 0.01]).double(), 0.0) - rms(x, 0.0)).norm())
    assert true <= small < true / 0.99
    y = torch.tensor([1.0, -1.0]).double()
    turned = float(normalisation.layer_moves(y, scalar(2 * math.sqrt(2))))
    assert 2 * math.sqrt(2) <= turned < 2 * math.sqrt(2) / 0.99


@pytest.mark.parametrize("seed", CASES)
def test_no_scores_move_softmax_further(seed: int) -> None:
    scores = rows(500, 5, seed=seed, scale=2.0)
    shift = rows(500, 5, seed=seed + 1, scale=0.3 * 2**seed)
    width = shift.amax(-1) - shift.amin(-1)
    before, after = scores.softmax(-1), (scores + shift).softmax(-1)
    moved = (before - after).abs().sum(-1) / 2
    assert (moved <= attention.variation_up(width) + 1e-15).all()
    half = attention.variation_up(scalar(2.0))
    # Two keys with odds e^-1, then e^1: r = 1/(1 + √t), where the lemma is attained.
    true = 1 / (1 + math.exp(-1.0)) - 1 / (1 + math.exp(1.0))
    assert true <= float(half) < true / 0.99


@pytest.mark.parametrize("seed", CASES)
def test_attention_with_uncertain_scores_and_values(seed: int) -> None:
    query, key, value = rows(3, 4, seed=seed), rows(5, 4, seed=seed + 1), rows(5, 4, seed=seed + 2)
    W_Q, W_K = rows(4, 2, seed=seed + 3), rows(4, 2, seed=seed + 4)
    eps = (scalar(0.1).expand(3), scalar(0.2).expand(5))
    bound = attention.score_moves(query, key, W_Q, W_K, eps)
    scores = (query @ W_Q) @ (key @ W_K).T
    for trial in range(100):
        e, f = rows(3, 4, seed=trial + 50), rows(5, 4, seed=trial + 500)
        x = query + 0.1 * e / e.norm(dim=-1, keepdim=True) * (1 - 1e-14)
        z = key + 0.2 * f / f.norm(dim=-1, keepdim=True) * (1 - 1e-14)
        moved = (x @ W_Q) @ (z @ W_K).T
        assert ((moved - scores).abs() <= bound).all()
        v = value + 0.3 * f / f.norm(dim=-1, keepdim=True) * (1 - 1e-14)
        shift = (moved - scores)[0]
        most_moved = attention.attention_moves(value, shift.max() - shift.min(), scalar(0.3))
        true = (moved[0].softmax(-1) @ v - scores[0].softmax(-1) @ value).norm()
        assert float(true) <= float(most_moved)
    one = torch.ones(1, 1, dtype=torch.float64)
    tight = attention.score_moves(one, one, one, one, (scalar(0.5)[None], scalar(0.5)[None]))
    assert 1.5**2 - 1 <= float(tight) < 1.25 / 0.99


@pytest.mark.parametrize("seed", CASES)
def test_no_logits_within_the_error_do_worse(seed: int) -> None:
    z, error = rows(50, 6, seed=seed, scale=2.0), rows(50, 6, seed=seed + 1).abs() * 0.3
    label = torch.randint(6, (50,), generator=torch.Generator().manual_seed(seed))
    correct = logits.margin_correct(z, error, label)
    bound = logits.loss_up(z, error, label)
    sign = torch.ones_like(z).scatter(1, label[:, None], -1.0)
    for trial in range(60):
        share = sign if trial == 0 else rows(50, 6, seed=trial).clamp(-1, 1)
        moved = z + share * error * (1 - 1e-14)
        assert (moved.argmax(1)[correct] == label[correct]).all()
        loss = torch.nn.functional.cross_entropy(moved, label, reduction="none")
        assert (loss <= bound + 1e-14).all()
    worst = torch.nn.functional.cross_entropy(z + sign * error, label, reduction="none")
    assert (0.99 * bound < worst).all()  # attained at the corner
    assert bool(correct.any()) or seed > 0
    assert not bool(logits.margin_correct(z * math.nan, error, label).any())


def test_the_loss_cap_is_attained() -> None:
    U = torch.tensor([[0.0, 3.0, 3.0]]).double()
    widest = logits.widest_up(U, scalar(2.0))
    cap = float(logits.loss_cap(widest, 3))
    true = float(torch.nn.functional.cross_entropy(2 * U, torch.tensor([0])))
    assert true <= cap < true / 0.99
    assert math.isfinite(float(logits.loss_cap(scalar(5000.0), 3)))
    # The two that are furthest apart are neither the first nor beside it.
    between = float(logits.widest_up(torch.tensor([[0.0, 2.0, -1.0]]).double(), scalar(1.0)))
    assert 3.0 <= between < 3.0 / 0.99


@pytest.mark.parametrize("seed", CASES)
def test_boxes_hold_their_points(seed: int) -> None:
    points, W = rows(30, 4, seed=seed), rows(4, 7, seed=seed + 1)
    low, high = points.amin(0), points.amax(0)
    box = boxes.relu_box(boxes.linear_box(boxes.Box(low, high), W))
    corners = torch.stack([box.low, box.high])
    assert (corners[0] <= corners[1]).all()
    for trial in range(100):
        share = (
            torch.rand(4, generator=torch.Generator().manual_seed(trial)).double().round(decimals=1)
        )
        value = torch.relu((low + share * (high - low)) @ W)
        assert (box.low <= value + 1e-14).all()
        assert (value - 1e-14 <= box.high).all()
    unit = boxes.linear_box(
        boxes.Box(-torch.ones(2).double(), torch.ones(2).double()), torch.ones(2, 1)
    )
    assert 2.0 <= float(unit.high) < 2.0 / 0.99
    joined = boxes.sum_box(unit, unit)
    assert 4.0 <= float(joined.high) < 4.0 / 0.99

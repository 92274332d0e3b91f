"""The small language model: lemmas inside their balls, tiers on the safe side, mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crosslens.proofs.families import small_lm as family
from crosslens.proofs.ladder import small_lm_search as search
from crosslens.proofs.ladder.small_lm import forward
from crosslens.proofs.ladder.small_lm_proof import bounds
from crosslens.proofs.lemmas import attention, readout, recursion, stream
from crosslens.proofs.lemmas.contexts import contexts
from crosslens.proofs.lemmas.stream import Rows
from crosslens.proofs.tiers import Case
from tests.proofs_small_lm import TINY, looped_losses, made

Made = tuple[Case, list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def one() -> Made:
    return made()


@pytest.fixture(scope="module")
def two() -> Made:
    return made(replace(TINY, layers=2, steps=80, seed=3))


def rows(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def moved(x: Tensor, eps: float, seed: int) -> Tensor:
    """Every row moved to the edge of its ball."""
    step = rows(*x.shape, seed=seed)
    return x + eps * (1 - 1e-12) * step / step.norm(dim=-1, keepdim=True)


# Contexts


def test_equal_contexts_share_a_node() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, (50, 5), generator=generator)
    used = torch.rand(50, 5, generator=generator) < 0.4
    tree = contexts(tokens, used)
    known: dict[tuple[int, ...], int] = {}
    for s in range(50):
        last = max((t for t in range(5) if used[s, t]), default=-1)
        for t in range(5):
            node = int(tree.node_ST[s, t])
            if t > last:
                assert node == -1
                continue
            context = tuple(tokens[s, : t + 1].tolist())
            assert known.setdefault(context, node) == node
            path = tree.path_UT[node][tree.inside_UT[node]]
            assert [int(tree.tokens_X[tree.token_U[n]]) for n in path] == list(context)
            assert int(path[-1]) == node
            assert tree.age_UT[node][: t + 1].tolist() == list(range(t, -1, -1))
    assert sorted(known.values()) == list(range(len(tree.first_U)))
    for context, node in known.items():
        s, t = divmod(int(tree.first_U[node]), 5)
        assert tuple(tokens[s, : t + 1].tolist()) == context


# The model with its rounding


@pytest.mark.parametrize("layers", [1, 2])
def test_the_stream_is_the_model(one: Made, two: Made, layers: int) -> None:
    case = (one, two)[layers - 1][0]
    exact = {name: tensor.double() for name, tensor in case.weights.items()}
    logits, sites = forward(exact, case.data["tokens"])
    tree = contexts(case.data["tokens"], torch.ones_like(case.data["tokens"]) > 0)
    assert len(tree.first_U) < tree.node_ST.numel()
    for found, true in zip(stream.run(case.weights, tree).sites, sites, strict=True):
        assert 0 <= float(found.eps) < 1e-3
        assert float((found.value[tree.node_ST] - true).norm(dim=-1).max()) <= found.eps + 1e-12
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), case.data["labels"].flatten(), reduction="none"
    ).reshape(case.data["tokens"].shape)
    for sequence in (0, 7):
        assert losses[sequence].tolist() == pytest.approx(looped_losses(case, sequence), abs=1e-9)


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_what_rows_are_off_by_is_carried_along(eps: float, seed: int) -> None:
    """Inputs anywhere in their balls: what comes out is within the ball that is said."""
    x, W_in, W_out = rows(12, 6, seed=seed), rows(6, 9, seed=seed + 1), rows(9, 6, seed=seed + 2)
    ball = Rows(x, scalar(eps))
    index = torch.randint(12, (5, 4), generator=torch.Generator().manual_seed(seed))
    age = torch.tensor([3, 0, 1, 2, 3])[:, None] - torch.arange(4)
    bias = rows(2, 4, seed=seed + 3)

    def attend(q: Rows, k: Rows, v: Rows) -> Rows:
        return stream.attended(q.at(torch.arange(5)), k, v, index, age, bias)

    cases: list[tuple[Callable[[Rows], Rows], int]] = [
        (stream.normalised, 0),
        (lambda r: stream.linear(r, W_in), 0),
        (lambda r: stream.mlp(r, W_in, W_out), 0),
        (lambda r: stream.added(r, r), 0),
        (lambda r: attend(r, r, r), 0),
    ]
    for made_of, _ in cases:
        found = made_of(ball)
        furthest = 0.0
        for trial in range(60):
            there = made_of(Rows(moved(x, eps, 100 * seed + trial), scalar(0.0)))
            furthest = max(furthest, float((there.value - found.value).norm(dim=-1).max()))
        assert 0 < furthest <= float(found.eps)


def test_what_is_carried_along_is_tight() -> None:
    one_row, eye = torch.ones(1, 1, dtype=torch.float64), 3 * torch.ones(1, 1).double()
    ball = Rows(one_row, scalar(0.5))
    assert 1.5 <= float(stream.linear(ball, eye).eps) < 1.5 / 0.99
    assert 1.0 <= float(stream.added(ball, ball).eps) < 1.0 / 0.99
    assert 4.5 <= float(stream.mlp(ball, eye, eye).eps) < 4.5 / 0.99
    alone = stream.attended(
        Rows(0 * one_row, scalar(0.0)),
        Rows(0 * one_row, scalar(0.0)),
        ball,
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(1, 1),
    )
    assert 0.5 <= float(alone.eps) < 0.5 / 0.99


@pytest.mark.parametrize("whose", ["query", "key"])
def test_what_scores_are_off_by_is_tight(whose: str) -> None:
    """Two keys with odds e to 1 against one, then for it; their values are opposite."""
    one_row, none = torch.ones(1, 1, dtype=torch.float64), scalar(0.0)
    sides = torch.tensor([[1.0], [-1.0]]).double()
    query, key = Rows(one_row, none), Rows(0 * sides, scalar(1.0))
    if whose == "query":
        query, key = Rows(0 * one_row, scalar(1.0)), Rows(sides, none)
    index, age = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
    found = stream.attended(query, key, Rows(sides, none), index, age, torch.tensor([[0.0, -1.0]]))
    true = 2 * math.tanh(0.5)
    assert true <= float(found.eps) < true / 0.99
    eps = (scalar(1.0)[None], torch.zeros(1, 2).double())
    if whose == "key":
        eps = (torch.zeros(1).double(), torch.ones(1, 2).double())
    sizes = (torch.ones(1, 1).double(), torch.ones(1, 2, 1).double(), torch.ones(1, 2, 1).double())
    maps = (torch.ones(1).double(), torch.ones(1).double(), torch.zeros(1).double())
    moves = attention.causal_moves(eps, sizes, (*maps, torch.ones(1).double()))
    assert true <= float(moves) < true / 0.99


# Readout: full, near a region, far


def judged(
    kind: str, seed: int, eps: float
) -> tuple[readout.Readout, Tensor, readout.Leading, Rows]:
    """Leading answers of eight rows with an error of eps; the hints of `near` are no good ones."""
    U, n = rows(5, 11, seed=seed), 2 * rows(8, 5, seed=seed + 1)
    n = n / n.norm(dim=1, keepdim=True) * math.sqrt(5) * 0.9
    read, given = readout.readout(U), Rows(n, scalar(eps))
    region = torch.randint(3, (8,), generator=torch.Generator().manual_seed(seed))
    answers = torch.tensor([[0, 0, 3], [5, 1, 2], [7, 8, 9]])
    apart = readout.regions(read, rows(3, 5, seed=seed + 2), answers)
    if kind == "full":
        return read, U, readout.in_full(read, given), given
    if kind == "near":
        along = readout.directions(read, rows(5, 2, seed=seed + 3))
        return read, U, readout.near(read, given, region, apart, along), given
    reach = (n - apart.centre_CD[region]).norm(dim=1) * (1 + 1e-12) + eps
    return read, U, readout.far(read, apart, region, reach), given


@pytest.mark.parametrize("kind", ["full", "near", "far"])
@pytest.mark.parametrize("eps", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_no_row_in_its_ball_does_worse(kind: str, eps: float, seed: int) -> None:
    """By chance, and by ascent of the loss along its gradient."""
    _, U, found, given = judged(kind, seed, eps)
    shift = U.mean(1, keepdim=True)
    for trial in range(40):
        n = moved(given.value, eps, trial) if eps else given.value
        for _ in range(6 if eps else 1):
            n = n.detach().requires_grad_(True)
            z = n @ (U - shift)
            total = z.logsumexp(1)
            assert (total <= found.total_U + 1e-13).all()
            largest = z.topk(2).values
            assert (largest <= found.top_U2 + 1e-13).all()
            (slope,) = torch.autograd.grad(total.sum(), n)
            step = (n + eps * slope - given.value).detach()
            size = step.norm(dim=1, keepdim=True).clamp_min(1e-300)
            n = given.value + step * (eps * (1 - 1e-12) / size).clamp_max(1)


@pytest.mark.parametrize("seed", range(4))
def test_labels_logits_are_below_the_models(seed: int) -> None:
    eps = 0.1
    read, U, _, given = judged("full", seed, eps)
    label = torch.arange(8)
    region = torch.zeros(8, dtype=torch.int64)
    apart = readout.regions(read, given.value[:1], torch.zeros(1, 1, dtype=torch.int64))
    reach = (given.value - given.value[0]).norm(dim=1) * (1 + 1e-12) + eps
    own = readout.labels_down(read, given, label)
    far = readout.labels_far_down(read, apart, region, reach, label)
    columns = (U - U.mean(1, keepdim=True)).T[label]
    worst = given.value - eps * (1 - 1e-12) * columns / columns.norm(dim=1, keepdim=True)
    true = (worst * columns).sum(1)
    assert (own <= true).all()
    assert (far <= true).all()


def test_near_and_the_cap_are_attained() -> None:
    """Two opposite columns, a row off along one of them, the other told exactly."""
    U = torch.tensor([[1.0, -1.0], [0.0, 0.0]]).double()
    read = readout.readout(U)
    apart = readout.regions(read, torch.zeros(1, 2).double(), torch.tensor([[1]]))
    along = readout.directions(read, torch.tensor([[0.0], [1.0]]).double())
    given = Rows(torch.tensor([[1.4, 0.0]]).double(), scalar(0.0))
    found = readout.near(read, given, torch.zeros(1, dtype=torch.int64), apart, along)
    true = float((given.value @ U).logsumexp(1))
    assert true <= float(found.total_U) < true / 0.99
    one, none = torch.tensor([[1.4, 0.0]]).double(), torch.zeros(1, dtype=torch.int64)
    reach = readout.far(read, apart, none, torch.tensor([1.4]).double())
    assert float(reach.top_U2[0, 0]) < float(one @ U[:, :1]) / 0.99
    cap = float(readout.caps(read)[1])
    worst = math.sqrt(2) * torch.tensor([1.0, -1.0]).double()
    attained = float(torch.nn.functional.cross_entropy(worst[None], torch.tensor([1])))
    # The label's own term is counted at its largest, too.
    assert attained <= cap
    assert 0.75 * cap < attained


def test_directions_of_another_length_are_paid_for() -> None:
    """One coordinate, Q = √½: U = QR + P halves everything, and each term of the bound is used."""
    read = readout.readout(torch.tensor([[1.0, -1.0]]).double())
    apart = readout.regions(read, torch.zeros(1, 1).double(), torch.tensor([[1]]))
    along = readout.directions(read, torch.tensor([[math.sqrt(0.5)]], dtype=torch.float64))
    given = Rows(torch.tensor([[0.75]]).double(), scalar(0.0))
    found = readout.near(read, given, torch.zeros(1, dtype=torch.int64), apart, along)
    true = float(torch.tensor([0.75, -0.75]).double().logsumexp(0))
    assert true <= float(found.total_U)
    assert 0.75 <= float(found.top_U2[0, 0]) < 0.75 / 0.99


def test_a_margin_within_the_spare_does_not_count() -> None:
    top = torch.tensor([[1.0, 0.5]]).double()
    found = readout.Leading(torch.zeros(1).double(), top, torch.tensor([[4, 2]]))
    at, label = torch.zeros(1, dtype=torch.int64), torch.tensor([3])
    own = torch.tensor([1.0 + 1e-11], dtype=torch.float64)
    assert bool(readout.right(found, at, own, label, 0.0))
    assert not bool(readout.right(found, at, own, label, 2.0**-30))
    assert not bool(readout.right(found, at, own - 1, label, 0.0))
    assert bool(readout.right(found, at, torch.tensor([0.6]).double(), torch.tensor([4]), 0.0))


# The recursion


@pytest.mark.parametrize("eps", [0.01, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_no_search_moves_causal_attention_further(seed: int, eps: float) -> None:
    n, H, d = 6, 2, 3
    x = rows(n, n, seed=seed)
    W_Q, W_K, W_V, W_O = (rows(n, n, seed=seed + i) for i in range(1, 5))
    age = torch.arange(n)[:, None] - torch.arange(n)
    index = torch.arange(n).expand(n, n)

    def attend(x: Tensor) -> Tensor:
        q, k, v = (stream.exactly(x @ W) for W in (W_Q, W_K, W_V))
        return stream.attended(q, k, v, index, age, torch.zeros(H, n)).value @ W_O

    inside = age >= 0
    eps_key = torch.where(inside, eps, 0.0).double()
    heads = [(x @ W).unflatten(-1, (H, d)).norm(dim=-1) for W in (W_Q, W_K, W_V)]
    keys = [torch.where(inside[..., None], part.expand(n, n, H), 0.0) for part in heads[1:]]
    maps = [W.reshape(n, H, d).transpose(0, 1).flatten(1).norm(dim=1) for W in (W_Q, W_K, W_V)]
    bound = attention.causal_moves(
        (torch.full((n,), eps).double(), eps_key),
        (heads[0], keys[0], keys[1]),
        (maps[0], maps[1], maps[2], W_O.reshape(H, -1).norm(dim=1)),
    )
    for trial in range(100):
        off = (attend(moved(x, eps, trial)) - attend(x)).norm(dim=1)
        assert (off <= bound).all()


def test_causal_moves_are_tight_for_values() -> None:
    one_, none = torch.ones(1, 1).double(), torch.zeros(1).double()
    found = attention.causal_moves(
        (torch.zeros(1).double(), 0.5 * one_),
        (one_, one_[None], one_[None]),
        (none, none, 2 + none, 3 + none),
    )
    assert 3.0 <= float(found) < 3.0 / 0.99


@pytest.mark.parametrize("tier", family.RECURSED)
@pytest.mark.parametrize("layers", [1, 2])
def test_the_recursion_holds_every_site(one: Made, two: Made, tier: str, layers: int) -> None:
    """With the model's own coder, and with one that is nearly exact, where the terms matter."""
    case = (one, two)[layers - 1][0]
    true = search.truth(case.weights, case.data)
    for scale in (1.0, 0.0):
        coder = case.coder if scale else nearly(case, true)
        found = bounds(replace(case, coder=coder), {"all": tier}, coder)
        names = family.sites(layers)
        for place, name in enumerate(names):
            assert found.sites[name] >= mean_error(coder, true, place)
        for before, layer in zip(names, found.layers, strict=False):
            assert layer.before == pytest.approx(found.sites[before], rel=1e-9)
            parts = layer.before + layer.propagation + layer.interaction + layer.transition
            assert layer.after == pytest.approx(parts, rel=1e-9)
        assert (max(layer.interaction for layer in found.layers) > 0) == (tier != "codes")


def nearly(case: Case, true: search.Truth) -> dict[str, Tensor]:
    """A coder with a feature for every position, whose vectors are the stream itself."""
    rows_PND = true.rows_PND * (1 + 1e-9)
    count = rows_PND.shape[1]
    return {
        **case.coder,
        "decoder": rows_PND.contiguous(),
        "decoder_bias": torch.zeros_like(rows_PND[:, 0]),
        "index": torch.arange(count)[:, None],
        "strength": torch.ones(count, 1).double(),
        "region": torch.arange(count).reshape(case.data["tokens"].shape),
        "answers": torch.zeros(count, 2, dtype=torch.int64),
    }


def mean_error(coder: dict[str, Tensor], true: search.Truth, place: int) -> float:
    vectors = coder["decoder"][place][coder["index"]]
    decoded = coder["decoder_bias"][place] + (coder["strength"][..., None] * vectors).sum(1)
    off = true.rows_PND[place] - decoded[coder["region"].flatten()]
    return float(off.norm(dim=1).mean()) * (1 - 1e-12)


def test_a_nearly_exact_coder_proves_nearly_the_truth(one: Made) -> None:
    """Codes through the recursion: not vacuous where the coder leaves next to nothing."""
    case = one[0]
    coder = nearly(case, search.truth(case.weights, case.data))
    found = bounds(case, {"all": "codes"}, coder)
    assert case.truth["loss"] <= found.loss < case.truth["loss"] / 0.99
    assert found.base < 1e-6
    wide = bounds(case, {"all": "additive"}, coder)
    assert found.loss < wide.loss


def test_the_interaction_term_is_what_features_miss(one: Made) -> None:
    """Norm by norm: no less than the distance of the MLP from the sum of its features' images."""
    case, coder = one[0], one[0].coder
    code = recursion.Code(
        coder["decoder"], coder["decoder_bias"], coder["index"], coder["strength"]
    )
    tree = contexts(case.data["tokens"], torch.ones_like(case.data["tokens"]) > 0)
    region = coder["region"].flatten()[tree.first_U]
    w = {name: tensor[0].double() for name, tensor in case.weights.items() if tensor.dim() == 3}
    x = code.decoded(1)
    scale = (x.square().mean(1, keepdim=True) + stream.FLOOR).sqrt()
    vectors = coder["strength"][..., None] * coder["decoder"][1][coder["index"]]
    parts = torch.cat([coder["decoder_bias"][1].expand(len(x), 1, -1), vectors], 1)
    apart = (parts / scale[..., None] @ w["W_in"]).relu().sum(1) @ w["W_out"]
    missed = (((x / scale) @ w["W_in"]).relu() @ w["W_out"] - apart).norm(dim=1)[region]
    least = {}
    for tier in ("additive", "pairs"):
        step = recursion.recursion(case.weights, code, region, tree, tier).steps[1]
        assert (step.interaction >= missed * (1 - 1e-9)).all()
        least[tier] = float(step.interaction.mean())
    assert least["additive"] <= least["pairs"]
    assert float(missed.max()) > 0.01


# Tiers


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("tier", family.SMALL_LM.tiers)
def test_every_tier_is_on_the_safe_side(one: Made, two: Made, tier: str, layers: int) -> None:
    case = (one, two)[layers - 1][0]
    true = search.truth(case.weights, case.data)
    found = bounds(case, {"all": tier}, case.coder)
    assert case.truth["loss"] <= found.loss <= bounds(case, {"all": "box"}, case.coder).loss
    assert found.accuracy <= case.truth["accuracy"]
    for place, name in enumerate(found.sites):
        assert found.sites[name] >= mean_error(dict(case.coder), true, place)
    if tier == "distinct":
        assert 0.99 * found.loss < case.truth["loss"]
        assert found.accuracy > case.truth["accuracy"] - 0.02
    if tier in family.RUN:
        assert found.sites["embed"] == pytest.approx(mean_error(dict(case.coder), true, 0))
    if tier == "regions":
        assert found.loss < 0.9 * bounds(case, {"all": "box"}, case.coder).loss


@pytest.mark.parametrize("tier", ["regions", "distinct", "box"])
def test_each_position_is_on_the_safe_side(one: Made, tier: str) -> None:
    from crosslens.proofs.ladder.small_lm_proof import asked_for

    case = one[0]
    asked = asked_for(case, case.coder, {"all": tier})
    loss_N, _ = family.positions(asked, family.planned(asked))
    assert (loss_N >= search.truth(case.weights, case.data).loss_N).all()


@pytest.mark.parametrize("name", ["strength", "decoder", "basis", "answers", "region"])
def test_wrong_hints_only_loosen(one: Made, name: str) -> None:
    case = one[0]
    good = bounds(case, {"all": "regions"}, case.coder).loss
    tensor, generator = case.coder[name], torch.Generator().manual_seed(2)
    if tensor.is_floating_point():
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        worse = tensor + noise
    else:
        worse = tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)]
        worse = worse.reshape(tensor.shape)
    found = bounds(case, {"all": "regions"}, {**case.coder, name: worse}).loss
    assert case.truth["loss"] <= found
    assert found > good


def test_other_weights_have_another_bound(one: Made) -> None:
    case = one[0]
    for name, tensor in case.weights.items():
        if not bool(tensor.any()):
            continue
        other = replace(case, weights={**case.weights, name: tensor * 1.001})
        for tier in ("distinct", "regions"):
            now = bounds(other, {"all": tier}, case.coder).loss
            assert now != bounds(case, {"all": tier}, case.coder).loss
            assert now >= float(search.truth(other.weights, case.data).loss_N.mean())

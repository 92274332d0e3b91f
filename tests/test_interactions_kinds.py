"""Kinds of interaction: their columns against loops, and each found again where it was planted."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from crosslens.errors import UsageError
from crosslens.functional.interactions import activation
from crosslens.interactions.intervals import mean_interval
from crosslens.interactions.neurons.contributions import Effective, effective, site_chunks
from crosslens.interactions.pairs.contexts import ContextPlan
from crosslens.interactions.pairs.kinds import (
    KINDS,
    KindPlan,
    alike,
    binding,
    by_kind,
    kinds,
)
from crosslens.interactions.pairs.measure import PairPlan, measure_pairs
from crosslens.interactions.pairs.signatures import SIGNATURE, SORTS, dealt, signatures, sorted_out
from crosslens.interactions.pairs.table import Triplets
from tests.interaction_sites import CASES, coder_at, model_of, source_at
from tests.interactions_kinds_toy import NAME, Planted, planted, with_norm
from tests.interactions_pairs_toy import (
    SITES,
    N,
    both,
    chunk,
    codes,
    latents_of,
    output,
    phi,
    site,
)
from tests.test_lm_families import tokens


def measured(chunks, plan: ContextPlan = ContextPlan(groups=4)) -> Triplets:  # noqa: B008
    pairs = measure_pairs(lambda: chunks, PairPlan(candidates=4096, contexts=plan))
    return signatures(chunks, pairs.triplets, plan)


def corner(these, row: int, out: tuple[int, ...], n: int, scalar: bool) -> float:
    """A neuron's output without some latents; with the scalar of the row without them if asked."""
    if scalar:
        x = these.input_RD[row].double()
        start, stop = these.lists.starts_I[row : row + 2].tolist()
        for e in range(start, stop):
            if int(these.lists.index_N[e]) in out:
                latent = int(these.lists.index_N[e])
                x = x - float(these.value_E[e]) * these.effective.decoder_LD[latent].double()
        norm = these.effective.norm
        if norm.kind == "layer":
            x = x - x.mean()
        square = float((x**2).mean())
        changed = these.scalar_R.clone()
        changed[row] = (square + norm.eps) ** -0.5
        these = replace(these, scalar_R=changed)
    inner, value = both(these, row)
    inside = [m for m in inner if m not in out]
    return output(these.effective.mlp.kind, inner, value, inside, n)


def loops(chunks) -> dict[tuple[int, int], dict[str, float]]:
    """Means per meeting of each column, from the definitions."""
    found: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for by_site in chunks:
        these = by_site["mlp_in.0"]
        for row in range(these.lists.n_items):
            latents = latents_of(these, row)
            for i, j in [(i, j) for i in latents for j in latents if i < j]:
                found[i, j]["count"] += 1
                for n in range(N):
                    for name, amount in terms(these, row, i, j, n):
                        found[i, j][name] += float(these.effective.out_norm_N[n]) * amount
    return {
        pair: {name: each[name] / each["count"] for name in SIGNATURE}
        for pair, each in found.items()
    }


def sort_of(h0: float, hi: float, hj: float, hij: float) -> str:
    of_i = ((hi - h0) + (hij - hj)) / 2
    of_j = ((hj - h0) + (hij - hi)) / 2
    if of_i * of_j < 0:
        return "opposed"
    return "conjoint" if (hij - hi - hj + h0) * (of_i + of_j) > 0 else "saturating"


def terms(these, row: int, i: int, j: int, n: int):
    h0, hi, hj, hij = (corner(these, row, out, n, False) for out in ((i, j), (j,), (i,), ()))
    delta = hij - hi - hj + h0
    yield sort_of(h0, hi, hj, hij), abs(delta)
    yield from by_chance(these, row, i, j, n)
    inner, value = both(these, row)
    rest = [m for m in inner if m not in (i, j)]
    if value is not None:
        kind = these.effective.mlp.kind
        c, a, b = sum(inner[m][n] for m in rest), inner[i][n], inner[j][n]
        bent = phi(kind, c + a + b) - phi(kind, c + a) - phi(kind, c + b) + phi(kind, c)
        yield "context_gated", abs(bent * sum(value[m][n] for m in rest))
    if these.effective.norm is not None:
        h0, hi, hj, hij = (corner(these, row, out, n, True) for out in ((i, j), (j,), (i,), ()))
        yield "norm_mediated", abs(hij - hi - hj + h0 - delta)


def by_chance(these, row: int, i: int, j: int, n: int):
    """With what j brings to another neuron in place of what it brings to this one."""
    other = int(dealt(N)[n])
    inner, value = both(these, row)
    kind = these.effective.mlp.kind

    def h(*inside) -> float:
        rest = [m for m in inner if m not in (i, j)]
        sums = []
        for part in (inner, value):
            if part is not None:
                own = sum(part[m][n] for m in [*rest, *(m for m in inside if m == i)])
                sums.append(own + (part[j][other] if j in inside else 0.0))
        return phi(kind, sums[0]) * (1.0 if value is None else sums[1])

    corners = (h(), h(i), h(j), h(i, j))
    delta = corners[3] - corners[1] - corners[2] + corners[0]
    yield f"{sort_of(*corners)}_by_chance", abs(delta)


@pytest.mark.parametrize(("kind", "gated"), SITES)
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_columns_are_the_loops(kind, gated, norm):
    one = site(kind, gated)
    chunks = [chunk(one, codes(9, seed), seed) for seed in range(2)]
    chunks = [{"mlp_in.0": each if norm is None else with_norm(each, norm)} for each in chunks]
    table, true = measured(chunks), loops(chunks)
    assert len(table) == len(true)
    for c, pair in enumerate(zip(table.i_C.tolist(), table.j_C.tolist(), strict=True)):
        for name in SIGNATURE:
            found = table.measures[name][c]
            assert found == pytest.approx(true[pair][name], rel=1e-3, abs=2e-5), (pair, name)
    parts = sum(table.measures[name] for name in SORTS)
    np.testing.assert_allclose(parts, table.strength_C, rtol=1e-4, atol=1e-5)
    if gated:
        directed = table.measures["first_gated"] + table.measures["second_gated"]
        assert (table.strength_C <= directed + table.measures["context_gated"] + 1e-5).all()
    if norm is None:
        assert not table.measures["norm_mediated"].any()


def test_the_same_meetings_are_looked_at_as_in_context():
    """Of a third of the meetings: other ones would give another sum."""
    one = site("silu", True)
    chunks = [{"mlp_in.0": chunk(one, codes(60, seed), seed)} for seed in range(3)]
    plan = ContextPlan(groups=4, meetings=8, seed=3)
    table = measured(chunks, plan)
    assert (table.measured_C < table.count_C).any()
    parts = sum(table.measures[name] for name in SORTS)
    np.testing.assert_allclose(parts, table.strength_C, rtol=1e-4, atol=1e-5)
    other = signatures(chunks, table, replace(plan, seed=4))
    assert not np.allclose(sum(other.measures[n] for n in SORTS), table.strength_C)


@pytest.mark.parametrize(
    ("values", "sort"),
    [
        ((0.0, 0.0, 0.0, 1.0), "conjoint"),  # and
        ((0.0, 1.0, 1.0, 3.0), "conjoint"),
        ((0.0, 1.0, 1.0, 1.0), "saturating"),  # or
        ((1.0, 0.0, 0.0, 0.0), "saturating"),  # either one closes it
        ((0.0, 1.0, 0.0, 0.0), "opposed"),  # the second holds back the first
        ((0.0, 2.0, -1.0, 0.5), "opposed"),
        ((1.0, 1.0, 1.0, 0.0), "conjoint"),  # only both close it
    ],
)
def test_neurons_are_sorted_by_what_each_does(values, sort):
    found = sorted_out(*(torch.tensor([v]) for v in values))
    assert [bool(each) for each in found] == [sort == name for name in SORTS]


@cache
def toy_of(kind: str, gated: bool, seed: int = 0) -> tuple[Planted, Triplets]:
    toy = planted(kind, gated, seed)
    return toy, measured(toy.chunks, ContextPlan(groups=4))


@pytest.mark.parametrize(
    ("kind", "gated", "seed"),
    [("relu", False, 0), ("relu", False, 1), ("gelu", False, 0), ("silu", True, 0)],
)
def test_planted_kinds_are_found_again(kind, gated, seed):
    toy, table = toy_of(kind, gated, seed)
    label_C = kinds(table, {NAME: toy.effective})
    does_C = table.strength_C + table.measures["norm_mediated"]
    pairs = list(zip(table.i_C.tolist(), table.j_C.tolist(), strict=True))
    at = {pair: c for c, pair in enumerate(pairs)}
    least = min(does_C[at[pair]] for pair in toy.truth)
    for name in set(toy.truth.values()):
        mine = [at[pair] for pair, true in toy.truth.items() if true == name]
        assert np.mean(label_C[mine] == name) >= 0.9, name
        called = [c for c in np.flatnonzero(label_C == name) if does_C[c] >= least / 2]
        assert np.mean([toy.truth.get(pairs[c]) == name for c in called]) >= 0.9, name


def test_conditions_are_tried_in_order_and_shares_sum_to_one():
    toy, table = toy_of("silu", True)
    weights = {NAME: toy.effective}
    label_C = kinds(table, weights)
    shares = by_kind(table, label_C)
    assert list(shares) == [NAME]
    assert list(shares[NAME]) == list(KINDS)
    assert sum(shares[NAME].values()) == pytest.approx(1.0)
    for name, share in shares[NAME].items():
        assert share == pytest.approx(
            table.product_C[label_C == name].sum() / table.product_C.sum(), abs=1e-12
        )
    assert json.loads(json.dumps(shares)) == shares
    duplicates = alike(table, weights) >= 0.9
    assert (label_C[duplicates] == "split duplicate").all()
    strict = kinds(table, weights, KindPlan(duplicate=1.0))
    assert not (strict == "split duplicate").any()
    assert (strict[~duplicates] == label_C[~duplicates]).all()


def test_what_does_nothing_is_mixed_and_has_no_share():
    toy, table = toy_of("relu", False)
    nothing = dict.fromkeys((*SIGNATURE, "first_gated", "second_gated"), np.zeros(len(table)))
    blank = replace(
        table,
        strength_C=np.zeros(len(table)),
        measures={**table.measures, **nothing},
    )
    label_C = kinds(blank, {NAME: toy.effective}, KindPlan(duplicate=1.0))
    assert set(label_C) == {"mixed"}
    assert set(by_kind(blank, label_C)[NAME].values()) == {0.0}


def test_a_latent_without_weights_is_no_duplicate():
    toy, table = toy_of("relu", False)
    silent = replace(toy.effective, decoder_LD=torch.zeros_like(toy.effective.decoder_LD))
    assert np.isnan(alike(table, {NAME: silent})).all()
    assert not (kinds(table, {NAME: silent}) == "split duplicate").any()


def test_what_is_missing_is_named():
    one = site("relu", False)
    chunks = [{"mlp_in.0": chunk(one, codes(9))}]
    bare = measure_pairs(lambda: chunks, PairPlan(contexts=ContextPlan(groups=4))).triplets
    with pytest.raises(UsageError, match=r"conjoint, saturating.*signatures\(chunks, triplets\)"):
        kinds(bare, {"mlp_in.0": one})
    with pytest.raises(UsageError, match=r"are of mlp_in\.0, which these tokens were not read at"):
        signatures([{"mlp_in.1": chunks[0]["mlp_in.0"]}], bare)
    with pytest.raises(UsageError, match="There are no tokens"):
        signatures([], bare)
    with pytest.raises(UsageError, match=r"whose weights were not given; given were those of a\."):
        kinds(signatures(chunks, bare), {"a": one})
    with pytest.raises(UsageError, match=r"one_way of kinds is a share that must be at least 0\.5"):
        KindPlan(one_way=0.3)
    with pytest.raises(UsageError, match="beyond of kinds must be above 0; found -1"):
        KindPlan(beyond=-1.0)


def test_a_saved_table_keeps_the_columns(tmp_path):
    from pyarrow import parquet

    table = measured([{"mlp_in.0": chunk(site("silu", True), codes(9))}])
    table.save(tmp_path / "pairs.parquet")
    found = parquet.read_table(tmp_path / "pairs.parquet").column_names
    assert set(SIGNATURE) <= set(found)


def hidden(one: Effective, row_D: torch.Tensor, scalar: float) -> torch.Tensor:
    """What the MLP's own matrices make of a row that the norm multiplies by a scalar."""
    norm, mlp = one.norm, one.mlp
    x_D = norm.centred(row_D) * scalar * norm.gain_D.double()
    if norm.bias_D is not None:
        x_D = x_D + norm.bias_D.double()

    def linear(W_ND, b_N):
        y_N = W_ND.double() @ x_D
        return y_N if b_N is None else y_N + b_N.double()

    value_N, act = linear(mlp.W_in_ND, mlp.b_in_N), activation(mlp.kind)
    if mlp.W_gate_ND is None:
        return act(value_N)
    return value_N * act(linear(mlp.W_gate_ND, mlp.b_gate_N))


@pytest.mark.parametrize("name", ["llama", "gpt2", "relu2"])
def test_in_a_model_the_columns_are_those_of_its_mlp_on_rows_without_the_latents(name):
    model, at = model_of(name), CASES[name]
    source = source_at(model, at)
    coder = coder_at(source.layout)
    one = effective(coder, model, at)
    table = measured(list(site_chunks(source, coder, model, {at: one})))
    given_RD = model.capture(tokens(), [one.input_site])[one.input_site].flatten(0, 1)
    z_RL = coder.encode(model.capture(tokens(), [at])[at].flatten(0, 1)).double()
    w_N = one.mlp.W_out_DN.double().norm(dim=0)
    true: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
    for row_D, z_L in zip(given_RD.double(), z_RL, strict=True):
        kept = float(one.norm.scalar(row_D))
        active = z_L.nonzero()[:, 0].tolist()
        for i, j in [(i, j) for i in active for j in active if i < j]:
            d_i, d_j = (z_L[k] * one.decoder_LD[k].double() for k in (i, j))
            rows = (row_D - d_i - d_j, row_D - d_j, row_D - d_i, row_D)
            frozen = [hidden(one, x_D, kept) for x_D in rows]
            full = [hidden(one, x_D, float(one.norm.scalar(x_D))) for x_D in rows]
            delta, whole = (h[3] - h[1] - h[2] + h[0] for h in (frozen, full))
            true[i, j].append(torch.stack([w_N @ (whole - delta).abs(), w_N @ delta.abs()]))
    assert len(true) == len(table) > 20
    for c, pair in enumerate(zip(table.i_C.tolist(), table.j_C.tolist(), strict=True)):
        mediated, strength = torch.stack(true[pair]).mean(0).tolist()
        assert table.strength_C[c] == pytest.approx(strength, rel=1e-3, abs=1e-4)
        found = table.measures["norm_mediated"][c]
        assert found == pytest.approx(mediated, rel=1e-3, abs=1e-4)
    assert (table.measures["norm_mediated"] > 0).all()


def head_columns(score_ij: np.ndarray, keys: int = 12, texts: int = 240) -> dict[str, np.ndarray]:
    """A head's pairs from loops: one latent per query, two per key, scores centred over keys."""
    generator, n, groups = np.random.default_rng(0), len(score_ij), 12
    sums, counts = np.zeros((3, n, n, groups)), np.zeros((n, n, groups), np.int64)
    for text in range(texts):
        i = text % n
        at = [generator.choice(n, 2, replace=False) for _ in range(keys)]
        strength = generator.uniform(0.5, 1.5, (keys, n))
        for j in range(n):
            part = np.array([strength[u, j] * score_ij[i, j] * (j in at[u]) for u in range(keys)])
            for centred in (part - part.mean())[[j in latents for latents in at]]:
                sums[:2, i, j, text % groups] += abs(centred), centred
                counts[i, j, text % groups] += 1
    count = torch.from_numpy(counts.reshape(n * n, groups))
    size, signed = (torch.from_numpy(x.reshape(n * n, groups)) for x in sums[:2])
    mean, low, high = (x.numpy() for x in mean_interval(signed, count))
    strength = mean_interval(size, count)[0].numpy()
    return {"signed": mean, "signed_low": low, "signed_high": high, "strength": strength}


def test_planted_binding_is_found_again():
    generator, n = np.random.default_rng(1), 10
    score_ij = -np.abs(generator.normal(size=(n, n)))  # the rest repel, more or less
    planted_ij = np.zeros((n, n), bool)
    planted_ij[np.arange(n), (np.arange(n) + 3) % n] = True
    score_ij[planted_ij] = 2.0
    label = binding(head_columns(score_ij)).reshape(n, n)
    hits = int(((label == "binding") & planted_ij).sum())
    assert hits / planted_ij.sum() >= 0.9
    assert hits / (label == "binding").sum() >= 0.9
    unknown = {"signed": [1.0], "signed_low": [np.nan], "strength": [1.0]}
    assert binding(unknown).tolist() == ["mixed"]
    wavering = {"signed": [0.4], "signed_low": [0.3], "strength": [1.0]}
    assert binding(wavering).tolist() == ["mixed"]

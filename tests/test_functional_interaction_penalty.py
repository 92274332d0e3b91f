"""The interaction penalties against loops, closed forms, and what scaling may and may not do."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.functional.gathers import Lists, starts_of
from crosslens.functional.interaction_penalty import (
    Active,
    Neurons,
    dominance,
    dominance_gap,
    interaction_share,
)

D, N, U = 5, 4, 6
KINDS = ("relu", "gelu", "gelu_tanh", "silu", "relu2")


def some_neurons(kind="relu", gated=False, seed=0) -> Neurons:
    generator = torch.Generator().manual_seed(seed)
    width = N * (1 + gated)
    return Neurons(
        kind=kind,
        through_DW=torch.randn(D, width, generator=generator, dtype=torch.float64),
        fixed_W=torch.randn(width, generator=generator, dtype=torch.float64),
        out_norm_N=torch.rand(N, generator=generator, dtype=torch.float64) + 0.1,
    )


def some_active(neurons: Neurons, counts=(3, 0, 1, 4), seed=1, always=0.5) -> Active:
    generator = torch.Generator().manual_seed(seed)
    index = [torch.randperm(U, generator=generator)[:n] for n in counts]
    width = len(neurons.fixed_W)
    return Active(
        decoder_UD=torch.randn(U, D, generator=generator, dtype=torch.float64),
        lists=Lists(starts_of(torch.tensor(counts)), torch.cat(index).int()),
        strength_E=torch.rand(sum(counts), generator=generator, dtype=torch.float64) + 0.1,
        always_TW=always
        * torch.randn(len(counts), width, generator=generator, dtype=torch.float64),
    )


def phi(kind: str, z: float) -> float:
    """The positively homogeneous part."""
    return max(z, 0.0) ** 2 if kind == "relu2" else max(z, 0.0)


def contributions(active: Active, neurons: Neurons) -> list[list[list[float]]]:
    """Of each token, of each of its latents, to each column, by loops."""
    starts = active.lists.starts_I.tolist()
    decoder, through = active.decoder_UD.tolist(), neurons.through_DW.tolist()
    found = []
    for first, last in pairwise(starts):
        token = []
        for e in range(first, last):
            row = decoder[int(active.lists.index_N[e])]
            a = float(active.strength_E[e])
            token.append([a * sum(row[d] * through[d][w] for d in range(D))
                          for w in range(len(through[0]))])  # fmt: skip
        found.append(token)
    return found


def share_by_loops(active: Active, neurons: Neurons) -> float:
    kind, gated, shares = neurons.kind, len(neurons.fixed_W) == 2 * N, []
    w, always = neurons.out_norm_N.tolist(), active.always_TW.tolist()
    for token, fixed in zip(contributions(active, neurons), always, strict=True):
        made = most = 0.0
        for n in range(N):
            parts = [(y[n], y[N + n] if gated else y[n]) for y in [*token, fixed]]
            u, g = (sum(each) for each in zip(*parts, strict=True))
            if gated:
                together, apart = u * phi(kind, g), sum(a * phi(kind, b) for a, b in parts)
            else:
                together, apart = phi(kind, g), sum(phi(kind, b) for _, b in parts)
            u, g = parts[-1]
            constant = u * phi(kind, g) if gated else phi(kind, g)
            together, apart = together - constant, apart - constant
            made += w[n] * abs(together - apart)
            most += w[n] * (abs(together) + abs(apart))
        shares.append(made / most if token else 0.0)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_share_is_the_loop(kind, gated):
    neurons = some_neurons(kind, gated)
    active = some_active(neurons)
    want = share_by_loops(active, neurons)
    assert want > 0.01
    assert float(interaction_share(active, neurons)) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("gated", [False, True])
def test_the_dominance_gap_is_the_loop(gated):
    neurons = some_neurons("silu", gated)
    active = some_active(neurons)
    gaps, largest = 0.0, []
    for token in contributions(active, neurons):
        for w in range(len(neurons.fixed_W)):
            sizes = [abs(y[w]) for y in token]
            gaps += sum(sizes) - max(sizes, default=0.0)
            largest += [max(sizes)] if sizes else []
    want = gaps / (4 * len(neurons.fixed_W))
    assert float(dominance_gap(active, neurons)) == pytest.approx(want, rel=1e-10)
    assert dominance(active, neurons)[1].flatten().tolist() == pytest.approx(largest)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [interaction_share, dominance_gap])
def test_gradients(function, kind, gated):
    neurons = some_neurons(kind, gated)
    active = some_active(neurons)

    def value(decoder_UD, strength_E):
        return function(replace(active, decoder_UD=decoder_UD, strength_E=strength_E), neurons)

    inputs = (active.decoder_UD.requires_grad_(), active.strength_E.requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)


def one_neuron(contributions: list[float], kind="relu", gates=None) -> tuple[Active, Neurons]:
    """A token whose latents contribute just that to one neuron."""
    columns = [contributions] if gates is None else [contributions, gates]
    n, width = len(contributions), len(columns)
    neurons = Neurons(
        kind=kind,
        through_DW=torch.eye(width, dtype=torch.float64),
        fixed_W=torch.zeros(width, dtype=torch.float64),
        out_norm_N=torch.ones(1, dtype=torch.float64),
    )
    active = Active(
        decoder_UD=torch.tensor(columns, dtype=torch.float64).T.contiguous(),
        lists=Lists(torch.tensor([0, n]), torch.arange(n).int()),
        strength_E=torch.ones(n, dtype=torch.float64),
        always_TW=torch.zeros(1, width, dtype=torch.float64),
    )
    return active, neurons


def test_two_latents_in_closed_form():
    """+3 and −1: min(P, Q) = 1 of 3 and 2. Of one sign: nothing, though the paper's form says 2."""
    assert float(interaction_share(*one_neuron([3.0, -1.0]))) == pytest.approx(1 / 5)
    assert float(interaction_share(*one_neuron([1.0, -3.0]))) == 1.0
    assert float(interaction_share(*one_neuron([3.0, 2.0]))) == 0.0
    assert float(dominance_gap(*one_neuron([3.0, 2.0]))) == 2.0
    # Squares: 3² + 2² against 5².
    assert float(interaction_share(*one_neuron([3.0, 2.0], "relu2"))) == pytest.approx(12 / 38)
    # (1 + 2)(3 + 4) against 1·3 + 2·4; a gate that the second closes: nothing against 1·3.
    found = interaction_share(*one_neuron([1.0, 2.0], "silu", [3.0, 4.0]))
    assert float(found) == pytest.approx(10 / 32)
    found = interaction_share(*one_neuron([1.0, 2.0], "silu", [3.0, -4.0]))
    assert float(found) == 1.0
    assert float(interaction_share(*one_neuron([1.0], "silu", [3.0]))) == 0.0


cases = st.tuples(
    st.sampled_from(KINDS), st.booleans(), st.integers(0, 50), st.floats(0.01, 50.0)
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(cases)
def test_smaller_norms_earn_nothing(case):
    """Neither the value nor the gradient knows the common scale of decoders or strengths."""
    kind, gated, seed, factor = case
    neurons = some_neurons(kind, gated, seed)
    active = some_active(neurons, seed=seed, always=0.0)
    decoder_UD = active.decoder_UD.requires_grad_()
    value = interaction_share(active, neurons)
    value.backward()
    decoder_UD.requires_grad_(False)
    value = float(value.detach())
    assert float((decoder_UD.grad * decoder_UD).sum()) == pytest.approx(0.0, abs=1e-9)
    for name in ("decoder_UD", "strength_E"):
        scaled = replace(active, **{name: factor * getattr(active, name)})
        assert float(interaction_share(scaled, neurons)) == pytest.approx(value, rel=1e-9)
        gap = dominance_gap(active, neurons)
        assert float(dominance_gap(scaled, neurons)) == pytest.approx(factor * float(gap))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.floats(-3.0, 3.0), st.floats(0.01, 1.0))
def test_beside_a_constant_part_smaller_norms_cost(seed, constant, factor):
    generator = torch.Generator().manual_seed(seed)
    active, neurons = one_neuron(torch.randn(4, generator=generator).tolist())
    active = replace(active, always_TW=torch.full((1, 1), constant, dtype=torch.float64))
    small = replace(active, strength_E=factor * active.strength_E)
    before, after = (float(interaction_share(each, neurons)) for each in (active, small))
    assert after >= before - 1e-9


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["relu", "relu2"])
def test_it_does_not_vanish_with_the_norms(kind, gated):
    neurons = some_neurons(kind, gated)
    active = some_active(neurons)
    small = replace(active, strength_E=1e-4 * active.strength_E)
    before, after = (float(interaction_share(each, neurons)) for each in (active, small))
    assert after > 0.8 * before


def test_contributions_to_shut_neurons_do_not_lower_it():
    """A second neuron that everything shuts: larger there, and still of no output."""
    active, neurons = one_neuron([3.0, -1.0])
    wide = replace(
        neurons,
        through_DW=torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64),
        fixed_W=torch.zeros(2, dtype=torch.float64),
        out_norm_N=torch.ones(2, dtype=torch.float64),
    )
    for size in (0.0, 1.0, 100.0):
        decoder_UD = torch.cat([active.decoder_UD, torch.full((2, 1), -size).double()], 1)
        always_TW = torch.zeros(1, 2, dtype=torch.float64)
        both = replace(active, decoder_UD=decoder_UD, always_TW=always_TW)
        assert float(interaction_share(both, wide)) == pytest.approx(1 / 5)


def test_the_share_lies_between_0_and_1():
    for seed in range(40):
        for kind in KINDS:
            for gated in (False, True):
                neurons = some_neurons(kind, gated, seed)
                share = interaction_share(some_active(neurons, seed=seed, always=3.0), neurons)
                assert 0 <= float(share) <= 1


@pytest.mark.parametrize("gated", [False, True])
def test_nobody_active_is_no_interaction(gated):
    neurons = some_neurons("silu", gated)
    active = replace(
        some_active(neurons),
        decoder_UD=torch.zeros(0, D, dtype=torch.float64),
        lists=Lists(torch.zeros(5, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)),
        strength_E=torch.zeros(0, dtype=torch.float64),
    )
    assert float(interaction_share(active, neurons)) == 0.0
    assert float(dominance_gap(active, neurons)) == 0.0


def test_products_in_a_short_format_are_near():
    neurons = some_neurons("silu", True)
    active = some_active(neurons)
    short = replace(neurons, through_DW=neurons.through_DW.bfloat16(), fixed_W=neurons.fixed_W)
    floats = [getattr(active, n).float() for n in ("decoder_UD", "strength_E", "always_TW")]
    active32 = Active(
        decoder_UD=floats[0], lists=active.lists, strength_E=floats[1], always_TW=floats[2]
    )
    short = replace(short, out_norm_N=neurons.out_norm_N.float(), fixed_W=neurons.fixed_W.float())
    want = float(interaction_share(active, neurons))
    assert float(interaction_share(active32, short)) == pytest.approx(want, rel=0.03)

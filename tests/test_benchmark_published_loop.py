"""What stands in for the published loop gives our dominance, once it adds what it overwrites."""

from __future__ import annotations

import pytest
import torch

from benchmarks import published_loop as benchmark
from crosslens.functional.interactions import beside_largest
from crosslens.interactions.pairs.contexts import (
    IN_CONTEXT,
    ContextPlan,
    Wanted,
    measure_in_context,
)
from crosslens.interactions.pairs.totals import meet
from tests.interactions_pairs_toy import L, chunk, codes, site

NAME = "mlp_in.0"


def ours(these) -> torch.Tensor:
    """Dominance of each latent over each, by the second pass over all pairs."""
    key_U = meet([{NAME: these}])[NAME].sums.key_U
    wanted = {NAME: Wanted(key_U, torch.ones(len(key_U)))}
    found = measure_in_context([{NAME: these}], wanted, ContextPlan())[NAME]
    i, j, total_CM = key_U // L, key_U % L, found.total_CGM.sum(1)
    matrix = torch.zeros(L, L, dtype=torch.float64)
    matrix[i, j] = total_CM[:, IN_CONTEXT.index("first_dominant")]
    matrix[j, i] = total_CM[:, IN_CONTEXT.index("second_dominant")]
    return matrix


def some_tokens(gated: bool):
    return chunk(site("silu" if gated else "relu", gated), codes(12))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("elements", [1, 1 << 28])
def test_summed_it_is_our_dominance(monkeypatch, gated, elements):
    monkeypatch.setattr(benchmark, "ELEMENTS", elements)  # one token at a time, and all together
    these = some_tokens(gated)
    found = benchmark.published_loop(benchmark.given(these, 12), summed=True)
    assert torch.allclose(found.double(), ours(these), rtol=1e-4, atol=1e-6)
    assert float(found.sum()) > 1


def test_summed_over_pairs_it_is_all_but_the_largest():
    these = some_tokens(False)
    given = benchmark.given(these, 12)
    y_TNK = torch.einsum("tl,ln->tnl", given.code_TL, given.E_LN)
    right = float((beside_largest(y_TNK) * given.w_N).sum())
    found = float(benchmark.published_loop(given, summed=True).sum())
    assert found == pytest.approx(right, rel=1e-5)


def test_as_published_it_keeps_one_neuron_of_each_pair_and_token():
    given = benchmark.given(some_tokens(False), 12)
    for code_L in given.code_TL:
        one = benchmark.Given(code_L[None], given.E_LN, given.w_N)
        kept, summed = (benchmark.published_loop(one, summed=s) for s in (False, True))
        size_LN = (given.E_LN * code_L[:, None]).abs()
        for i, j in kept.nonzero().tolist():
            led_N = size_LN.argmax(0) == i
            assert any(torch.isclose(kept[i, j], x) for x in (size_LN[j] * given.w_N)[led_N])
        assert bool((kept <= summed + 1e-6).all())
    whole = benchmark.published_loop(given, summed=True).sum()
    assert float(benchmark.published_loop(given).sum()) < 0.9 * float(whole)

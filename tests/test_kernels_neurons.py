"""The kernel of exact interactions against the definitions in float64, on lists and widths of all
sorts."""

from __future__ import annotations

import pytest
import torch

from crosslens.functional.interactions import Signed, activation, mass, outcome
from crosslens.kernels import build
from crosslens.kernels import neurons as kernel
from crosslens.kernels.neurons import GROUP, SUMS, Asked, Reaching
from crosslens.kernels.pairs import KINDS
from tests.kernel_forms import lists_of, seeded

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="no C compiler")

N_LATENTS = 37
COUNTS = [3, 0, 1, 14, 25, 2] * 24
"""More than two groups of rows."""
WIDTHS = [1, 17, 128, 300]
"""Less than a vector, no whole number of them, a block, some blocks and a rest."""


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def asked(kind: str, width: int, acting: Reaching) -> Asked:
    """Strengths of which some bring neurons nearer than `NEAR`, and some farther."""
    lists = lists_of(COUNTS, N_LATENTS)
    weight = torch.rand(len(lists.index_N), generator=seeded(1)) ** 3 + 0.01
    return Asked(
        kind=kind,
        lists=lists,
        weight_E=weight,
        reach_L=acting.E_LN.abs().amax(1),
        scalar_R=normal(len(COUNTS), seed=2).abs() + 0.1,
        through_R=normal(len(COUNTS), seed=3).abs(),
        w_N=normal(width, seed=4).abs() + 0.1,
    )


def reaching(width: int, seed: int) -> Reaching:
    return Reaching(
        E_LN=normal(N_LATENTS, width, seed=seed),
        moving_N=normal(width, seed=seed + 1),
        fixed_N=normal(width, seed=seed + 2),
        error_RN=normal(len(COUNTS), width, seed=seed + 3),
    )


def parts_of(it: Asked, one: Reaching, row: int) -> torch.Tensor:
    """What each latent, the biases and the error bring, in float64 [M, N]."""
    at = slice(*it.lists.starts_I[row : row + 2].tolist())
    latents = one.E_LN[it.lists.index_N[at].long()].double() * it.weight_E[at, None].double()
    always = it.scalar_R[row].double() * one.moving_N + one.fixed_N
    return torch.cat([latents, always[None], one.error_RN[row, None].double()])


def by_hand(it: Asked, value: Reaching, gate: Reaching | None, row: int) -> list[torch.Tensor]:
    """`SUMS` of one row [N]."""
    phi = activation(it.kind)
    branches = [value] + [gate] * (gate is not None)
    parts = [parts_of(it, one, row) for one in branches]

    def told(n: int):
        u, g = parts[0][:n], parts[-1][:n]
        apart = ((u if len(parts) == 2 else 1) * phi(g)).sum(0)
        sums = [Signed(y.sum(0), y.abs().sum(0)) for y in (u, g)]
        gates = sums[1] if len(parts) == 2 else None
        return outcome(it.kind, sums[0], gates, apart), mass(it.kind, sums[0], gates)

    (known, _), (full, most) = told(len(parts[0]) - 1), told(len(parts[0]))
    mediated, direct = torch.zeros_like(most), torch.zeros_like(most)
    for one, y in zip(branches, parts, strict=True):
        moving = y.clone()
        moving[-2] -= one.fixed_N
        mediated += it.through_R[row].double() * moving.sum(0).abs()
        direct += moving.abs().sum(0)
    return [
        full.interaction.abs(),
        most,
        full.whole.abs() + full.additive.abs(),
        (full.interaction - known.interaction).abs(),
        known.interaction.abs(),
        mediated,
        direct,
    ]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sum_is_the_definition(kind, gated, width, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    value, gate = reaching(width, 10), reaching(width, 20) if gated else None
    it = asked(kind, width, gate or value)
    found_SN, made_R, mass_R = kernel.interaction_sums(it, value, gate)
    rows = [by_hand(it, value, gate, row) for row in range(len(COUNTS))]
    assert len(COUNTS) > 2 * GROUP
    for name, found_N, each in zip(SUMS, found_SN, zip(*rows, strict=True), strict=True):
        expected_N = torch.stack(each).sum(0)
        scale = float(expected_N.abs().max())
        torch.testing.assert_close(found_N, expected_N, rtol=0, atol=1e-6 * scale, msg=name)
    w = it.w_N.double()
    for found_R, place in ((made_R, 0), (mass_R, 1)):
        expected_R = torch.stack([row[place] for row in rows]) @ w
        torch.testing.assert_close(found_R.double(), expected_R, rtol=2e-6, atol=2e-6 * width)


@pytest.mark.parametrize("most", [1.0, 12.0], ids=["near", "far"])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_a_latent_alone_gives_the_nonlinearity(kind, most):
    """Near 0 a polynomial stands for it. Beside nothing, |whole| + |apart| is that twice."""
    y = torch.linspace(-most, most, 801)
    nothing = torch.zeros(801)
    alone = Reaching(E_LN=y[None], moving_N=nothing, fixed_N=nothing, error_RN=nothing[None])
    one = torch.ones(1)
    it = Asked(
        kind=kind,
        lists=lists_of([1], 1),
        weight_E=one,
        reach_L=y.amax()[None],
        scalar_R=one,
        through_R=one,
        w_N=torch.ones(801),
    )
    found_N = kernel.interaction_sums(it, alone, None)[0][SUMS.index("output")]
    expected_N = 2 * activation(kind)(y.double()).abs()
    # GELU's distribution function is good to 1e-7, times what it multiplies.
    torch.testing.assert_close(found_N, expected_N, rtol=1e-6, atol=5e-7 if most > 1 else 1e-8)

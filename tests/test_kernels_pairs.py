"""The kernels of pairs against the equations in float64, on lists and widths of all sorts."""

from __future__ import annotations

import pytest
import torch

from crosslens.functional import pairs as F
from crosslens.kernels import build
from crosslens.kernels import pairs as kernel
from crosslens.kernels.pairs import KINDS, Brought, Inside, Listed, Met
from tests.kernel_forms import lists_of, seeded

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="no C compiler")

N_LATENTS, CONTEXTS = 37, 3
COUNTS = [3, 0, 1, 14, 25, 2]
WIDTHS = [1, 17, 512, 1100]
"""Less than a vector, no whole number of them, a tile, some tiles and a rest."""


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def listed(kind: str, width: int) -> Listed:
    lists = lists_of(COUNTS, N_LATENTS)
    weight = torch.rand(len(lists.index_N), generator=seeded(1)) + 0.1
    return Listed(kind, lists, weight, normal(width, seed=2).abs() + 0.1)


def branch(width: int, seed: int) -> Brought:
    rows = len(COUNTS)
    return Brought(
        normal(N_LATENTS, width, seed=seed),
        normal(rows, width, seed=seed + 1),
        normal(rows, width, seed=seed + 2),
    )


def brought(it: Listed, one: Brought, row: int) -> torch.Tensor:
    """By a row's members, in float64 [M, N]."""
    at = slice(*it.lists.starts_I[row : row + 2].tolist())
    latents = one.E_LN[it.lists.index_N[at].long()].double() * it.weight_E[at, None].double()
    return torch.cat([latents, one.always_RN[row, None], one.error_RN[row, None]])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_gating_is_the_equation(kind, width):
    it, gates, values = listed(kind, width), branch(width, 10), branch(width, 20)
    rows = torch.tensor([4, 0, 1, 3, 2])
    found, alone = kernel.gating(it, rows, gates, values)
    assert found.shape == (5, 27, 27)
    w = it.w_N.double()
    for place, row in enumerate(rows.tolist()):
        g, u = brought(it, gates, row), brought(it, values, row).abs()
        one_way = F.gating(kind, u[None], g[None], w)[0]
        n = COUNTS[row]
        members = [*range(n), 25, 26]  # after the padding, the always-on part and the error
        here = found[place][members][:, members].double()
        assert torch.allclose(here, one_way + one_way.T, rtol=1e-4, atol=2e-5 * float(w.sum()))
        assert not found[place, n:25].any()
        assert not found[place, :, n:25].any()
        right = float(u[:n].sum(0) * w @ g[:n].abs().sum(0))
        assert float(alone[place]) == pytest.approx(right, rel=1e-5)


def meetings(it: Listed) -> Met:
    """All pairs of rows 3 and 4."""
    pairs = [torch.triu_indices(COUNTS[row], COUNTS[row], 1) for row in (3, 4)]
    starts = [int(it.lists.starts_I[row]) for row in (3, 4)]
    first, second = torch.cat([p + s for p, s in zip(pairs, starts, strict=True)], 1)
    place = torch.tensor([3] * pairs[0].shape[1] + [4] * pairs[1].shape[1])
    return Met(place, place, first, second)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("width", WIDTHS[:2] + WIDTHS[3:])
@pytest.mark.parametrize("kind", KINDS)
def test_meetings_in_context_are_the_equations(kind, width, gated):
    it = listed(kind, width)
    met, w = meetings(it), it.w_N.double()
    gates, values = branch(width, 30), branch(width, 40)
    entries = normal(CONTEXTS, len(it.weight_E), seed=50) > 0
    inside = Inside(entries, normal(CONTEXTS, len(COUNTS), seed=51) > 0)
    found, compared = kernel.in_context(it, met, gates, values if gated else None, inside)

    def latents(one: Brought, entry: torch.Tensor) -> torch.Tensor:
        return one.E_LN[it.lists.index_N[entry].long()].double() * it.weight_E[entry, None]

    def drives(one: Brought, context: int) -> tuple[torch.Tensor, ...]:
        first, second = latents(one, met.first_Q), latents(one, met.second_Q)
        beside = []
        for row, i, j in zip(met.row_Q, met.first_Q, met.second_Q, strict=True):
            all_E = torch.arange(*it.lists.starts_I[row : row + 2].tolist())
            others = all_E[entries[context, all_E] & (all_E != i) & (all_E != j)]
            error = one.error_RN[row].double() * inside.error_CP[context, row]
            beside.append(latents(one, others).sum(0) + one.always_RN[row] + error)
        return torch.stack(beside), first, second

    for context in range(CONTEXTS):
        inner = drives(gates, context)
        if gated:
            pairs = zip(drives(values, context), inner, strict=True)
            parts = F.gated_mixed_difference(kind, *(F.Gated(*pair) for pair in pairs))
            delta, *ways = parts.total, parts.first_by_second, parts.second_by_first
        else:
            delta = F.mixed_difference(kind, *inner)
            ways = [torch.zeros_like(delta)] * 2
        right = torch.stack([delta.abs() @ w, delta @ w, *(way.abs() @ w for way in ways)], -1)
        assert torch.allclose(
            found[:, context].double(), right, rtol=1e-4, atol=2e-5 * float(w.sum())
        )
    first, second = latents(gates, met.first_Q).abs(), latents(gates, met.second_Q).abs()
    tables = [latents(gates, torch.arange(*it.lists.starts_I[r : r + 2].tolist())) for r in (3, 4)]
    largest = torch.stack([table.abs().amax(0) for table in tables])[met.row_Q - 3]
    reach = F.reach(first, second, w)
    right = [*F.dominance(first, second, largest, w), F.ratio(first, second, w) * w.sum(), reach]
    assert torch.allclose(compared.double(), torch.stack(right, -1), rtol=1e-4, atol=1e-6)


def test_threads_change_nothing():
    it, gates, values = listed("silu", 100), branch(100, 10), branch(100, 20)
    rows, threads = torch.arange(len(COUNTS)), torch.get_num_threads()
    entries = normal(CONTEXTS, len(it.weight_E), seed=50) > 0
    inside = Inside(entries, normal(CONTEXTS, len(COUNTS), seed=51) > 0)
    found = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(
                [
                    *kernel.gating(it, rows, gates, values),
                    *kernel.sharing(it, rows, values),
                    *kernel.in_context(it, meetings(it), gates, values, inside),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_torch_s_default_format_changes_nothing():
    it, values, rows = listed("gelu", 100), branch(100, 20), torch.arange(len(COUNTS))
    found = kernel.sharing(it, rows, values)
    try:
        torch.set_default_dtype(torch.float64)
        again = kernel.sharing(it, rows, values)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_other_formats_are_not_taken():
    assert kernel.takes(torch.zeros(2), torch.zeros(1))
    assert not kernel.takes(torch.zeros(2), torch.zeros(2).bfloat16())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_sharing_is_the_equations(kind, width):
    it, values = listed(kind, width), branch(width, 60)
    rows = torch.tensor([4, 0, 1, 3, 2, 5])
    found = kernel.sharing(it, rows, values)
    assert [t.shape for t in found] == [(6, 27, 27), (6, 27, 27), (6,)]
    w, size = it.w_N.double(), 2e-6 * float(it.w_N.sum())
    for place, row in enumerate(rows.tolist()):
        y, n = brought(it, values, row), COUNTS[row]
        members = [*range(n), 25, 26]  # after the padding, the always-on part and the error
        others = ~torch.eye(n + 2, dtype=torch.bool)
        right = [F.shared(kind, y[None], w)[0], F.coupling(kind, y[None], w)[0]]
        if kind == "relu2":
            above, below = y[:n].abs().sum(0), torch.relu(-y[:n]).sum(0)
            assert float(found[2][place]) == pytest.approx(
                float((above**2 - below**2) @ w), rel=1e-5
            )
            right[1] = torch.zeros_like(right[1])
        for matrix, expected in zip(found, right, strict=False):
            here = matrix[place][members][:, members].double()
            torch.testing.assert_close(here[others], expected[others], rtol=1e-5, atol=size)
            assert not matrix[place, n:25].any()
            assert not matrix[place, :, n:25].any()

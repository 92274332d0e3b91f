"""Small random sites and tokens for the tests of pairs, and loops that know the equations only."""

from __future__ import annotations

import math
from itertools import combinations

import torch

from crosslens.functional.gathers import Lists, starts_of
from crosslens.interactions.neurons.contributions import Branch, Effective, SiteChunk
from crosslens.lm.mlp import MLP

L, N, D = 8, 5, 4
SITES = [
    ("relu", False),
    ("gelu", False),
    ("relu2", False),
    ("silu", True),
    ("relu", True),
]


def phi(kind: str, x: float) -> float:
    match kind:
        case "relu":
            return max(x, 0.0)
        case "relu2":
            return max(x, 0.0) ** 2
        case "gelu":
            return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
        case "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            return 0.5 * x * (1 + math.tanh(inner))
    return x / (1 + math.exp(-x))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(kind: str, gated: bool, seed: int = 0, latents: int = L) -> Effective:
    def branch(seed: int) -> Branch:
        return Branch(
            E_LN=random(latents, N, seed=seed),
            moving_N=0.3 * random(N, seed=seed + 1),
            fixed_N=0.3 * random(N, seed=seed + 2),
            through_DN=0.5 * random(D, N, seed=seed + 3),
        )

    mlp = MLP(
        layer=0,
        kind=kind,
        W_in_ND=random(N, D, seed=1),
        b_in_N=None,
        W_gate_ND=random(N, D, seed=2) if gated else None,
        b_gate_N=None,
        W_out_DN=random(D, N, seed=3),
        b_out_D=None,
        norm=None,
    )
    return Effective(
        site="mlp_in.0",
        layer=0,
        mlp=mlp,
        norm=None,
        input_site="mlp_in.0",
        decoder_LD=random(latents, D, seed=4),
        bias_D=random(D, seed=5),
        value=branch(100 * seed + 10),
        gate=branch(100 * seed + 20) if gated else None,
        out_norm_N=random(N, seed=6).abs() + 0.1,
    )


def chunk(effective: Effective, codes: list[dict[int, float]], seed: int = 0) -> SiteChunk:
    """Tokens with these codes {latent: strength}, of one document for every two."""
    rows = len(codes)
    latents = [latent for code in codes for latent in sorted(code)]
    values = [code[latent] for code in codes for latent in sorted(code)]
    counts = torch.tensor([len(code) for code in codes])
    return SiteChunk(
        effective=effective,
        row_R=torch.arange(rows),
        document_R=torch.arange(rows) // 2,
        lists=Lists(starts_of(counts), torch.tensor(latents, dtype=torch.int32)),
        value_E=torch.tensor(values, dtype=torch.float32),
        scalar_R=random(rows, seed=seed + 50).abs() + 0.5,
        input_RD=random(rows, D, seed=seed + 51),
        missed_RD=random(rows, D, seed=seed + 52),
    )


def codes(rows: int, seed: int = 0, latents: int = L) -> list[dict[int, float]]:
    """Random ones; the first two have no latent and one."""
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[int, float]] = [{}, {3: 0.7}]
    for row in range(rows - 2):
        chosen = torch.randperm(latents, generator=generator)[: 2 + row % 3].tolist()
        strength = torch.rand(len(chosen), generator=generator).add(0.2).tolist()
        found.append(dict(zip(chosen, strength, strict=True)))
    return found


def contributions(these: SiteChunk, row: int, branch: Branch) -> dict[int | str, list[float]]:
    """What each member of a row contributes to each neuron: latents, `always`, `error`."""
    scalar = float(these.scalar_R[row])
    start, stop = these.lists.starts_I[row : row + 2].tolist()
    found: dict[int | str, list[float]] = {}
    for e in range(start, stop):
        latent, a = int(these.lists.index_N[e]), float(these.value_E[e])
        found[latent] = [a * scalar * float(x) for x in branch.E_LN[latent]]
    moving, fixed, through = branch.moving_N, branch.fixed_N, branch.through_DN
    found["always"] = [scalar * float(m) + float(f) for m, f in zip(moving, fixed, strict=True)]
    missed = these.missed_RD[row]
    found["error"] = [
        scalar * sum(float(missed[d]) * float(through[d, n]) for d in range(D)) for n in range(N)
    ]
    return found


def both(these: SiteChunk, row: int):
    """Contributions to what φ acts on, and to the value that a gate multiplies (or None)."""
    one = these.effective
    if one.gate is None:
        return contributions(these, row, one.value), None
    return contributions(these, row, one.gate), contributions(these, row, one.value)


def latents_of(these: SiteChunk, row: int) -> list[int]:
    start, stop = these.lists.starts_I[row : row + 2].tolist()
    return these.lists.index_N[start:stop].tolist()


def output(kind: str, inner, value, inside, n: int) -> float:
    """The neuron's output when these members are in."""
    h = phi(kind, sum(inner[m][n] for m in inside))
    return h if value is None else h * sum(value[m][n] for m in inside)


def mixed(kind: str, inner, value, context, i, j, n: int) -> float:
    """Δ_ij of neuron n, the members of `context` being in."""

    def h(*more):
        return output(kind, inner, value, [*context, *more], n)

    return h(i, j) - h(i) - h(j) + h()


def shapley(kind: str, inner, value, others, i, j, n: int) -> float:
    """The Shapley interaction index: over all coalitions of the others, besides `always`."""
    m, total = len(others), 0.0
    for size in range(m + 1):
        weight = math.factorial(size) * math.factorial(m - size) / math.factorial(m + 1)
        for subset in combinations(others, size):
            total += weight * mixed(kind, inner, value, ["always", *subset], i, j, n)
    return total

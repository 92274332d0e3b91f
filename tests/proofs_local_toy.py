"""Random MLPs with codes, and the loops that layer-local bounds must not fall below."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from crosslens.proofs.lemmas.neurons import KINDS
from crosslens.proofs.local_certificate import NORMS
from crosslens.proofs.local_gather import Gathered

SHAPES = [
    ("silu", True, "rms"),
    ("silu", True, "none"),
    ("gelu_tanh", True, "rms"),
    ("gelu", True, "layer"),
    ("relu", True, "layer"),
    ("relu", False, "rms"),
    ("relu", False, "none"),
    ("gelu", False, "layer"),
    ("gelu_tanh", False, "rms"),
    ("silu", False, "none"),
]
"""Nonlinearity, gated, norm."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    rows: int = 7
    active: int = 4
    latents: int = 6
    width: int = 5
    neurons: int = 9


def toy(
    kind: str, gated: bool, norm: str, seed: int = 0, sizes: Sizes | None = None
) -> tuple[Tensors, Tensors, torch.Tensor]:
    """Weights, coder and rows x, float64 but exact in float32."""
    n = sizes or Sizes()
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).float().double()

    D, N = n.width, n.neurons
    form = [float(KINDS.index(kind)), float(NORMS.index(norm)), 1e-5 if norm != "none" else 0.0]
    weights = {
        "gate": normal(D, N),
        "out": normal(N, D),
        "gain": normal(D) if norm != "none" else torch.ones(D).double(),
        "shift": normal(D, scale=0.3) if norm == "layer" else torch.zeros(D).double(),
        "b_gate": normal(N, scale=0.3),
        "b_out": normal(D),
        "form": torch.tensor(form, dtype=torch.float64),
    }
    if gated:
        weights |= {"value": normal(D, N), "b_value": normal(N, scale=0.3)}
    strength = normal(n.rows, n.active).abs()
    strength[::3, -1] = 0.0
    coder = {
        "decoder": normal(n.latents, D),
        "bias": normal(D, scale=0.5),
        "index": torch.randint(n.latents, (n.rows, n.active), generator=generator),
        "strength": strength,
        "affine": normal(3, N, scale=0.5),
    }
    return weights, coder, normal(n.rows, D, scale=1.5)


def gathered(weights: Tensors, coder: Tensors, x: torch.Tensor, site: str = "s") -> Gathered:
    return Gathered(
        site=site,
        layer=1,
        kind=KINDS[int(weights["form"][0])],
        gated="value" in weights,
        weights=weights,
        coder={name: tensor for name, tensor in coder.items() if name != "affine"},
        x_RD=x,
        token_R=torch.arange(len(x)),
    )


def phi(kind: str) -> Callable[[float], float]:
    """φ of one number."""
    root = math.sqrt(2 / math.pi)
    known: dict[str, Callable[[float], float]] = {
        "relu": lambda z: max(z, 0.0),
        "gelu": lambda z: z * 0.5 * math.erfc(-z / math.sqrt(2)),
        "gelu_tanh": lambda z: 0.5 * z * (1 + math.tanh(root * (z + 0.044715 * z**3))),
        "silu": lambda z: z / (1 + math.exp(-z)),
    }
    return known[kind]


def norm_of(weights: Tensors, row: list[float]) -> tuple[list[float], float]:
    """The row as the norm's scalar multiplies it, and the scalar."""
    norm, floor = NORMS[int(weights["form"][1])], float(weights["form"][2])
    if norm == "none":
        return row, 1.0
    mean = sum(row) / len(row) if norm == "layer" else 0.0
    row = [value - mean for value in row]
    return row, 1 / math.sqrt(sum(value * value for value in row) / len(row) + floor)


def brought(
    weights: Tensors, row: list[float], scalar: float, constant: bool
) -> list[tuple[float, float]]:
    """(gate, value) that a row brings to every neuron, 1 as the value where there is no gate."""
    centred, _ = norm_of(weights, row)
    gain, shift = weights["gain"].tolist(), weights["shift"].tolist()
    row = [
        c * scalar * g + (s if constant else 0.0)
        for c, g, s in zip(centred, gain, shift, strict=True)
    ]
    found = []
    for n in range(weights["gate"].shape[1]):
        gate = sum(r * float(w) for r, w in zip(row, weights["gate"][:, n], strict=True))
        gate += float(weights["b_gate"][n]) if constant else 0.0
        value = 1.0
        if "value" in weights:
            value = sum(r * float(w) for r, w in zip(row, weights["value"][:, n], strict=True))
            value += float(weights["b_value"][n]) if constant else 0.0
        found.append((gate, value))
    return found


def loops(weights: Tensors, coder: Tensors, x: torch.Tensor, row: int) -> dict[str, float]:
    """Every true error of one row, by loops over latents and neurons."""
    kind = KINDS[int(weights["form"][0])]
    f, D = phi(kind), x.shape[1]
    active = [
        [float(a) * float(v) for v in coder["decoder"][int(i)]]
        for i, a in zip(coder["index"][row], coder["strength"][row], strict=True)
    ]
    bias = coder["bias"].tolist()
    decoded = [sum(column) for column in zip(bias, *active, strict=True)]
    _, scalar = norm_of(weights, decoded)
    parts = [brought(weights, each, scalar, constant=False) for each in active]
    parts.append(brought(weights, bias, scalar, constant=True))
    own = x[row].tolist()
    at_x = brought(weights, own, norm_of(weights, own)[1], constant=True)
    gated = "value" in weights
    hidden = {name: [] for name in ("whole", "x", *SURROGATES)}
    for n in range(weights["gate"].shape[1]):
        pairs = [part[n] for part in parts]
        gate = sum(g for g, _ in pairs)
        value = sum(u for _, u in pairs) if gated else 1.0
        hidden["whole"].append(value * f(gate))
        hidden["x"].append(at_x[n][1] * f(at_x[n][0]))
        for name in SURROGATES:
            hidden[name].append(surrogate(name, pairs, f, gated, coder["affine"][:, n].tolist()))
    told = {name: _written(weights, hidden["whole"], hidden[name]) for name in SURROGATES}
    told |= {f"whole {name}": _written(weights, hidden["x"], hidden[name]) for name in SURROGATES}
    told["transition"] = _written(weights, hidden["x"], hidden["whole"])
    told["coder"] = math.dist(own, decoded[:D])
    return told


SURROGATES = ("additive", "given bias", "linear", "dominance", "nothing")


def surrogate(
    name: str,
    pairs: list[tuple[float, float]],
    f: Callable[[float], float],
    gated: bool,
    affine: list[float],
) -> float:
    """One neuron's surrogate; the last pair is the biases'."""
    g0, u0 = pairs[-1]
    match name:
        case "additive":
            return sum((u if gated else 1.0) * f(g) for g, u in pairs)
        case "given bias":
            start = u0 * f(g0)
            both = [((u0 + u) if gated else 1.0) * f(g0 + g) for g, u in pairs[:-1]]
            return start + sum(each - start for each in both)
        case "linear":
            c, p, q = affine
            value = sum(u for _, u in pairs) if gated else 0.0
            return c + p * value + q * sum(g for g, _ in pairs)
        case "dominance":
            g, u = max(pairs, key=lambda pair: abs(pair[0] * (pair[1] if gated else 1.0)))
            return (u if gated else 1.0) * f(g)
    return 0.0


def _written(weights: Tensors, one: list[float], other: list[float]) -> float:
    """‖W_outᵀ (one − other)‖."""
    error = torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    return float((error @ weights["out"]).norm())

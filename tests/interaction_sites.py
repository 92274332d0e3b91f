"""Tiny models, coders and token blocks for interactions, and the loops that these must equal."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import torch
import transformers as hf

from crosslens.activations import Source, TokenPolicy
from crosslens.coder import Coder, Crosscoder, Layout, TopK, transpose_init
from crosslens.interactions.neurons.effective import Effective
from crosslens.lm.model import LanguageModel
from crosslens.text import Blocks
from tests.test_functional_interactions import phi
from tests.test_lm_families import _COMMON, _GROUPED, tiny, tokens, wrapped

LATENTS, ACTIVE = 24, 5
CASES = {
    "llama": "resid_mid.1",
    "gemma2": "mlp_in.1",
    "gpt2": "resid_mid.1",
    "neox-parallel": "resid_pre.1",
    "olmo": "resid_pre.1",
    "olmo2": "resid_post.0",
    "relu": "resid_mid.1",
    "relu2": "resid_mid.1",
    "gated-relu": "resid_mid.1",
    "gated-relu2": "resid_mid.1",
}
"""Model → the site at which it is measured: every kind of MLP, norm and place."""


@cache
def model_of(name: str) -> LanguageModel:
    """A family's tiny model, or one with another nonlinearity."""
    if name in ("relu", "relu2"):
        config = hf.GPTNeoXConfig(**_COMMON, hidden_act=name, use_parallel_residual=False)
    elif name.startswith("gated"):
        config = hf.LlamaConfig(**_GROUPED, hidden_act=name.removeprefix("gated-"), mlp_bias=True)
    else:
        return tiny(name)
    torch.manual_seed(7)
    module = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return wrapped(module.requires_grad_(False))


def blocks() -> Blocks:
    """Two blocks of nine tokens; a document and a half, and one without a document."""
    docs = torch.zeros(2, 9, dtype=torch.int32)
    docs[0, 6:], docs[1], docs[1, 8] = 1, 1, -1
    return Blocks(tokens(), docs, ("a", "b"), bos_id=None, pad_id=0, special_ids=(0,))


def source_at(model: LanguageModel, *sites: str, per_chunk: int = 2) -> Source:
    layout = Layout(sites, tuple(model.width(site) for site in sites))
    policy = TokenPolicy(drop_padding=False)
    return Source({model.name: model}, layout, blocks(), policy, blocks_per_chunk=per_chunk)


def coder_at(layout: Layout, activation=None) -> Coder:
    """Random, with scales and biases that matter."""
    coder = Coder(Crosscoder()(layout, LATENTS), activation or TopK(k=ACTIVE))
    transpose_init(coder, 1.0, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        coder.b_dec.normal_(generator=generator).mul_(0.3)
        coder.b_enc.normal_(generator=generator).mul_(0.1)
        coder.scale_read.copy_(torch.linspace(0.5, 1.5, len(layout.sites)))
        coder.scale_write.copy_(torch.linspace(0.5, 1.5, len(layout.sites)))
    return coder.eval().requires_grad_(False)


@dataclass(frozen=True)
class Part:
    """One contribution: what it is in the row (None where it is in none), and to each branch."""

    row: torch.Tensor | None
    branches: tuple[list[float], ...]


def parts_of(model: LanguageModel, coder: Coder, one: Effective, row: int) -> list[Part]:
    """The contributions on one token in float64: latents, biases (last but one), error (last)."""
    seen = {site: x.flatten(0, 1)[row] for site, x in model.capture(tokens(), ["*"]).items()}
    read = torch.cat([seen[site] for site in coder.wiring.read.sites])
    z_L = coder.encode(read[None])[0].double()
    at, scale = coder.wiring.write.slice(one.site), coder.scale_write
    scale = scale[coder.wiring.write.index(one.site)].double()
    decoder = coder.W_dec[0][:, at].double() / scale
    bias = coder.b_dec[at].double() / scale
    given = seen[one.input_site].double()
    rows = [float(z_L[i]) * decoder[i] for i in range(LATENTS) if z_L[i] > 0]
    error = given - sum(rows, torch.zeros_like(given)) - bias
    return [Part(each, through(one, given, each)) for each in rows] + [
        Part(bias, through(one, given, bias, fixed=True)),
        Part(error, through(one, given, error)),
    ]


def through(
    one: Effective, given: torch.Tensor, part: torch.Tensor, fixed: bool = False
) -> tuple[list[float], ...]:
    """A part of the row through the norm and each matrix; the constants with it if asked."""
    norm, constant = one.norm, torch.zeros_like(part)
    if norm is not None:
        mean = 1.0 if norm.kind == "layer" else 0.0
        centred = given - mean * given.mean()
        scalar = 1 / ((centred**2).mean() + norm.eps) ** 0.5
        part = (part - mean * part.mean()) * scalar * norm.gain_D.double()
        if norm.bias_D is not None:
            constant = norm.bias_D.double()
    found = []
    for weight, bias in ((one.mlp.W_in_ND, one.mlp.b_in_N), (one.mlp.W_gate_ND, one.mlp.b_gate_N)):
        if weight is None:
            continue
        y = weight.double() @ (part + constant if fixed else part)
        found.append((y + bias.double() if fixed and bias is not None else y).tolist())
    return tuple(found)


def shares_of_square(one: Effective, given: torch.Tensor, parts: list[Part]) -> list[float]:
    """ρ of every part: its share in the row's mean square, times what eps leaves of it."""
    if one.norm is None:
        return [0.0] * len(parts)
    if one.norm.kind == "layer":
        given = given - given.mean()
    square = float((given**2).mean()) + one.norm.eps
    return [float(given @ part.row) / len(given) / square for part in parts]


def neuron(kind: str, inputs: list[tuple[float, ...]]) -> tuple[float, float, float]:
    """(whole, additive, mass) of one neuron, given each contribution's numbers."""
    power = 2 if kind == "relu2" else 1
    totals = [sum(column) for column in zip(*inputs, strict=True)]
    sizes = [sum(map(abs, column)) for column in zip(*inputs, strict=True)]
    if len(totals) == 1:
        return phi(kind, totals[0]), sum(phi(kind, y) for (y,) in inputs), sizes[0] ** power
    whole = totals[0] * phi(kind, totals[1])
    return whole, sum(u * phi(kind, g) for u, g in inputs), sizes[0] * sizes[1] ** power


def loops(model: LanguageModel, coder: Coder, one: Effective) -> dict[str, torch.Tensor]:
    """Every sum per neuron, and `tokens`: interaction and mass per token. Nothing is batched."""
    kind, n_neurons = one.mlp.kind, len(one.out_norm_N)
    sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(n_neurons, dtype=torch.float64))
    per_token = []
    norms = (one.mlp.W_out_DN.double() ** 2).sum(0) ** 0.5
    for row in range(tokens().numel()):
        parts = parts_of(model, coder, one, row)
        given = model.capture(tokens(), [one.input_site])[one.input_site].flatten(0, 1)[row]
        rho = sum(map(abs, shares_of_square(one, given.double(), parts)))
        moving = parts[:-2] + [Part(p.row, through(one, given.double(), p.row)) for p in parts[-2:]]
        token = [0.0, 0.0]
        for n in range(n_neurons):
            w = float(norms[n])
            inputs = [tuple(branch[n] for branch in part.branches) for part in parts]
            whole, additive, mass = neuron(kind, inputs)
            whole_less, additive_less, _ = neuron(kind, inputs[:-1])
            between, less = whole - additive, whole_less - additive_less
            sums["interaction"][n] += w * abs(between)
            sums["mass"][n] += w * mass
            sums["output"][n] += w * (abs(whole) + abs(additive))
            sums["of_error"][n] += w * abs(between - less)
            sums["without_error"][n] += w * abs(less)
            for branch in range(len(inputs[0])):
                each = [part.branches[branch][n] for part in moving]
                sums["mediated"][n] += w * rho * abs(sum(each))
                sums["direct"][n] += w * sum(map(abs, each))
            token = [token[0] + w * abs(between), token[1] + w * mass]
        per_token.append(token)
    return {**sums, "tokens": torch.tensor(per_token, dtype=torch.float64)}

"""A layer's MLP as matrices, and the norm before it.

No table of architectures: which modules the MLP's input goes into, and which gives its output, is
seen in a short pass. What they do is read off what they make of unit vectors, so that transposed,
fused and adapted layers need no care. Then the matrices are put to the test: on random input they
must give what the module gives, or the module is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosslens.errors import UsageError
from crosslens.functional.interactions import KINDS, Kind, activation
from crosslens.lm.anatomy import probe
from crosslens.lm.model import LanguageModel, refuse_not_finite
from crosslens.lm.sites import split_site
from crosslens.lm.trace import Call, calls_of, upstream, watch

_EXACT = 1e-5
"""Relative difference that rounding in float32 explains, of one elementwise step."""
_CLOSE = 1e-4
"""The same of two products with thousands of summands, taken in another order."""
_ROWS = 32
_AXES = 512
"""Unit vectors that go through a module at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """x → gain · (x − mean?) / √(mean square + eps) + bias; the mean is taken off by `layer`."""

    kind: Literal["rms", "layer"]
    gain_D: Float[Tensor, " d"]
    bias_D: Float[Tensor, " d"] | None
    eps: float

    def centred(self, x_RD: Float[Tensor, "*r d"]) -> Float[Tensor, "*r d"]:
        """Rows as the scalar multiplies them: for `layer` without their mean."""
        return x_RD - x_RD.mean(-1, keepdim=True) if self.kind == "layer" else x_RD

    def scalar(self, x_RD: Float[Tensor, "*r d"]) -> Float[Tensor, "*r"]:
        """1 / √(mean square + eps) of each (centred) row."""
        return (self.centred(x_RD).square().mean(-1) + self.eps).rsqrt()

    def __call__(self, x_RD: Float[Tensor, "*r d"]) -> Float[Tensor, "*r d"]:
        """Normalised rows."""
        y_RD = self.centred(x_RD) * self.scalar(x_RD)[..., None] * self.gain_D
        return y_RD if self.bias_D is None else y_RD + self.bias_D


@dataclass(frozen=True, kw_only=True, eq=False)
class MLP:
    """x → W_out (φ(W_in x + b_in)) + b_out; where gated, W_out (φ(W_gate x + b_gate) ⊙ (W_in x +
    b_in)) + b_out. Matrices are float32, on the model's device.

    A norm that follows the MLP (Gemma, OLMo 2) is not part of it.
    """

    layer: int
    kind: Kind
    """φ. Where the MLP is gated it acts on the gate."""
    W_in_ND: Float[Tensor, "n d"]
    b_in_N: Float[Tensor, " n"] | None
    W_gate_ND: Float[Tensor, "n d"] | None
    b_gate_N: Float[Tensor, " n"] | None
    W_out_DN: Float[Tensor, "d n"]
    b_out_D: Float[Tensor, " d"] | None
    norm: Norm | None
    """What gives the MLP its input; None where it reads the residual stream as it is."""

    def __call__(self, x_RD: Float[Tensor, "*r d"]) -> Float[Tensor, "*r d"]:
        """The MLP's output for normalised rows."""
        linear = nn.functional.linear
        hidden_RN = linear(x_RD, self.W_in_ND, self.b_in_N)
        phi = activation(self.kind)
        if self.W_gate_ND is None:
            hidden_RN = phi(hidden_RN)
        else:
            hidden_RN = hidden_RN * phi(linear(x_RD, self.W_gate_ND, self.b_gate_N))
        return linear(hidden_RN, self.W_out_DN, self.b_out_D)


@torch.no_grad()
def mlp_of(model: LanguageModel, layer: int) -> MLP:
    """The MLP of layer `layer`, from 0, and the norm before it.

    Raises:
        UsageError: there is no such layer, or its MLP or norm is of no supported kind.
        CrosslensError: its weights are not finite.
    """
    if not 0 <= layer < model.n_layers:
        raise UsageError(
            f"Model {model.name!r} has no layer {layer}: it has {model.n_layers}, numbered 0 to "
            f"{model.n_layers - 1}."
        )
    taps = model.anatomy.taps
    module = taps[f"mlp_in.{layer}"].module
    down = taps.get(f"mlp_act.{layer}")
    names = [name for name, child in module.named_children() if down and child is down.module]
    if not names:
        raise _unsupported(model, layer, module, "it does not end in one down projection")
    refuse_not_finite(model, module, f"MLP of layer {layer}")
    copied = copy.deepcopy(module).float()
    width = model.anatomy.widths[f"mlp_in.{layer}"]
    found = _matrices(copied, copied.get_submodule(names[0]), width)
    if isinstance(found, str):
        raise _unsupported(model, layer, module, found)
    kind, maps = found
    mlp = MLP(
        layer=layer,
        kind=kind,
        W_in_ND=maps[0].weight,
        b_in_N=maps[0].bias,
        W_gate_ND=None if len(maps) < 3 else maps[1].weight,
        b_gate_N=None if len(maps) < 3 else maps[1].bias,
        W_out_DN=maps[-1].weight,
        b_out_D=maps[-1].bias,
        norm=_norm_before(model, layer, module),
    )
    _verify(mlp, copied, model, module)
    return mlp


@dataclass(frozen=True)
class _Affine:
    """x → weight x + bias."""

    weight: Tensor
    bias: Tensor | None

    def rows(self, at: slice) -> _Affine:
        bias = None if self.bias is None else self.bias[at].contiguous()
        return _Affine(self.weight[at].contiguous(), bias)


def _matrices(
    mlp: nn.Module, down: nn.Module, width: int
) -> tuple[Kind, tuple[_Affine, ...]] | str:
    """φ; and value, gate (if there is one) and output. Or why there are none."""
    x_BD = _random(mlp, width)
    first = [call for call in _calls(mlp, x_BD) if call.input is x_BD]
    if not first:
        return "none of its parts takes its input as it is"
    spread = torch.cat([call.output for call in first], -1).std().clamp_min(1e-6)
    # Where φ bends, and far beyond, where clipped forms of it differ.
    x_BD = torch.cat([x_BD, 10 * x_BD], 1) * (2 / spread)
    calls = _calls(mlp, x_BD)
    ends = calls_of([down], calls)
    if len(ends) != 1:
        return "its down projection does not see all positions at once"
    first = [call for call in calls if call.input is x_BD]
    pre_BW = torch.cat([call.output for call in first], -1)
    known = _recognised(pre_BW, ends[0].input)
    if known is None:
        return f"what it does between its matrices is none of {', '.join(KINDS)}, gated or not"
    kind, columns = known
    parts = [_affine(call.module, width) for call in first]
    into = _Affine(torch.cat([part.weight for part in parts]), _together(parts))
    n_neurons = ends[0].input.shape[-1]
    return kind, (*(into.rows(at) for at in columns), _affine(down, n_neurons))


def _calls(mlp: nn.Module, x_BD: Tensor) -> list[Call]:
    """What the MLP's own parts took and gave."""
    parts = [part for part in mlp.children() if not isinstance(part, nn.Dropout | nn.Identity)]
    return watch(parts, lambda: mlp(x_BD))


def _random(module: nn.Module, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    device = next(module.parameters()).device
    return torch.randn(1, _ROWS, width, generator=generator).to(device)


def _recognised(pre_BW: Tensor, hidden_BN: Tensor) -> tuple[Kind, tuple[slice, ...]] | None:
    """Which φ, and which columns of what goes into it are the value and (if any) the gate."""
    n, width = hidden_BN.shape[-1], pre_BW.shape[-1]
    halves = slice(0, n), slice(n, 2 * n)
    orders: dict[int, Sequence[tuple[slice, ...]]] = {
        n: [(slice(0, n),)],
        2 * n: [halves, halves[::-1]],
    }
    tried = [(kind, order) for kind in KINDS for order in orders.get(width, ())]
    wrong = [_misfit(pre_BW, hidden_BN, kind, order) for kind, order in tried]
    if not wrong or not min(wrong) <= 1:  # NaN fits nothing
        return None
    return tried[wrong.index(min(wrong))]


def _misfit(pre_BW: Tensor, hidden_BN: Tensor, kind: Kind, columns: Sequence[slice]) -> float:
    """The largest error, in multiples of what rounding explains."""
    value, phi = pre_BW[..., columns[0]], activation(kind)
    if len(columns) == 1:
        guess, factor = phi(value), torch.ones_like(value)
    else:
        guess, factor = value * phi(pre_BW[..., columns[1]]), value
    slack = _EXACT * (1 + hidden_BN.abs() + factor.abs())
    return float(((guess - hidden_BN).abs() / slack).max())


def _affine(module: nn.Module, width: int) -> _Affine:
    """What an affine module is: read where torch's own, else seen from its response to each axis,
    whatever holds its weights (transposed, or with an adapter beside them)."""
    if type(module) is nn.Linear:
        bias = module.bias
        return _Affine(module.weight.detach(), None if bias is None else bias.detach())
    device = next(module.parameters()).device
    bias_N: Tensor = module(torch.zeros(1, 1, width, device=device))[0, 0]
    rows = []
    for start in range(0, width, _AXES):
        axes = torch.arange(start, min(start + _AXES, width), device=device)
        unit_BD = nn.functional.one_hot(axes, width).float()
        rows.append(module(unit_BD[None])[0] - bias_N)
    return _Affine(torch.cat(rows).T.contiguous(), bias_N if bool(bias_N.any()) else None)


def _together(parts: Sequence[_Affine]) -> Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    blank = [part.weight.new_zeros(len(part.weight)) for part in parts]
    return torch.cat([b if p.bias is None else p.bias for p, b in zip(parts, blank, strict=True)])


def _verify(mlp: MLP, copied: nn.Module, model: LanguageModel, module: nn.Module) -> None:
    width = mlp.W_in_ND.shape[1]
    for scale in (1.0, 10.0):
        x_BD = scale * _random(copied, width, seed=1)
        if not _equal(mlp(x_BD), copied(x_BD)):
            what = "its matrices alone do not give what it gives"
            raise _unsupported(model, mlp.layer, module, what)


def _equal(found: Tensor, expected: Tensor) -> bool:
    """But for rounding, relative to the largest; NaN is not equal."""
    return bool((found - expected).abs().max() <= _CLOSE * expected.abs().max())


def _norm_before(model: LanguageModel, layer: int, mlp: nn.Module) -> Norm | None:
    """What stands between the residual stream and the MLP."""
    parts = list(model.anatomy.layers[layer].children())
    parts = [part for part in parts if not isinstance(part, nn.Dropout | nn.Identity)]
    calls = watch(parts, lambda: probe(model.anatomy.decoder))
    into = calls_of([mlp], calls)[0]
    makers = [call for call in calls if call.output is into.input and call is not into]
    if not makers:
        return None
    norm = copy.deepcopy(makers[0].module).float()
    found = norm_of(norm, into.input.shape[-1]) if upstream(into, calls) is makers[0] else None
    if found is None:
        name = type(makers[0].module).__name__
        raise UsageError(
            f"In layer {layer} of {model.name!r}, {name} stands before the MLP, which is neither "
            "RMSNorm nor LayerNorm, so the MLP's interactions cannot be told."
        )
    return found


def reading_layer(model: LanguageModel, site: str) -> int | None:
    """Which layer's MLP reads a site, at once or after attention; None where none does."""
    kind, _, number = split_site(site)[1].partition(".")
    if kind in ("mlp_in", "resid_mid", "resid_pre"):
        return int(number)
    if kind == "resid_post" and int(number) + 1 < model.n_layers:
        return int(number) + 1
    return None


def folded(
    norm: Norm | None, W_ND: Float[Tensor, "n d"], b_N: Float[Tensor, " n"] | None
) -> tuple[Float[Tensor, "d n"], Float[Tensor, " n"]]:
    """y ↦ W y + b of normalised rows as x ↦ scalar(x) · (x @ through) + fixed of the rows given to
    the norm: gain, bias and centring are linear maps and go into `through` and `fixed`."""
    W_DN = W_ND.T
    fixed_N = W_DN.new_zeros(W_DN.shape[1]) if b_N is None else b_N.to(W_DN.device)
    if norm is not None:
        if norm.bias_D is not None:
            fixed_N = fixed_N + norm.bias_D.to(W_DN.device) @ W_DN
        W_DN = norm.gain_D.to(W_DN.device)[:, None] * W_DN
        if norm.kind == "layer":
            W_DN = W_DN - W_DN.mean(0)
    return W_DN, fixed_N


def norm_of(module: nn.Module, width: int) -> Norm | None:
    """An RMSNorm or LayerNorm, from what it makes of rows, with any number of parameters."""
    device = next(module.parameters(), torch.empty(0)).device
    x_BD = torch.randn(_ROWS, width, generator=torch.Generator().manual_seed(0)).to(device) + 1
    zero_D: Tensor = module(torch.zeros(1, 1, width, device=device))[0, 0]
    bias_D = zero_D if bool(zero_D.any()) else None
    for kind in ("rms", "layer"):
        norm = _fitted(lambda x: module(x[None])[0] - zero_D, kind, x_BD, bias_D)
        fresh_BD = 3 * x_BD.flip(-1) - 1
        if norm is not None and _equal(norm(fresh_BD), module(fresh_BD[None])[0]):
            return norm
    return None


def _fitted(
    apply: Callable[[Tensor], Tensor],
    kind: Literal["rms", "layer"],
    x_BD: Tensor,
    bias_D: Tensor | None,
) -> Norm | None:
    """The norm of this kind that treats rows of mean square 1 as `apply` does.

    A row 1/1000 as long comes out q times as long squared, q = v (1 + eps) / (v + eps) for v =
    10⁻⁶, which tells eps.
    """
    blank = Norm(kind=kind, gain_D=torch.ones_like(x_BD[0]), bias_D=None, eps=0.0)
    unit_BD, v = blank(x_BD), 1e-6
    large_BD, small_BD = apply(unit_BD), apply(unit_BD * v**0.5)
    q = float(small_BD.double().square().sum() / large_BD.double().square().sum())
    if not v < q <= 1 + _EXACT:
        return None
    eps = max(0.0, v * (1 - q) / (q - v))
    gain_D = (large_BD * unit_BD).sum(0) / unit_BD.square().sum(0) * (1 + eps) ** 0.5
    return Norm(kind=kind, gain_D=gain_D, bias_D=bias_D, eps=eps)


def _unsupported(model: LanguageModel, layer: int, module: nn.Module, why: str) -> UsageError:
    return UsageError(
        f"The MLP of layer {layer} of {model.name!r} ({type(module).__name__}) is of no kind whose "
        f"interactions can be told: {why}."
    )

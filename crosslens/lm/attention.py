"""A layer's attention as matrices, one per head, and the norm before it.

No table of architectures: matrices are read off what the module makes of unit vectors
(`attention_alone`), so that fused, transposed and adapted layers need no care, and how positions
turn queries and keys off the model's own frequencies. Then all is put to the test: on random input
it must give what the module gives, or the module is refused.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosslens.errors import UsageError
from crosslens.lm.anatomy import probe
from crosslens.lm.attention_alone import Alone, Seen, alone
from crosslens.lm.mlp import Norm, norm_of
from crosslens.lm.model import LanguageModel, refuse_not_finite
from crosslens.lm.trace import calls_of, upstream, watch

_CLOSE = 1e-5
"""Difference, relative to the largest number, that rounding cosines to float32 explains."""
_POSITIONS = 3
_OWN_WAY = "it weighs keys in a way of its own"


def turned(
    x_A: Float[Tensor, "*r a"], cos_F: Float[Tensor, "*s f"], sin_F: Float[Tensor, "*s f"]
) -> Float[Tensor, "*o a"]:
    """Coordinates f and F + f of each vector turned by an angle, for each f; the rest as it is.

    ⟨turned(x, t), turned(z, u)⟩ = ⟨turned(x, t − u), z⟩: the rotary positions of Su et al. 2021
    (2104.09864), in the layout of Llama and GPT-NeoX. Leading axes are broadcast.
    """
    n = cos_F.shape[-1]
    first, second, rest = x_A[..., :n], x_A[..., n : 2 * n], x_A[..., 2 * n :]
    both = [first * cos_F - second * sin_F, second * cos_F + first * sin_F]
    return torch.cat([*both, rest.expand(*both[0].shape[:-1], rest.shape[-1])], -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class SelfAttention:
    """Head h at query t weighs keys u ≤ t by softmax over u of the score

        scale · ⟨turned(W_Q x_t + b_Q, t), turned(W_K x_u + b_K, u)⟩

    and adds W_O Σ_u weight (W_V x_u + b_V) to the residual stream. Matrices are float32, on the
    model's device.
    """

    layer: int
    W_Q_HAD: Float[Tensor, "h a d"]
    b_Q_HA: Float[Tensor, "h a"]
    W_K_JAD: Float[Tensor, "j a d"]
    """J ≤ H: each run of H/J heads shares the keys and values of one group (grouped queries)."""
    b_K_JA: Float[Tensor, "j a"]
    W_V_JVD: Float[Tensor, "j v d"]
    b_V_JV: Float[Tensor, "j v"]
    W_O_HDV: Float[Tensor, "h d v"]
    b_O_D: Float[Tensor, " d"]
    scale: float
    turn_F: Float[Tensor, " f"]
    """Radians per position, float64; none where positions do not turn queries and keys."""
    window: int | None
    """A query reaches so many positions back, its own among them; None: all."""
    norm: Norm | None
    """What gives attention its input; None where it reads the residual stream as it is."""

    @property
    def n_heads(self) -> int:
        """Heads of queries."""
        return len(self.W_Q_HAD)

    @property
    def n_groups(self) -> int:
        """Heads of keys and values."""
        return len(self.W_K_JAD)

    @property
    def share(self) -> int:
        """How many heads use the keys and values of one group."""
        return self.n_heads // self.n_groups

    def rotation(self, distance_R: Int[Tensor, " r"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `turned` [R, F], float32, of positions or differences of them."""
        angle_RF = distance_R.to(self.turn_F)[:, None] * self.turn_F
        return angle_RF.cos().float(), angle_RF.sin().float()

    def scores(
        self, query_QHA: Float[Tensor, "q h a"], key_RJA: Float[Tensor, "r j a"]
    ) -> Float[Tensor, "h q r"]:
        """Of queries and keys that are turned already."""
        n_queries, n_heads, width = query_QHA.shape
        query = query_QHA.reshape(n_queries, self.n_groups, self.share, width).permute(1, 2, 0, 3)
        scores = query.flatten(1, 2) @ key_RJA.permute(1, 2, 0)
        return self.scale * scores.reshape(n_heads, n_queries, len(key_RJA))

    def queries(self, x_TD: Float[Tensor, "t d"]) -> Float[Tensor, "t h a"]:
        """Queries of a block's normalised rows, turned by their positions."""
        return self._turned(torch.einsum("td,had->tha", x_TD, self.W_Q_HAD) + self.b_Q_HA)

    def keys(self, x_TD: Float[Tensor, "t d"]) -> Float[Tensor, "t j a"]:
        """Keys likewise."""
        return self._turned(torch.einsum("td,jad->tja", x_TD, self.W_K_JAD) + self.b_K_JA)

    def _turned(self, x_THA: Tensor) -> Tensor:
        cos_TF, sin_TF = self.rotation(torch.arange(len(x_THA), device=x_THA.device))
        return turned(x_THA, cos_TF[:, None], sin_TF[:, None])

    def weights(self, x_TD: Float[Tensor, "t d"]) -> Float[Tensor, "h t t"]:
        """How a block's queries weigh its keys, given its normalised rows."""
        at_T = torch.arange(len(x_TD), device=x_TD.device)
        back_TT = at_T[:, None] - at_T
        reached_TT = (back_TT >= 0) & (back_TT < (self.window or len(x_TD)))
        scores_HTT = self.scores(self.queries(x_TD), self.keys(x_TD))
        return scores_HTT.masked_fill(~reached_TT, -torch.inf).softmax(-1)

    def __call__(self, x_TD: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
        """What attention adds to a block's residual stream, given its normalised rows."""
        value_TJV = torch.einsum("td,jvd->tjv", x_TD, self.W_V_JVD) + self.b_V_JV
        value_THV = value_TJV.repeat_interleave(self.share, 1)
        mixed_THV = torch.einsum("htu,uhv->thv", self.weights(x_TD), value_THV)
        return torch.einsum("thv,hdv->td", mixed_THV, self.W_O_HDV) + self.b_O_D


@torch.no_grad()
def attention_of(model: LanguageModel, layer: int) -> SelfAttention:
    """The attention of layer `layer`, from 0, and the norm before it.

    Raises:
        UsageError: there is no such layer, or its attention or norm is of no supported kind.
        CrosslensError: its weights are not finite.
    """
    if not 0 <= layer < model.n_layers:
        raise UsageError(
            f"Model {model.name!r} has no layer {layer}: it has {model.n_layers}, numbered 0 to "
            f"{model.n_layers - 1}."
        )
    module = model.anatomy.taps[f"attn_in.{layer}"].module
    refuse_not_finite(model, module, f"attention of layer {layer}")
    found = _read(model, layer)
    if isinstance(found, str):
        name = type(module).__name__
        raise UsageError(
            f"The attention of layer {layer} of {model.name!r} ({name}) is of no kind whose "
            f"interactions can be told: {found}. Those of MLPs still can."
        )
    return found


def _read(model: LanguageModel, layer: int) -> SelfAttention | str:
    """The matrices, once they have passed the test, or why there are none."""
    taps, width = model.anatomy.taps, model.anatomy.widths[f"attn_in.{layer}"]
    found, norm = alone(model, layer), _norm_before(model, layer)
    if isinstance(found, str) or isinstance(norm, str):
        return found if isinstance(found, str) else str(norm)
    first = found.seen(torch.zeros(1, 1, width, dtype=torch.float64, device=model.device))
    if first is None:
        return _OWN_WAY
    if (why := _refused(first)) is not None:
        return why
    if taps[f"attn_out.{layer}"].module is not taps[f"attn_in.{layer}"].module:
        return "a norm stands between it and the residual stream"
    attention = _assembled(found, first, norm, layer, width)
    if not _passes(attention, found):
        return (
            "its queries, keys and values are not linear in its input but for a turn by their "
            "positions (they may be normed)"
        )
    return attention


def _assembled(
    module: Alone, first: Seen, norm: Norm | None, layer: int, width: int
) -> SelfAttention:
    query, key, value = (module.heads(name, width) for name in ("query", "key", "value"))
    W_O_HDV, b_O_D = module.output(first.query.shape[1], first.value.shape[-1], width)
    return SelfAttention(
        layer=layer,
        W_Q_HAD=query[0],
        b_Q_HA=query[1],
        W_K_JAD=key[0],
        b_K_JA=key[1],
        W_V_JVD=value[0],
        b_V_JV=value[1],
        W_O_HDV=W_O_HDV,
        b_O_D=b_O_D,
        scale=first.scale,
        turn_F=module.turn_F,
        window=first.settings.get("sliding_window"),
        norm=norm,
    )


def _refused(seen: Seen) -> str | None:
    """What of the weighing itself is not a softmax of plain scores."""
    if seen.settings.get("softcap") is not None:
        return "it caps its scores"
    if seen.settings.get("s_aux") is not None:
        return "some of its weight goes to no key"
    return None


def _passes(attention: SelfAttention, module: Alone) -> bool:
    """Whether the matrices give the queries, keys and output that the module gives."""
    matrices: dict[str, Any] = {
        name: value.double() for name, value in vars(attention).items() if isinstance(value, Tensor)
    }
    wide = replace(attention, **matrices)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(_POSITIONS, wide.W_Q_HAD.shape[-1], generator=generator).to(wide.W_Q_HAD)
    seen = module.seen(x_TD[None])
    if seen is None:
        return False

    def weigh(seen: Seen) -> Tensor:
        value_HTV = seen.value[0].repeat_interleave(wide.share, 0)
        return (wide.weights(x_TD) @ value_HTV).transpose(0, 1)[None]

    pairs = (
        (wide.queries(x_TD), seen.query[0].transpose(0, 1)),
        (wide.keys(x_TD), seen.key[0].transpose(0, 1)),
        (wide(x_TD), module(x_TD[None], weigh)[0]),
    )
    return all(
        bool((found - expected).abs().max() <= _CLOSE * expected.abs().max())
        for found, expected in pairs
    )


def _norm_before(model: LanguageModel, layer: int) -> Norm | str | None:
    """What stands between the residual stream and attention, or why that cannot be told."""
    module = model.anatomy.taps[f"attn_in.{layer}"].module
    parts = list(model.anatomy.layers[layer].children())
    parts = [part for part in parts if not isinstance(part, nn.Dropout | nn.Identity)]
    calls = watch(parts, lambda: probe(model.anatomy.decoder))
    into = calls_of([module], calls)[0]
    makers = [call for call in calls if call.output is into.input and call is not into]
    if not makers:
        return None
    norm = copy.deepcopy(makers[0].module).float()
    found = norm_of(norm, into.input.shape[-1]) if upstream(into, calls) is makers[0] else None
    name = type(makers[0].module).__name__
    return found or f"{name} stands before it, which is neither RMSNorm nor LayerNorm"

"""An attention module on its own: what it makes of any input, up to the weighing and after it.

transformers lets one replace the function that weighs keys. With one that only looks, a module's
queries, keys and values are seen; with one that answers as it is told, its output projection is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crosslens.lm.anatomy import probe
from crosslens.lm.model import LanguageModel
from crosslens.lm.taps import first_output

_NAME = "crosslens"
"""Of the function that stands in for the model's own."""
_AXES = 512
"""Unit vectors that go through a module at once."""
_GROWING = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies change with the length of the text."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What comes to the function that weighs keys: [B, heads, T, width] each, turned already."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    settings: Mapping[str, Any]
    """What else it is told: `sliding_window`, `softcap`, …"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Alone:
    """An attention module in float64."""

    module: nn.Module
    given: dict[str, Any]
    """What the model gives it beside the hidden states."""
    turn_F: Tensor
    """Radians per position, float64; empty where the model gives it no rotary positions."""
    size: float
    """What its cosines and sines are multiplied by."""

    def __call__(self, x_BTD: Tensor, weigh: Callable[[Seen], Tensor]) -> Tensor:
        """What it returns [B, T, D], with `weigh` giving each head's mean value [B, T, H, V]."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def stand_in(
            module: Any, query: Any, key: Any, value: Any, *_: Any, scaling: Any = None, **rest: Any
        ) -> tuple[Tensor, None]:
            scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            return weigh(Seen(query, key, value, scale, rest)), None

        given = self.given | {"hidden_states": x_BTD}
        at_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        if "position_ids" in given:
            given["position_ids"] = at_T[None]
        if len(self.turn_F):
            angle_TF = at_T[:, None] * self.turn_F
            angle_TF = torch.cat([angle_TF, angle_TF], -1)[None]
            given["position_embeddings"] = (angle_TF.cos() * self.size, angle_TF.sin() * self.size)
        ALL_ATTENTION_FUNCTIONS[_NAME] = stand_in
        try:
            out: Tensor = first_output(self.module(**given))
        finally:
            del ALL_ATTENTION_FUNCTIONS[_NAME]
        return out

    def seen(self, x_BTD: Tensor) -> Seen | None:
        """Queries, keys and values of its input; None where it weighs keys in its own way."""
        found: list[Seen] = []

        def weigh(seen: Seen) -> Tensor:
            found.append(seen)
            n_heads, width = seen.query.shape[1], seen.value.shape[-1]
            return seen.value.new_zeros(*x_BTD.shape[:2], n_heads, width)

        self(x_BTD, weigh)
        return found[0] if len(found) == 1 else None

    def heads(self, name: str, width: int) -> tuple[Tensor, Tensor]:
        """Each head's matrix [heads, A, D] and bias [heads, A] for `query`, `key` or `value`, as it
        is at position 0, where nothing is turned."""
        shape: list[int] = []

        def apply(x_BD: Tensor) -> Tensor:
            seen = self.seen(x_BD[:, None])
            assert seen is not None
            found_BHA: Tensor = vars(seen)[name][:, :, 0]
            shape[:] = found_BHA.shape[1:]
            return found_BHA.flatten(1)

        weight, bias = _affine(width, next(self.module.parameters()), apply)
        return weight.view(*shape, width), bias.view(*shape)

    def output(self, heads: int, value_width: int, width: int) -> tuple[Tensor, Tensor]:
        """What it makes of each head's mean value: [H, D, V], and the bias [D]."""

        def apply(mixed_BN: Tensor) -> Tensor:
            blank = mixed_BN.new_zeros(len(mixed_BN), 1, width)
            return self(blank, lambda _: mixed_BN.view(-1, 1, heads, value_width))[:, 0]

        weight, bias = _affine(heads * value_width, next(self.module.parameters()), apply)
        return weight.view(width, heads, value_width).permute(1, 0, 2).contiguous(), bias


def alone(model: LanguageModel, layer: int) -> Alone | str:
    """The attention module of a layer, or why it cannot be read."""
    module = model.anatomy.taps[f"attn_in.{layer}"].module
    if not hasattr(module, "config"):
        return "it weighs keys in a way of its own"
    given = _given(model, module)
    positions = given.get("position_embeddings")
    found: tuple[Tensor, float] | str = torch.zeros(0, device=model.device).double(), 1.0
    if positions is not None:
        found = _turns(model, positions)
    if isinstance(found, str):
        return found
    copied: Any = copy.deepcopy(module).double()
    copied.config._attn_implementation = _NAME
    return Alone(module=copied, given=given, turn_F=found[0], size=found[1])


def _given(model: LanguageModel, module: nn.Module) -> dict[str, Any]:
    """What the model gives the module in a short pass, by name, without a mask."""
    seen: list[dict[str, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        names = inspect.signature(module.forward).parameters
        seen.append(dict(zip(names, args, strict=False)) | kwargs)

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            probe(model.anatomy.decoder)
    finally:
        handle.remove()
    return seen[0] | {"attention_mask": None}


def _turns(model: LanguageModel, positions: Any) -> tuple[Tensor, float] | str:
    """Radians per position, and the factor: those of the model's frequencies that give the cosines
    it was seen to use. These may be rounded to the model's format; frequencies are not."""
    config: Any = model.module.config
    kind = (getattr(config.get_text_config(), "rope_parameters", None) or {}).get("rope_type")
    if kind in _GROWING:
        return f"its rotary positions ({kind}) change with the length of the text"
    if not isinstance(positions, tuple):
        return "its positions are not given as cosines and sines"
    cos_TR = positions[0][0].double()
    size, slack = float(cos_TR[0, 0]), 4 * torch.finfo(positions[0].dtype).eps
    at_T = torch.arange(len(cos_TR), device=cos_TR.device)
    for name, buffer in model.anatomy.decoder.named_buffers():
        if not name.endswith("inv_freq") or 2 * len(buffer) != cos_TR.shape[1]:
            continue
        angle_TF = at_T[:, None] * buffer.double()
        expected_TR = size * torch.cat([angle_TF, angle_TF], -1).cos()
        if bool(((expected_TR - cos_TR).abs() <= slack * (1 + size)).all()):
            return buffer.double(), size
    return "how it turns queries and keys by their positions is not known"


def _affine(n: int, like: Tensor, apply: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """x → A x + b as its responses to the axes: A [outputs, n] and b, float32."""
    constant = apply(like.new_zeros(1, n))[0]
    parts = []
    for start in range(0, n, _AXES):
        axes = torch.arange(start, min(start + _AXES, n), device=like.device)
        parts.append((apply(nn.functional.one_hot(axes, n).to(like)) - constant).float())
    return torch.cat(parts).T.contiguous(), constant.float()

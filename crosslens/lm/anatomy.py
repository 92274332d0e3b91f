"""Find where a model's activations can be tapped, by watching a short forward pass.

No table of architectures: which module is attention, which is the MLP, where the residual stream
runs between them and which norm comes after them, all follow from which tensor each module was
given and which it returned. A second pass, which rewrites activations through the taps that were
found, checks that the layer's sums come out as claimed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crosslens.errors import CrosslensError
from crosslens.lm.sites import LAYER_KINDS, aliases
from crosslens.lm.taps import Tap, Visit, visiting
from crosslens.lm.trace import Call, calls_of, downstream, upstream, watch

_PASS_THROUGH = (nn.Dropout, nn.Identity)  # in eval mode they return the tensor they were given
_PROBE_TOKENS = 3


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a causal language model.

    `decoder` computes everything but the logits, by its `layers` one after another. `taps` holds
    every site but `logits`, in order of depth; `widths` the last dimension of every site; `aliases`
    other names of the sites.
    """

    decoder: nn.Module
    layers: tuple[nn.Module, ...]
    taps: dict[str, Tap]
    widths: dict[str, int]
    aliases: dict[str, str]

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)


def find_anatomy(model: Any) -> Anatomy:
    """The anatomy of a Hugging Face causal language model.

    Raises:
        CrosslensError: the model is not a stack of layers that each add the output of one attention
            and one MLP to a residual stream.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None:
        raise CrosslensError(f"{name} has no output over a vocabulary: it is not a language model.")
    decoder = model.get_decoder()
    layers = _find_layers(decoder, name)
    calls = watch(_interesting(decoder, layers), lambda: probe(decoder))
    taps = {"embed": Tap(model.get_input_embeddings(), "output")}
    for index, layer in enumerate(layers):
        taps |= _layer_taps(index, layer, calls, name)
    taps["final"] = Tap(_final_norm(decoder, layers, calls, name), "output")
    widths = _verified_widths(decoder, taps, len(layers), name) | {"logits": len(head.weight)}
    names = aliases(len(layers)) | _module_paths(model, taps)
    return Anatomy(decoder, tuple(layers), taps, widths, names)


def _find_layers(decoder: nn.Module, name: str) -> Sequence[nn.Module]:
    """The longest list of modules that each hold an attention module."""
    lists = [list(module) for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    stacks = [layers for layers in lists if layers and all(map(_has_attention, layers))]
    if not stacks:
        raise CrosslensError(
            f"The layers of {name} were not found: it has no list of modules that each contain an "
            "attention module. crosslens reads decoder-only transformers (Llama, Mistral, Qwen, "
            "Gemma, GPT-2, GPT-NeoX, OLMo, Phi and models built like them)."
        )
    return max(stacks, key=len)


def _has_attention(layer: nn.Module) -> bool:
    return any(_takes_mask(child) for child in layer.children())


def _takes_mask(module: nn.Module) -> bool:
    return "attention_mask" in inspect.signature(module.forward).parameters


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _interesting(decoder: nn.Module, layers: Sequence[nn.Module]) -> set[nn.Module]:
    found = {*decoder.children(), *layers}
    for layer in layers:
        for child in layer.children():
            found |= {child, *child.children()}
    return {module for module in found if not isinstance(module, _PASS_THROUGH)}


def probe(decoder: nn.Module) -> None:
    """A pass over a few tokens."""
    device = next(decoder.parameters()).device
    decoder(input_ids=torch.arange(_PROBE_TOKENS, device=device)[None], use_cache=False)


def _layer_taps(index: int, layer: nn.Module, calls: Sequence[Call], name: str) -> dict[str, Tap]:
    """The taps of one layer.

    What attention (the MLP) adds to the residual is its own output or, where a norm follows, that
    norm's. The residual between the two is what the norm before the MLP was given (without such a
    norm, the MLP itself), unless that is the layer's own input: then both work in parallel.
    """
    inner = calls_of(layer.children(), calls)
    attention = [call for call in inner if _takes_mask(call.module)]
    mlp = [call for call in inner if _has_matrix(call.module) and call not in attention]
    if len(attention) != 1 or len(mlp) != 1:
        children = ", ".join(child for child, _ in layer.named_children())
        raise CrosslensError(
            f"Layer {index} of {name} is not one attention and one MLP (it is made of: "
            f"{children}), so its sites cannot be told apart."
        )
    taps = {
        "resid_pre": Tap(layer, "input"),
        "attn_in": Tap(attention[0].module, "input"),
        "attn_out": Tap(downstream(attention[0], inner).module, "output"),
        "mlp_in": Tap(mlp[0].module, "input"),
        "mlp_out": Tap(downstream(mlp[0], inner).module, "output"),
        "resid_post": Tap(layer, "output"),
    }
    before_mlp = upstream(mlp[0], inner)
    if before_mlp.input is not calls_of([layer], calls)[0].input:
        taps["resid_mid"] = Tap(before_mlp.module, "residual")
    down = _down_projection(mlp[0], calls)
    if down is not None:
        taps["mlp_act"] = Tap(down, "input")
    return {f"{kind}.{index}": taps[kind] for kind in LAYER_KINDS if kind in taps}


def _down_projection(mlp: Call, calls: Sequence[Call]) -> nn.Module | None:
    """The module whose output is the MLP's, if there is one that sees all positions."""
    for call in calls_of(mlp.module.children(), calls):
        if call.output is mlp.output and call.input.ndim == mlp.input.ndim:
            return call.module
    return None


def _final_norm(
    decoder: nn.Module, layers: Sequence[nn.Module], calls: Sequence[Call], name: str
) -> nn.Module:
    last = calls_of([layers[-1]], calls)[0]
    after = downstream(last, calls_of(decoder.children(), calls))
    if after is last:
        raise CrosslensError(f"No norm was found after the last layer of {name}.")
    return after.module


def _verified_widths(
    decoder: nn.Module, taps: dict[str, Tap], n_layers: int, name: str
) -> dict[str, int]:
    """Rewrite every summand through its tap, and see each layer's sums come out accordingly."""
    seen: dict[str, Tensor] = {}  # as each activation was after rewriting
    mids: dict[str, Tensor] = {}  # as it was before

    def rewrite(site: str) -> Visit:
        def visit(old: Tensor) -> Tensor | None:
            new = old.clone()
            if site.startswith(("attn_out", "mlp_out")):
                new.mul_(0.75)
            if site.startswith("resid_mid"):
                mids[site] = old.clone()
                new.mul_(1.25)
            seen[site] = new.clone()
            return new

        return visit

    with torch.no_grad(), visiting((tap, rewrite(site)) for site, tap in taps.items()):
        probe(decoder)
    for layer in range(n_layers):
        if not all(_sums_to(total, *parts) for total, parts in _sums(layer, seen, mids)):
            raise CrosslensError(
                f"Layer {layer} of {name} does not simply add its attention and its MLP to the "
                "residual stream (it may scale or mix them), so the sites of this model would not "
                "mean what they say. crosslens cannot read this architecture."
            )
    return {site: x.shape[-1] for site, x in seen.items()}


def _sums(
    layer: int, seen: dict[str, Tensor], mids: dict[str, Tensor]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    pre, attn, mlp, post = (
        seen[f"{kind}.{layer}"] for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    )
    mid = f"resid_mid.{layer}"
    if mid not in mids:
        yield post, [pre, attn, mlp]
    else:
        yield mids[mid], [pre, attn]
        yield post, [seen[mid], mlp]


def _sums_to(total: Tensor, *parts: Tensor) -> bool:
    """Equal but for rounding in the order of summation; what overflowed says nothing."""
    exact = sum(part.double() for part in parts)
    slack = 4 * torch.finfo(total.dtype).eps * sum(part.double().abs() for part in parts)
    wrong = (total.double() - exact).abs() > slack
    return not bool(wrong.any())


def _module_paths(model: nn.Module, taps: dict[str, Tap]) -> dict[str, str]:
    """`model.layers.3` -> `resid_post.3` and so on: modules whose output is a site."""
    outputs = {tap.module: site for site, tap in taps.items() if tap.side == "output"}
    return {path: outputs[module] for path, module in model.named_modules() if module in outputs}

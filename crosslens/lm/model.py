"""A language model under study: read its activations, or run it with some of them replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import sites as naming
from crosslens.lm.anatomy import Anatomy
from crosslens.lm.midway import can_start_midway, starting_at
from crosslens.lm.spec import ModelSpec
from crosslens.lm.taps import Visit, visiting
from crosslens.lm.tokenizer import tokenizer_hash


class _EverythingSeen(Exception):
    """The deepest site has been captured; what follows need not be computed."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model with the places where its activations can be read and replaced.

    `module` is the Hugging Face model, in eval mode, its parameters frozen. Token blocks are always
    full: no attention mask is used.
    """

    name: str
    spec: ModelSpec
    module: nn.Module
    tokenizer: Any
    anatomy: Anatomy
    revision: str | None = None
    """The commit a hub model resolved to, or `sha256:…` of a `.gguf` file."""

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.anatomy.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.anatomy.widths["resid_pre.0"]

    @property
    def device(self) -> torch.device:
        """Where the model computes, and where what it returns lies."""
        return next(self.module.parameters()).device

    @property
    def max_positions(self) -> int | None:
        """The longest block the model takes, in tokens; None if it sets no limit."""
        config: Any = self.module.config
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def sites(self) -> tuple[str, ...]:
        """Every site this model has, in order of computation."""
        return (*self.anatomy.taps, "logits")

    def resolve(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """Canonical names of the sites meant, in order of depth, without duplicates.

        Args:
            patterns: names or globs: `resid_mid.3`, `resid_post.*`, TransformerLens's
                `blocks.3.hook_resid_post`, Hugging Face's `hidden_states.4`, or the path of a
                module whose output is a site, `model.layers.3`.

        Raises:
            UsageError: a pattern that matches nothing; the message says why and lists near ones.
        """
        return naming.resolve(patterns, self.sites(), self.anatomy.aliases, self.n_layers)

    def width(self, site: str) -> int:
        """Size of the last dimension of the activation at `site`."""
        return self.anatomy.widths[self._one(site)]

    def read(
        self,
        tokens_BT: Integer[Tensor, "b t"],
        visits: Mapping[str, Callable[[Tensor], None]],
    ) -> None:
        """Show the activation at each named site to its function, as one forward pass computes it.

        The pass goes no deeper than it must; logits are computed only if `logits` is asked for.

        Args:
            tokens_BT: token ids, of any integer type, on any device.
            visits: site -> function of `[B, T, width]`, in the model's dtype, on its device. It
                sees the model's own tensor: what it keeps it must copy.
        """
        named = {self._one(site): visit for site, visit in visits.items()}
        at_logits = named.pop("logits", None)
        left = set(named)

        def seeing(site: str) -> Visit:
            def visit(x_BTD: Tensor) -> None:
                named[site](x_BTD)
                left.discard(site)
                if not left and at_logits is None:
                    raise _EverythingSeen

            return visit

        ordered = [site for site in self.anatomy.taps if site in named]
        taps = [(self.anatomy.taps[site], seeing(site)) for site in ordered]
        with torch.no_grad(), visiting(taps), suppress(_EverythingSeen):
            if at_logits is None:
                self._forward(self.anatomy.decoder, tokens_BT)
            else:
                at_logits(self._forward(self.module, tokens_BT).logits)

    def capture(self, tokens_BT: Integer[Tensor, "b t"], sites: Sequence[str]) -> dict[str, Tensor]:
        """The activations at `sites`, from one forward pass that goes no deeper than it must.

        Args:
            tokens_BT: token ids, of any integer type, on any device.
            sites: whatever `resolve` takes.

        Returns:
            Canonical name -> `[B, T, width]`, in the model's dtype, on its device. Copies, made
            under `torch.no_grad` and not inference mode: they are constants that autograd may save.
        """
        seen: dict[str, Tensor] = {}

        def keep(site: str) -> Callable[[Tensor], None]:
            def visit(x_BTD: Tensor) -> None:
                # Nothing writes into logits once they are there, and they are large.
                seen[site] = x_BTD if site == "logits" else x_BTD.clone()

            return visit

        self.read(tokens_BT, {site: keep(site) for site in self.resolve(sites)})
        return seen

    def run(
        self,
        tokens_BT: Integer[Tensor, "b t"],
        edits: Mapping[str, Callable[[Tensor], Tensor]],
        known: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "b t v"]:
        """The logits when the activation at each named site is replaced by a function of it.

        Everything downstream sees the replacement, the residual stream included. Gradients flow
        through the functions when they are enabled; use `torch.no_grad` where none are wanted.

        Args:
            tokens_BT: token ids, of any integer type, on any device.
            edits: site -> function from `[B, T, width]` to the same shape. It is given a copy. Its
                result is cast to the activation's dtype.
            known: what `capture` gave at some `resid_pre.N` for these tokens. The layers before the
                deepest of them that no edit precedes are then not computed again, where the model
                can be started midway; the result is the same.

        Raises:
            UsageError: an unknown site, or a function that changes the shape.
        """
        named = {self._one(site): edit for site, edit in edits.items()}
        at_logits = named.pop("logits", None)
        ordered = [site for site in self.anatomy.taps if site in named]
        visits = [(self.anatomy.taps[site], _replacing(site, named[site])) for site in ordered]
        with self._starting(ordered, known or {}), visiting(visits):
            logits_BTV: Tensor = self._forward(self.module, tokens_BT).logits
        return logits_BTV if at_logits is None else _replacing("logits", at_logits)(logits_BTV)

    def _starting(
        self, edited: Sequence[str], known: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """Inside the block, a pass starts where it may, for edits at these sites."""
        order = list(self.anatomy.taps)
        first = order.index(edited[0]) if edited else len(order)
        entrances = [f"resid_pre.{layer}" for layer in range(self.n_layers)]
        usable = [
            layer
            for layer, site in enumerate(entrances)
            if site in known and order.index(site) <= first
        ]
        if not usable or not self._can_start_midway:
            return nullcontext()
        return starting_at(self.anatomy.layers, usable[-1], known[entrances[usable[-1]]])

    @cached_property
    def _can_start_midway(self) -> bool:
        return can_start_midway(self.anatomy)

    def identity(self) -> dict[str, object]:
        """What tells this model from others, for a coder's or a run's JSON."""
        return {
            "path": self.spec.path,
            "revision": self.revision,
            "adapter": self.spec.adapter,
            "dtype": self.spec.dtype,
            "architecture": type(self.module).__name__,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
        }

    def _one(self, site: str) -> str:
        found = self.resolve([site])
        if len(found) != 1:
            raise UsageError(f"{site!r} names {len(found)} sites; exactly one is needed here.")
        return found[0]

    def _forward(self, module: nn.Module, tokens_BT: Tensor) -> Any:
        limit, length = self.max_positions, tokens_BT.shape[1]
        if limit is not None and length > limit:
            raise UsageError(
                f"Blocks of {length} tokens are longer than the {limit} positions that model "
                f"{self.name!r} ({self.spec.path}) takes. Use shorter blocks."
            )
        return module(input_ids=tokens_BT.to(self.device, torch.long), use_cache=False)


def _replacing(site: str, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def visit(old: Tensor) -> Tensor:
        # A copy: the function may save its argument for backward, and at the residual between
        # attention and MLP the original is about to be overwritten.
        new = edit(old.clone())
        if new.shape != old.shape:
            raise UsageError(
                f"The replacement at {site} has shape {tuple(new.shape)}; the activation there has "
                f"{tuple(old.shape)}."
            )
        return new.to(old)

    return visit


def refuse_not_finite(model: LanguageModel, module: nn.Module, told: str) -> None:
    """Such weights fit no kind, and would be taken for one that is not known.

    Raises:
        CrosslensError: a weight of `module` is NaN or infinite.
    """
    for name, weight in module.named_parameters():
        if not bool(weight.isfinite().all()):
            raise CrosslensError(
                f"The {told} of {model.name!r} ({model.spec.path}) has NaN or infinite values in "
                f"{name}: its file is damaged, or dtype {model.spec.dtype} is too narrow for it."
            )

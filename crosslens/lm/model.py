"""A language model under study: read its activations, or run it with some of them replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from crosslens.errors import UsageError
from crosslens.lm import sites as naming
from crosslens.lm.anatomy import Anatomy
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

    def capture(self, tokens_BT: Integer[Tensor, "b t"], sites: Sequence[str]) -> dict[str, Tensor]:
        """The activations at `sites`, from one forward pass that goes no deeper than it must.

        Args:
            tokens_BT: token ids, of any integer type, on any device.
            sites: whatever `resolve` takes.

        Returns:
            Canonical name -> `[B, T, width]`, in the model's dtype, on its device. Copies, made
            under `torch.no_grad` and not inference mode: they are constants that autograd may save.
            Logits are computed only if `logits` is asked for.
        """
        wanted = self.resolve(sites)
        seen: dict[str, Tensor] = {}
        deep = "logits" in wanted

        def keep(site: str) -> Visit:
            def visit(x_BTD: Tensor) -> None:
                seen[site] = x_BTD.clone()
                if len(seen) == len(wanted):
                    raise _EverythingSeen

            return visit

        visits = [(self.anatomy.taps[site], keep(site)) for site in wanted if site != "logits"]
        with torch.no_grad(), visiting(visits), suppress(_EverythingSeen):
            output = self._forward(self.module if deep else self.anatomy.decoder, tokens_BT)
            if deep:
                seen["logits"] = output.logits
        return {site: seen[site] for site in wanted}

    def run(
        self, tokens_BT: Integer[Tensor, "b t"], edits: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Float[Tensor, "b t v"]:
        """The logits when the activation at each named site is replaced by a function of it.

        Everything downstream sees the replacement, the residual stream included. Gradients flow
        through the functions when they are enabled; use `torch.no_grad` where none are wanted.

        Args:
            tokens_BT: token ids, of any integer type, on any device.
            edits: site -> function from `[B, T, width]` to the same shape. It is given a copy. Its
                result is cast to the activation's dtype.

        Raises:
            UsageError: an unknown site, or a function that changes the shape.
        """
        named = {self._one(site): edit for site, edit in edits.items()}
        at_logits = named.pop("logits", None)
        ordered = [site for site in self.anatomy.taps if site in named]
        visits = [(self.anatomy.taps[site], _replacing(site, named[site])) for site in ordered]
        with visiting(visits):
            logits_BTV: Tensor = self._forward(self.module, tokens_BT).logits
        return logits_BTV if at_logits is None else _replacing("logits", at_logits)(logits_BTV)

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


def next_token_loss(
    logits_BTV: Float[Tensor, "b t v"], tokens_BT: Integer[Tensor, "b t"]
) -> Float[Tensor, "b t-1"]:
    """Cross-entropy of each next token in nats, in float32: entry t is the loss of token t+1.

    Row by row, because a float32 copy of all logits can be larger than the model.
    """
    targets_BT = tokens_BT.to(logits_BTV.device, torch.long)
    rows = [
        F.cross_entropy(logits_TV[:-1].float(), targets_T[1:], reduction="none")
        for logits_TV, targets_T in zip(logits_BTV, targets_BT, strict=True)
    ]
    return torch.stack(rows)

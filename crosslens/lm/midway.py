"""Start a model at one of its layers, from the residual stream that enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crosslens.lm.anatomy import Anatomy, probe
from crosslens.lm.taps import Visit, visiting


@contextmanager
def starting_at(layers: Sequence[nn.Module], start: int, x_BTD: Tensor) -> Iterator[None]:
    """Inside the block, layers before `start` compute nothing and layer `start` is given `x_BTD`.

    The model's own forward still prepares what it hands to every layer (positions, masks), so that
    nothing need be known about it. Their hooks still run.
    """
    skipped = layers[:start]
    kept = [layer.__dict__.get("forward") for layer in skipped]
    given_BTD = x_BTD.clone()  # a layer may write into its input
    try:
        for layer in skipped:
            layer.__dict__["forward"] = _returning(given_BTD)
        yield
    finally:
        for layer, forward in zip(skipped, kept, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward


def _returning(value: Tensor) -> Callable[..., Tensor]:
    return lambda *_args, **_kwargs: value


def can_start_midway(anatomy: Anatomy) -> bool:
    """Whether the last layer, given its input only, does to the bit what it does in a whole pass.

    It does not where layers hand on more than the residual stream: tuples, or keys and values that
    later layers share.
    """
    last = anatomy.n_layers - 1
    entering: list[Tensor] = []
    whole = _final(anatomy, entering.append)
    with starting_at(anatomy.layers, last, entering[0]):
        try:
            return torch.equal(_final(anatomy, entering.append), whole)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False  # something that an earlier layer should have left is missing


def _final(anatomy: Anatomy, entering: Callable[[Tensor], None]) -> Any:
    """What leaves the last norm of a short pass; `entering` sees what enters the last layer."""
    seen: list[Tensor] = []

    def enters(x_BTD: Tensor) -> None:
        entering(x_BTD.clone())

    def leaves(x_BTD: Tensor) -> None:
        seen.append(x_BTD.clone())

    visits: list[tuple[Any, Visit]] = [
        (anatomy.taps[f"resid_pre.{anatomy.n_layers - 1}"], enters),
        (anatomy.taps["final"], leaves),
    ]
    with torch.no_grad(), visiting(visits):
        probe(anatomy.decoder)
    return seen[0]

"""Read or replace one activation as it passes, by a hook on one module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Visit = Callable[[Tensor], Tensor | None]
"""Sees an activation; what it returns, if not None, takes the activation's place."""


@dataclass(frozen=True)
class Tap:
    """Where one activation can be seen: the input or the output of a module.

    `residual` is an input that the surrounding code also keeps as its residual variable. A
    replacement is therefore written into the tensor itself, so that the later addition sees it.
    """

    module: nn.Module
    side: Literal["input", "output", "residual"]


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The hidden states given to a module; Hugging Face names them when not positional."""
    return args[0] if args else kwargs.get("hidden_states")


def first_output(output: Any) -> Any:
    """The hidden states a module returned; attention returns its weights after them."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def visiting(visits: Iterable[tuple[Tap, Visit]]) -> Iterator[None]:
    """Hooks for as long as the block lasts; they are gone after it, whatever happened inside.

    Two visits at one module run in the order given.
    """
    handles: list[RemovableHandle] = []
    try:
        handles.extend(_attach(tap, visit) for tap, visit in visits)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(tap: Tap, visit: Visit) -> RemovableHandle:
    if tap.side == "output":
        return tap.module.register_forward_hook(_after(visit))
    before = _before(visit, in_place=tap.side == "residual")
    return tap.module.register_forward_pre_hook(before, with_kwargs=True)


def _after(visit: Visit) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        new = visit(first_output(output))
        if new is None or not isinstance(output, tuple):
            return new
        return (new, *output[1:])

    return hook


def _before(visit: Visit, in_place: bool) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        old = first_input(args, kwargs)
        new = visit(old)
        if new is None:
            return None
        if in_place:
            old.copy_(new)
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new}

    return hook

"""Watch a model compute, to see which tensor each module was given and which it returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crosslens.lm.taps import first_input, first_output


@dataclass(frozen=True, eq=False)
class Call:
    """One module's forward. That tensors are kept makes comparing them by identity safe."""

    module: nn.Module
    input: Tensor
    output: Tensor


def watch(modules: Iterable[nn.Module], compute: Callable[[], Any]) -> list[Call]:
    """Every call of these modules that took and gave a tensor, in order of completion."""
    calls: list[Call] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, returned = first_input(args, kwargs), first_output(output)
        if isinstance(given, Tensor) and isinstance(returned, Tensor):
            calls.append(Call(module, given, returned))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            compute()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def calls_of(modules: Iterable[nn.Module], calls: Iterable[Call]) -> list[Call]:
    """Those calls that are of one of these modules."""
    wanted = set(modules)
    return [call for call in calls if call.module in wanted]


def downstream(call: Call, siblings: Iterable[Call]) -> Call:
    """The last of the modules, one after another, that were given just what `call` returned."""
    for sibling in siblings:
        if sibling.input is call.output and sibling is not call:
            return downstream(sibling, siblings)
    return call


def upstream(call: Call, siblings: Iterable[Call]) -> Call:
    """The first of the modules, one after another, whose output became the input of `call`."""
    for sibling in siblings:
        if sibling.output is call.input and sibling is not call:
            return upstream(sibling, siblings)
    return call

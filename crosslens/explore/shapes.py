"""Whether JSON has the shape that is asked of it, and if not, where it first differs, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Maybe:
    """Null, or of that shape."""

    shape: Any


@dataclass(frozen=True)
class Each:
    """A mapping of any names to values of that shape."""

    shape: Any


def misfit(value: Any, shape: Any, where: str) -> str | None:
    """What is first found wrong with `value`, in words; None where it has the shape.

    A type asks for a value of it (a whole number is a `float`, a `bool` is no number), a dict for
    those keys at least, a list for any number of values alike, a tuple for as many as it has.
    """
    match shape:
        case Maybe(inner):
            return None if value is None else misfit(value, inner, where)
        case Each(inner):
            return _misfits(value, inner, where)
        case dict():
            return _misfit_keys(value, shape, where)
        case list() | tuple():
            return _misfit_items(value, shape, where)
    wanted = (int, float) if shape is float else shape
    if isinstance(value, wanted) and (shape is bool or not isinstance(value, bool)):
        return None
    return f"{where} is {value!r:.40}"


def _misfits(value: Any, inner: Any, where: str) -> str | None:
    if not isinstance(value, Mapping):
        return f"{where} is {value!r:.40}"
    found = (misfit(each, inner, f"{where}.{name}") for name, each in value.items())
    return next(filter(None, found), None)


def _misfit_keys(value: Any, shape: Mapping[str, Any], where: str) -> str | None:
    if not isinstance(value, Mapping):
        return f"{where} is {value!r:.40}"
    if missing := [name for name in shape if name not in value]:
        return f"{where} lacks {missing[0]}"
    found = (misfit(value[name], inner, f"{where}.{name}") for name, inner in shape.items())
    return next(filter(None, found), None)


def _misfit_items(value: Any, shape: list[Any] | tuple[Any, ...], where: str) -> str | None:
    if not isinstance(value, list) or (isinstance(shape, tuple) and len(value) != len(shape)):
        return f"{where} is {value!r:.40}"
    inner = shape if isinstance(shape, tuple) else shape * len(value)
    found = (misfit(each, one, where) for each, one in zip(value, inner, strict=True))
    return next(filter(None, found), None)

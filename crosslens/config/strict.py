"""The strict converter: nothing is coerced, and each refusal says what was expected.

A field that may hold one of several dataclasses is tagged: `kind` names its class in lower case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from cattrs import Converter
from cattrs.cols import is_mapping
from cattrs.errors import BaseValidationError

from crosslens.errors import suggestion

Hook = Callable[[Any, Any], Any]

KIND = "kind"
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def kind_of(cls: type) -> str:
    """The tag of a dataclass among those a field may hold: `BatchTopK` is `batchtopk`."""
    return cls.__name__.lower()


def members(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a field annotated `hint` may hold."""
    choices = _alternatives(hint)
    return tuple(t for t in choices if isinstance(t, type) and dataclasses.is_dataclass(t))


def is_optional(hint: Any) -> bool:
    """Whether None is a value of `hint`."""
    return NoneType in _alternatives(hint)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if _is_union(hint) else (hint,)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _is_tagged(hint: Any) -> bool:
    return _is_union(hint) and len(members(hint)) > 1


def _is_tuple(hint: Any) -> bool:
    return hint is tuple or get_origin(hint) is tuple


def _is_literal(hint: Any) -> bool:
    origin: Any = get_origin(hint)
    return origin is Literal


def _is_mixed(hint: Any) -> bool:
    """A union that neither a tag nor None decides: `int | str`."""
    return _is_union(hint) and len(set(get_args(hint)) - {NoneType}) > 1 and not _is_tagged(hint)


@cache
def strict_converter() -> Converter:
    """Structures and unstructures every configuration; made once."""
    converter = Converter(forbid_extra_keys=True)
    for scalar in (int, float, bool, str, NoneType):
        converter.register_structure_hook(scalar, _scalar)
    converter.register_structure_hook(Path, lambda value, _: Path(_scalar(value, str)))
    converter.register_structure_hook_func(_is_literal, _literal)
    # cattrs would take the letters of a string for the items of a tuple.
    _only(converter, _is_tuple, (list, tuple))
    _only(converter, is_mapping, (Mapping,))
    _only(converter, dataclasses.is_dataclass, (Mapping,))
    converter.register_structure_hook_factory(_is_mixed, _mixed)
    converter.register_structure_hook_factory(_is_tagged, _tagged)
    converter.register_unstructure_hook_factory(_is_tuple, _plain_tuple)
    converter.register_unstructure_hook_factory(_is_tagged, _plain_tagged)
    return converter


def _scalar(value: Any, hint: Any) -> Any:
    """`value` if it is exactly of type `hint`; whole numbers also pass as float."""
    if type(value) is hint:
        return value
    if hint is float and type(value) is int:
        return float(value)
    return _refuse(value, hint)


def _literal(value: Any, hint: Any) -> Any:
    # 1 == True, so the type is compared too.
    if any(value == choice and type(value) is type(choice) for choice in get_args(hint)):
        return value
    return _refuse(value, hint)


def _only(
    converter: Converter, predicate: Callable[[Any], bool], accepted: tuple[type, ...]
) -> None:
    """Put a type check before the hook that cattrs has for the types of `predicate`."""
    passing: list[Any] = []

    def factory(hint: Any, converter: Converter) -> Hook:
        passing.append(hint)
        base = converter.get_structure_hook(hint, cache_result=False)
        passing.remove(hint)
        return lambda value, t: base(value, t) if isinstance(value, accepted) else _refuse(value, t)

    # While a hint passes, this factory steps aside and the lookup finds cattrs' own hook.
    converter.register_structure_hook_factory(lambda t: predicate(t) and t not in passing, factory)


def _mixed(hint: Any, converter: Converter) -> Hook:
    def attempt(value: Any, _: Any) -> Any:
        for choice in sorted(get_args(hint), key=lambda choice: choice is not type(value)):
            try:
                return converter.structure(value, choice)
            except (BaseValidationError, TypeError, ValueError):
                continue
        return _refuse(value, hint)

    return attempt


def _tagged(hint: Any, converter: Converter) -> Hook:
    # cattrs' own tagged unions answer an unknown tag with a bare KeyError.
    by_kind = {kind_of(cls): cls for cls in members(hint)}
    known = f"it is one of {', '.join(by_kind)}."

    def chosen(value: Any, _: Any) -> Any:
        if value is None and is_optional(hint):
            return None
        if not isinstance(value, Mapping):
            return _refuse(value, hint)
        if KIND not in value:
            raise ValueError(f"the key `kind` is missing; {known}")
        kind, rest = str(value[KIND]), {key: v for key, v in value.items() if key != KIND}
        if kind not in by_kind:
            raise ValueError(f"{kind!r} is not a known kind; {known}{suggestion(kind, by_kind)}")
        return converter.structure(rest, by_kind[kind])

    return chosen


def _plain_tagged(hint: Any, converter: Converter) -> Callable[[Any], Any]:
    def tagged(value: Any) -> Any:
        if value is None:
            return None
        return {KIND: kind_of(type(value)), **converter.unstructure(value)}

    return tagged


def _plain_tuple(hint: Any, converter: Converter) -> Callable[[Any], Any]:
    item, *rest = get_args(hint) or (Any, ...)
    if rest == [...]:
        return lambda value: [converter.unstructure(v, _as(item)) for v in value]
    hints = (item, *rest)
    return lambda value: [
        converter.unstructure(v, _as(h)) for v, h in zip(value, hints, strict=True)
    ]


def _as(hint: Any) -> Any:
    return None if hint is Any else hint


def _refuse(value: Any, hint: Any) -> NoReturn:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    found = "nothing (null)" if value is None else f"{shown} ({type(value).__name__})"
    raise TypeError(f"expected {_described(hint)}, found {found}.{_advice(value, hint)}")


def _advice(value: Any, hint: Any) -> str:
    if hint is str and value is not None and not isinstance(value, Mapping | list):
        return " Put it in quotes to make it text."
    if _is_literal(hint) and isinstance(value, str):
        return suggestion(value, [str(choice) for choice in get_args(hint)])
    return ""


def _described(hint: Any) -> str:
    if _is_tagged(hint):
        return f"a mapping with `kind` one of {', '.join(map(kind_of, members(hint)))}"
    if _is_union(hint):
        return " or ".join(_described(choice) for choice in get_args(hint))
    if _is_literal(hint):
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if _is_tuple(hint):
        return f"a list ({str(hint).removeprefix('tuple')})"
    if dataclasses.is_dataclass(hint) or is_mapping(hint):
        return "a mapping of keys to values"
    return "null" if hint is NoneType else _NAMES.get(hint, str(hint))

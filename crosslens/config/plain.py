"""Frozen dataclasses to nested JSON-able dicts and, strictly, back again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)

from crosslens.config.strict import KIND, strict_converter
from crosslens.errors import CrosslensError, UsageError, suggestion

C = TypeVar("C")

_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with one value: where it lies (`("coder", "k")`) and one sentence."""

    path: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.text}" if self.path else self.text


def to_plain(config: Any) -> dict[str, Any]:
    """`config`, a dataclass instance, as nested dicts, lists and scalars that JSON can hold."""
    return cast(dict[str, Any], strict_converter().unstructure(config, unstructure_as=type(config)))


def from_plain(cls: type[C], data: Mapping[str, Any], source: str) -> C:
    """The `cls` that `data` describes; fields left out take their defaults.

    Raises UsageError, naming `source` and the dotted path, for an unknown key, a missing one, a
    value of the wrong type, and what `cls` itself refuses in `__post_init__`.
    """
    config, problems = structure(cls, data)
    if problems:
        raise UsageError(f"{source}: {sentence(problems)}")
    return cast(C, config)


def structure(cls: type[C], data: Any) -> tuple[C | None, list[Problem]]:
    """The configuration, or None and everything that is wrong with `data`."""
    try:
        return strict_converter().structure(data, cls), []
    except (BaseValidationError, TypeError, ValueError, CrosslensError) as error:
        return None, _problems(error, ())


def sentence(problems: list[Problem]) -> str:
    """The first problem, and how many others there are."""
    rest = len(problems) - 1
    return f"{problems[0]}" + (f" ({rest} more after this one.)" if rest else "")


def differences(config: Any, default: Any) -> dict[str, Any]:
    """Dotted key → plain value wherever `config` is not `default`; an entry taken out is None."""
    return _differences(to_plain(config), to_plain(default), "")


def _differences(new: Any, old: Any, path: str) -> dict[str, Any]:
    if new == old and type(new) is type(old):
        return {}
    if not isinstance(new, dict) or not (new or isinstance(old, dict)):
        return {path: new}
    if not isinstance(old, dict) or new.get(KIND) != old.get(KIND):
        old = {}
    found: dict[str, Any] = {}
    for key in [*new, *(key for key in old if key not in new)]:
        here = f"{path}.{key}" if path else key
        found |= _differences(new[key], old.get(key, _ABSENT), here) if key in new else {here: None}
    return found


def _problems(error: BaseException, path: tuple[str, ...]) -> list[Problem]:
    if isinstance(error, BaseValidationError):
        return [p for inner in error.exceptions for p in _problems(inner, path + _step(inner))]
    match error:
        case ForbiddenExtraKeysError():
            known = [field.name for field in dataclasses.fields(cast(Any, error.cl))]
            keys = sorted(map(str, error.extra_fields))
            return [Problem((*path, key), _unknown(key, known)) for key in keys]
        case KeyError():
            return [Problem(path, "this key is missing and has no default.")]
        case TypeError() | ValueError() | CrosslensError():
            return [Problem(path, str(error))]
    raise error  # not about the data: a bug, which must not pass for the user's mistake


def _step(error: BaseException) -> tuple[str, ...]:
    """The part of the path that cattrs noted while `error` passed through it."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return (note.name,)
        if isinstance(note, IterableValidationNote):
            return (str(note.index),)
    return ()


def _unknown(key: str, known: list[str]) -> str:
    near = suggestion(key, known)
    return f"unknown key.{near}" if near else f"unknown key; known here: {', '.join(known)}."

"""Places in a configuration whose class can be chosen: unions, optional parts, dict entries.

Nothing here validates: what is built may still miss required values (`tyro.MISSING`), and becomes
a real configuration only when its classes are called with all of them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast, get_args, get_type_hints

from tyro import MISSING

from crosslens.config.strict import is_optional, kind_of, members

T = TypeVar("T")

GONE = object()
"""Put in place of a dict entry, it takes the entry out."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A field of a dataclass or an entry of a dict, as it is now."""

    name: str
    value: Any
    hint: Any
    entry: bool

    @property
    def choices(self) -> tuple[str, ...]:
        """What the slot may hold, by kind; empty where there is nothing to choose."""
        kinds = tuple(map(kind_of, members(self.hint)))
        if kinds and (self.entry or is_optional(self.hint)):
            return (*kinds, "none")
        return kinds if len(kinds) > 1 else ()

    @property
    def kind(self) -> str:
        """Which of the choices it holds now."""
        return "none" if self.value is None else kind_of(type(self.value))

    def holding(self, kind: str) -> Any:
        """The value for another choice, with that class's own defaults; the same one, as it is."""
        if kind == self.kind and self.value is not None:
            return self.value
        if kind == "none":
            return GONE if self.entry else None
        return bare(next(cls for cls in members(self.hint) if kind_of(cls) == kind))


def bare(cls: type[T]) -> T:
    """A `cls` with its defaults, unchecked, and MISSING where it has none."""
    config = object.__new__(cls)
    for field in dataclasses.fields(cast(Any, cls)):
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        object.__setattr__(config, field.name, MISSING if value is dataclasses.MISSING else value)
    return config


def find(config: Any, path: Sequence[str]) -> Slot | None:
    """The slot that `path` leads to, through parts that could be there too; None if it cannot."""
    slot: Slot | None = Slot("", config, type(config), False)
    for name in path:
        slot = _child(slot, name) if slot else None
    return slot


def put(config: T, path: Sequence[str], value: Any) -> T:
    """A copy of `config` with `value` at `path`, and with all that lies on the way to it."""
    return cast(T, _put(Slot("", config, type(config), False), path, value))


def slots(config: Any, path: str = "") -> Iterator[tuple[str, Slot]]:
    """Every place in `config` as it is now, with its dotted path, outer before inner."""
    parent = Slot("", config, type(config), False)
    return _below(parent, path)


def _below(parent: Slot, path: str) -> Iterator[tuple[str, Slot]]:
    for name in _names(parent.value):
        child = _child(parent, name)
        if child is not None:
            here = f"{path}.{name}" if path else name
            yield here, child
            yield from _below(child, here)


def _names(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return list(value) if isinstance(value, dict) else []


def _child(parent: Slot, name: str) -> Slot | None:
    value = parent.value
    choices = members(parent.hint)
    if value is None and len(choices) == 1:
        value = bare(choices[0])
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value))
        field = name.replace("-", "_")
        return Slot(field, getattr(value, field), hints[field], False) if field in hints else None
    if isinstance(value, dict) and members(item := (get_args(parent.hint) or (Any,))[-1]):
        same = (key for key in value if key.replace("-", "_") == name.replace("-", "_"))
        key = next(same, name)
        return Slot(key, value.get(key), item, True)
    return None


def _put(slot: Slot, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    child = _child(slot, path[0])
    if child is None:
        return slot.value
    inner = _put(child, path[1:], value)
    if isinstance(slot.value, dict):
        entries = {**slot.value, child.name: inner}
        return {key: entry for key, entry in entries.items() if entry is not GONE}
    parent = bare(members(slot.hint)[0]) if slot.value is None else copy.copy(slot.value)
    object.__setattr__(parent, child.name, inner)
    return parent

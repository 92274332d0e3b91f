"""Configuration files: YAML or JSON, laid over a default. Reading one never runs code."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from crosslens.config.plain import Problem, sentence, structure, to_plain
from crosslens.config.strict import KIND
from crosslens.errors import UsageError

C = TypeVar("C")
Lines = dict[tuple[str, ...], int]


def load_file(cls: type[C], path: Path, default: C) -> C:
    """`default` with what the file at `path` says laid over it; JSON if it ends in `.json`.

    Mappings merge key by key, but of named entries (`models`, `text.corpora`) there are those that
    the file lists. A `kind` other than the default's starts from that kind's own defaults.
    Raises UsageError, with file and line, for whatever is wrong.
    """
    data, lines = _read(path)
    config, problems = structure(cls, overlay(default, to_plain(default), data))
    if problems:
        line = _line(problems[0], lines)
        raise UsageError(f"{path}{f':{line}' if line else ''}: {sentence(problems)}")
    return cast(C, config)


def to_yaml(config: Any) -> str:
    """`config` as YAML text that `load_file` reads back."""
    # Not allow_unicode: with it, PyYAML loses U+0085 at the ends of a text.
    return yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False)


def overlay(value: Any, plain: Any, data: Any) -> Any:
    """`plain`, the plain form of `value`, with `data` merged into it.

    Of models, corpora and the like there are those that `data` lists: whoever names two models in a
    file does not expect the default as a third. What an entry leaves out is as in the default.
    """
    if not isinstance(data, Mapping):
        return data
    if isinstance(value, dict):
        return {key: overlay(value.get(key), plain.get(key), data[key]) for key in data}
    if dataclasses.is_dataclass(value) and data.get(KIND, plain.get(KIND)) == plain.get(KIND):
        children = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        merged = {key: overlay(children.get(key), plain.get(key), data[key]) for key in data}
        return {**plain, **merged}
    return data


class _Loader(yaml.SafeLoader):
    """Subclassed as PyYAML asks of those who change what plain text stands for."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number."""


def _also_floats(*classes: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    """YAML 1.1 takes `1e-3` for text and wants `1.0e-3`; people write the former."""
    pattern = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    for cls in classes:
        cls.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+.0123456789"))


_also_floats(_Loader, _Dumper)


def _read(path: Path) -> tuple[dict[str, Any], Lines]:
    try:
        text = path.read_text(encoding="utf-8")
        data, lines = _parse_json(text) if path.suffix == ".json" else _parse_yaml(text)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"The configuration file {path} could not be read: {reason}.") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is not a valid configuration file: {reason}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply to be a configuration.") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold keys and values, found {type(data).__name__}.")
    return data, lines


def _parse_json(text: str) -> tuple[Any, Lines]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} stands there twice.")
        return found

    return json.loads(text, object_pairs_hook=unique), {}


def _parse_yaml(text: str) -> tuple[Any, Lines]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        lines = dict(_walk(node, (), set()))
        return loader.construct_document(node), lines
    finally:
        loader.dispose()


def _walk(
    node: yaml.Node, path: tuple[str, ...], met: set[int]
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Each path with its line, from 1. Refuses duplicate keys and aliases."""
    # A node met twice is an alias; a few lines of nested ones unfold into billions of values.
    if id(node) in met:
        raise ValueError(f"line {node.start_mark.line + 1} is used again by a YAML alias (*name).")
    met.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*path, str(index)), met)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise ValueError(f"line {line}: the key {name!r} stands there twice.")
            seen.add(name)
            yield (*path, name), line
            yield from _walk(value, (*path, name), met)


def _line(problem: Problem, lines: Lines) -> int | None:
    """The line of the problem, or of the nearest key around it that the file has."""
    paths = (problem.path[:length] for length in range(len(problem.path), 0, -1))
    return next((lines[path] for path in paths if path in lines), None)

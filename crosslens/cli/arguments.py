"""Command lines for any configuration class: a file first, then flags, tyro underneath.

What tyro does not do is done before it: `--coder.activation topk` puts another class into a field
that may hold one of several, `--models.chat.path X` adds an entry to a dict of dataclasses, and
`--models.chat none` takes one out.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import tyro

from crosslens.config import kind_of, load_file
from crosslens.config.slots import bare, find, put, slots
from crosslens.config.strict import members
from crosslens.errors import UsageError, suggestion

C = TypeVar("C")
S = TypeVar("S")

FILES = (("--config FILE", "a YAML or JSON file; it is read first, flags go on top"),)


@dataclass(frozen=True)
class NoSwitches:
    """For commands that take nothing besides their configuration."""


def parse(
    cls: type[C], argv: Sequence[str], default: C | None, *, prog: str, description: str
) -> C:
    """The `cls` that `default`, then `--config FILE`, then the flags of `argv` describe.

    With `default` None, for commands that are not a configuration, values may be required, and
    there is no `--config`.
    Raises UsageError for anything wrong, and SystemExit(0) after printing `--help`.
    """
    if default is not None:
        return parse_with(NoSwitches(), argv, default, prog=prog, description=description)[1]
    return _parse(NoSwitches(), argv, bare(cls), prog, description)[1]


def parse_with(
    switches: S, argv: Sequence[str], default: C, *, prog: str, description: str
) -> tuple[S, C]:
    """As `parse`, with flags that a command has beside its configuration (`--json`, say).

    `switches` is an instance of a flat dataclass: names, help and defaults of those flags.
    """
    files, rest = take_option(argv, "--config")
    for file in files:
        default = load_file(type(default), Path(file), default)
    return _parse(switches, rest, default, prog, description, FILES)


def _parse(
    switches: S,
    argv: Sequence[str],
    default: C,
    prog: str,
    description: str,
    notes: Sequence[tuple[str, str]] = (),
) -> tuple[S, C]:
    """`notes` are flags that were dealt with before, and their help."""
    default, rest = _shaped(default, argv)
    try:
        both, unknown = _run_tyro(switches, default, rest, prog, description)
    except SystemExit:  # tyro has printed its help
        print(_more_help(default, notes), end="")
        raise
    if unknown:
        known = [flag.split()[0] for flag, _ in notes]
        known += [f"--{field.name}" for field in fields(cast(Any, switches))]
        raise UsageError(_unknown(unknown, default, known, prog))
    return both.switches, both.config


def take_option(argv: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """Every value of `flag` (`--flag X` or `--flag=X`), and `argv` without them."""
    found: list[str] = []
    rest: list[str] = []
    queue = deque(argv)
    while queue:
        token = queue.popleft()
        if token.partition("=")[0] == flag:
            found.append(_value(token, queue))
        else:
            rest.append(token)
    return found, rest


def _value(token: str, queue: deque[str]) -> str:
    name, equals, value = token.partition("=")
    if equals:
        return value
    if not queue or queue[0].startswith("--"):
        raise UsageError(f"{name} needs a value: `{name} VALUE`.")
    return queue.popleft()


def _path(token: str) -> list[str]:
    """`--coder.activation=topk` leads to coder, activation; what is no flag leads nowhere."""
    return token[2:].partition("=")[0].split(".") if re.match(r"--\w", token) else []


def _shaped(config: C, argv: Sequence[str]) -> tuple[C, list[str]]:
    """`config` with the classes chosen and the entries named in `argv`, and the other flags."""
    rest = list(argv)
    # Outer places first: which inner ones there are depends on them.
    for depth in sorted({len(_path(token)) for token in argv}):
        config, rest = _choose(config, rest, depth)
    for token in rest:
        config = _open(config, _path(token))
    return config, rest


def _choose(config: C, argv: Sequence[str], depth: int) -> tuple[C, list[str]]:
    rest: list[str] = []
    queue = deque(argv)
    while queue:
        token = queue.popleft()
        path = _path(token)
        slot = find(config, path) if len(path) == depth else None
        if slot is None or not slot.choices:
            rest.append(token)
            continue
        kind = _value(token, queue).lower()
        if kind not in slot.choices:
            near = suggestion(kind, slot.choices)
            known = ", ".join(slot.choices)
            raise UsageError(f"--{'.'.join(path)} is one of {known}, found {kind!r}.{near}")
        config = put(config, path, slot.holding(kind))
    return config, rest


def _open(config: C, path: Sequence[str]) -> C:
    """`config` with the entry or the optional part that a flag at `path` lies in."""
    for length in range(len(path), 0, -1):
        slot = find(config, path[:length])
        if slot is None:
            continue
        classes = members(slot.hint)
        if slot.value is None and len(classes) > 1:
            flag, known = f"--{'.'.join(path[:length])}", ", ".join(slot.choices)
            raise UsageError(f"Say what {flag} is before setting its values: one of {known}.")
        value = bare(classes[0]) if slot.value is None and classes else slot.value
        return put(config, path[:length], value)
    return config


def _run_tyro(
    switches: Any, config: Any, argv: Sequence[str], prog: str, description: str
) -> tuple[Any, list[str]]:
    """tyro's result and the tokens it does not know; its boxed errors become one UsageError."""
    unprefixed = tyro.conf.arg(name="")
    parts = {"config": config, "switches": switches}
    named = [(name, Annotated[type(part), unprefixed]) for name, part in parts.items()]
    both: Any = make_dataclass("Command", named, frozen=True, kw_only=True)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                both,
                prog=prog,
                description=description,
                args=argv,
                default=both(**parts),
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.PositionalMetavarFromFieldName),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{_unboxed(errors.getvalue())} See `{prog} --help`.") from None
    except ValueError as error:  # what the class itself refuses in __post_init__
        raise UsageError(f"{str(error).rstrip('.')}. See `{prog} --help`.") from error


def _unboxed(text: str) -> str:
    """What tyro's box of errors says, as one sentence."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    title, *lines = re.split(r"^[│|] [─-]{5,}", text, flags=re.MULTILINE)[0].splitlines()
    if "Required options" in title:
        # The names stand four columns in; their help, further.
        names = [line.strip("│| ").split()[0] for line in lines if re.match(r"[│|] {5}\S", line)]
        return f"Not given, and there is no default: {', '.join(names)}."
    body = " ".join(line.strip("│| ") for line in lines).strip()
    for pattern, better in _BETTER:
        body = re.sub(pattern, better, body)
    return body if body.endswith(".") else f"{body}."


_BETTER = (
    (r"invalid literal for int\(\) with base 10:", "expected a whole number, found"),
    (r"could not convert string to float:", "expected a number, found"),
    (r"^Error parsing config: ", ""),
    (r"^Error parsing (config\.)?", ""),
    (r"'(config|switches)\.", "'--"),
)


def _unknown(tokens: Sequence[str], config: Any, known: Sequence[str], prog: str) -> str:
    flags = [token for token in tokens if token.startswith("-")]
    if not flags:
        return f"Unexpected argument {tokens[0]!r}. See `{prog} --help`."
    flag = flags[0].partition("=")[0]
    all_known = map(_hyphens, [*known, *_flags(config)])
    near = _other_kinds(flag, config) or suggestion(_hyphens(flag), all_known)
    return f"Unknown flag {flag}.{near or f' See `{prog} --help`.'}"


def _hyphens(flag: str) -> str:
    return flag.replace("_", "-")


def _flags(config: Any) -> Iterator[str]:
    for path, slot in slots(config):
        if slot.choices or not (is_dataclass(slot.value) or isinstance(slot.value, dict)):
            yield f"--{path}"


def _other_kinds(flag: str, config: Any) -> str:
    """Advice where another choice than the one made has this flag."""
    *above, name = _path(flag)
    slot = find(config, above) if above else None
    if slot is None or not slot.choices:
        return ""
    classes = [cls for cls in members(slot.hint) if cls is not type(slot.value)]
    owners = [kind_of(c) for c in classes if name.replace("-", "_") in _field_names(c)]
    place = f"--{'.'.join(above)}"
    return f" {place} is {slot.kind}; use {place} {' or '.join(owners)}." if owners else ""


def _field_names(cls: Any) -> set[str]:
    return {field.name for field in fields(cls)}


def _more_help(config: Any, notes: Sequence[tuple[str, str]]) -> str:
    """What tyro's help cannot know: files, choices of class, entries that can be added."""
    rows = list(notes)
    for path, slot in slots(config):
        if slot.entry and len(slot.choices) == 2:
            rows.append((f"--{path} none", "takes this entry out"))
        elif slot.choices:
            choices = f"--{path} {{{','.join(slot.choices)}}}"
            rows.append((choices, f"now {slot.kind}; its flags follow the choice"))
        if isinstance(slot.value, dict) and find(config, [*path.split("."), "NAME"]):
            rows.append((f"--{path}.NAME...", "another NAME adds an entry"))
    width = max((len(flag) for flag, _ in rows), default=0)
    lines = [f"  {_hyphens(flag):{width}}  {text}" for flag, text in rows]
    return "\n".join(["", "also:", *lines, ""]) if rows else ""

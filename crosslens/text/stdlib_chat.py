"""Chat rows from Python source: the request from a docstring, the answer from the code."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias
from zlib import crc32

from crosslens.text.documents import Messages

Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

_SHORTEST_REQUEST, _LONGEST_REQUEST = 20, 600  # characters of docstring
_SHORTEST_ANSWER, _LONGEST_ANSWER = 60, 4000  # characters of code

_REQUESTS = (
    "Write a Python {kind} with the signature `{signature}`. {sentence}",
    "Could you show me how to write `{name}` as a Python {kind}? {sentence}",
    "I need a Python {kind} with this signature:\n\n{signature}\n\n{paragraph}",
    "{sentence} Please write this as a Python {kind} called `{name}`.",
    'Implement the {kind} `{name}`. Its docstring begins: "{sentence}"',
    "{paragraph}\n\nHow would you code that in Python? Start from `{signature}`.",
)
_ANSWERS = (
    "```python\n{code}\n```",
    "Here is one way to write it:\n\n```python\n{code}\n```",
    "Here is `{name}`:\n\n```python\n{code}\n```",
)


@dataclass(frozen=True)
class _Found:
    name: str  # qualified: JSONDecoder.decode
    kind: str
    node: Definition


def chat_rows(source: str, where: str) -> Iterator[tuple[str, Messages]]:
    """(qualified name, [user, assistant]) for each documented definition, in order of source.

    Source that is not valid Python yields nothing. The wording depends on `where` and the name
    only, so that it is the same in every run.
    """
    lines = source.splitlines()
    for found in _definitions(_parse(source), ()):
        messages = _row(found, lines, crc32(f"{where}:{found.name}".encode()))
        if messages is not None:
            yield found.name, messages


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules are not ours to report
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])


def _definitions(parent: ast.Module | ast.ClassDef, scope: tuple[str, ...]) -> Iterator[_Found]:
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = ".".join((*scope, node.name))
        if isinstance(node, ast.ClassDef):
            yield _Found(name, "class", node)
            yield from _definitions(node, (*scope, node.name))
        else:
            yield _Found(name, "method" if scope else "function", node)


def _row(found: _Found, lines: list[str], dice: int) -> Messages | None:
    paragraph = _first_paragraph(ast.get_docstring(found.node) or "")
    documented, bare = (_code(found.node, lines, keep) for keep in (True, False))
    if not _SHORTEST_REQUEST <= len(paragraph) <= _LONGEST_REQUEST:
        return None
    if len(bare) < _SHORTEST_ANSWER or len(documented) > _LONGEST_ANSWER or "```" in documented:
        return None
    fields = {
        "kind": found.kind,
        "name": found.name,
        "signature": _signature(found),
        "paragraph": paragraph,
        "sentence": _first_sentence(paragraph),
        "code": bare if dice // 36 % 2 else documented,
    }
    return [
        {"role": "user", "content": _REQUESTS[dice % len(_REQUESTS)].format_map(fields)},
        {"role": "assistant", "content": _ANSWERS[dice // 6 % len(_ANSWERS)].format_map(fields)},
    ]


def _first_paragraph(docstring: str) -> str:
    """The docstring's first paragraph on one line; the second if the first is a bare signature."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring.strip())]
    if len(paragraphs) > 1 and re.fullmatch(r"[\w.]+\(.*\)( ?-> ?.*)?", paragraphs[0]):
        del paragraphs[0]
    first = paragraphs[0]
    return first if not first or first[-1] in ".!?:" else first + "."


def _first_sentence(paragraph: str) -> str:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph, maxsplit=1)[0]


def _signature(found: _Found) -> str:
    node = found.node
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{prefix} {node.name}({ast.unparse(node.args)}){returns}"


def _code(node: Definition, lines: list[str], documented: bool) -> str:
    """The definition's source, dedented, with or without its docstring; empty if that is all."""
    body = node.body
    if len(body) < 2:  # the docstring alone
        return ""
    start = min([node.lineno, *(entry.lineno for entry in node.decorator_list)]) - 1
    docstring = body[0]
    if documented or docstring.end_lineno == body[1].lineno:
        kept = lines[start : node.end_lineno]
    else:
        after = _skip_blank(lines, docstring.end_lineno or docstring.lineno)
        kept = lines[start : docstring.lineno - 1] + lines[after : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).rstrip()


def _skip_blank(lines: list[str], index: int) -> int:
    while index < len(lines) and not lines[index].strip():
        index += 1
    return index

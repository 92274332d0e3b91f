"""Imports point one way, and what should start fast loads nothing heavy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import crosslens

PACKAGE = Path(crosslens.__file__).parent

ROOMS = [
    "errors",
    "storage",
    "device",
    "allocator",
    "openmp",
    "config",
    "functional",
    "kernels",
    "coder",
    "lm",
    "text",
    "organisms",
    "activations",
    "evaluation",
    "training",
    "diffing",
    "interactions",
    "proofs",
    "interventions",
    "explore",
    "interop",
    "recipes",
    "cli",
]
"""Each may import those before it, and itself."""

INTERACTIONS = [
    *("sums", "intervals", "neurons", "pairs"),
    *("attention", "effects", "changes", "clusters"),
    "study",
]
"""The rooms within that one, likewise."""

OUTSIDE = {"__init__", "__main__"}
"""The doors of the package: they may look into any room."""

FREE = {"crosslens.__version__"}
"""Names of the package itself that are no room."""


def room_of(file: Path, package: Path) -> str:
    return file.relative_to(package).with_suffix("").parts[0]


def imported(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything `file` imports, wherever the statement stands."""
    here = (package.name, *file.relative_to(package).with_suffix("").parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = ".".join(here[:-level]) if level else ""
                origin = ".".join(part for part in (above, module) if part)
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def wrong_ways(package: Path, within: str = "", rooms: list[str] = ROOMS) -> list[str]:
    """Imports that point down, from one room into another that comes after it: of the package, or
    of those `within` one of its rooms."""
    found = []
    house = (package.name, *within.split())
    for file in sorted((package / within).rglob("*.py")):
        room = room_of(file, package / within)
        if room in OUTSIDE:
            continue
        if room not in rooms:
            found.append(f"{room}: a room that is not in the list")
            continue
        above = rooms[: rooms.index(room) + 1]
        for line, name in imported(file, package):
            parts = (*name.split("."), "")
            inside = parts[: len(house)] == house and name not in FREE
            if inside and parts[len(house)] not in above:
                found.append(f"{file.relative_to(package)}:{line} imports {name}")
    return found


def test_imports_point_one_way() -> None:
    assert wrong_ways(PACKAGE) == []


def test_imports_within_interactions_point_one_way() -> None:
    assert wrong_ways(PACKAGE, "interactions", INTERACTIONS) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import crosslens.training",
        "import torch, crosslens.training.fit as fit",
        "from crosslens.training import fit",
        "from crosslens import training",
        "from crosslens import load",
        "import crosslens",
        "from ..training import fit",
        "from .. import training",
        "def f():\n    from crosslens.training import fit",
        "if TYPE_CHECKING:\n    from crosslens.training import fit",
        "import importlib\nimportlib.import_module('crosslens.training')",
    ],
)
def test_a_wrong_way_is_found(tmp_path: Path, statement: str) -> None:
    package = tmp_path / "crosslens"
    (package / "coder").mkdir(parents=True)
    file = package / "coder" / "layout.py"
    file.write_text(statement)
    assert len(wrong_ways(package)) == 1
    file.write_text("from crosslens.errors import UsageError\nfrom . import fold\nimport torch\n")
    assert wrong_ways(package) == []
    file.write_text("from crosslens import __version__\nfrom crosslens import functional as F\n")
    assert wrong_ways(package) == []


def test_an_unknown_room_is_found(tmp_path: Path) -> None:
    (tmp_path / "crosslens").mkdir()
    (tmp_path / "crosslens" / "utils.py").write_text("")
    assert wrong_ways(tmp_path / "crosslens") == ["utils: a room that is not in the list"]


def test_functional_needs_only_torch_and_notation() -> None:
    allowed = {"torch", "einops", "jaxtyping", *sys.stdlib_module_names}
    files = sorted((PACKAGE / "functional").rglob("*.py"))
    assert files
    for file in files:
        for line, name in imported(file, PACKAGE):
            own = name.startswith("crosslens.functional")
            assert own or name.split(".")[0] in allowed, f"{file.name}:{line} imports {name}"


HEAVY = {"torch", "transformers", "datasets", "numpy", "tyro", "rich", "cattrs", "yaml"}


@pytest.mark.parametrize(
    "program",
    [
        "import crosslens, crosslens.cli",
        "from crosslens.cli import main; assert main(['--help']) == 0",
        "from crosslens.cli import main; assert main(['--version']) == 0",
        "from crosslens.cli import main; assert main(['trian']) == 2",
    ],
)
def test_starting_loads_nothing_heavy(program: str) -> None:
    report = "import json, sys; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{report}"], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "crosslens" in loaded
    assert not HEAVY & loaded

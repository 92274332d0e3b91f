"""docs/equations.md names tests: they are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "equations.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(test_\w+)(?:::(test_\w+))?`", PAGE)
DEFINED = {
    path.stem: set(re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.M))
    for path in TESTS.glob("test_*.py")
}


@pytest.mark.parametrize(("first", "second"), sorted(set(NAMED)))
def test_what_is_named_is_there(first, second):
    if second:
        assert second in DEFINED[first]
    else:
        assert any(first in names for names in DEFINED.values())


def test_there_are_some():
    assert len(NAMED) > 80

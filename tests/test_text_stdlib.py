"""The standard library as text and as chat rows."""

from __future__ import annotations

import ast
import itertools
import sysconfig
from pathlib import Path

import pytest

from crosslens.errors import CrosslensError
from crosslens.text.documents import Document
from crosslens.text.stdlib import read_stdlib, read_stdlib_chat, stdlib_files
from crosslens.text.stdlib_chat import chat_rows


def test_standard_library_files_are_sorted_sources_without_tests():
    root = Path(sysconfig.get_paths()["stdlib"])
    files = stdlib_files()
    names = [path.relative_to(root).as_posix() for path in files]
    assert files == sorted(files)
    assert {"json/decoder.py", "argparse.py", "asyncio/tasks.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}


def test_unreadable_standard_library_files_are_passed_over(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "no.py").write_text("x = 2\n")
    assert list(read_stdlib("0", tmp_path)) == [
        Document(content="x = 1\n", provenance="stdlib/good.py")
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CrosslensError, match="no source files"):
        stdlib_files(tmp_path / "empty")


def test_standard_library_is_whole_and_in_the_order_of_the_seed():
    one, again, other = (list(itertools.islice(read_stdlib(s), 5)) for s in ("1", "1", "2"))
    assert one == again
    assert one != other
    for document in one:
        path = Path(sysconfig.get_paths()["stdlib"], document.provenance.removeprefix("stdlib/"))
        assert document.content == path.read_text(encoding="utf-8")


SOURCE = '''
class Stack:
    """A last-in first-out pile of things. It grows as needed."""

    @property
    def top(self):
        """Return the thing that was put on the pile last.

        Raises IndexError if there is none.
        """

        if not self.things:
            raise IndexError("the stack is empty")
        return self.things[-1]

    def short(self):
        """Too little code to be an answer."""
        pass

    def undocumented(self, a, b):
        return [thing for thing in self.things if a < thing < b or thing is None]

def load(path, *, strict=True) -> dict:
    """load(path, strict) -> dict

    Read a settings file of lines `key = value` at the given path
    """
    with open(path) as lines:
        return dict(line.split(" = ") for line in lines)
'''


def test_chat_rows_ask_for_what_the_docstring_says_and_answer_with_the_code():
    rows = dict(chat_rows(SOURCE, "stdlib/stack.py"))
    assert set(rows) == {"Stack", "Stack.top", "load"}
    for name, (request, answer) in rows.items():
        assert (request["role"], answer["role"]) == ("user", "assistant")
        code = answer["content"].split("```python\n")[1].removesuffix("\n```")
        (node,) = ast.parse(code).body
        assert node.name == name.split(".")[-1]
        assert name.split(".")[-1] in request["content"]
    assert "last-in first-out pile of things." in rows["Stack"][0]["content"]
    assert "Return the thing that was put on the pile last." in rows["Stack.top"][0]["content"]
    assert "Raises" not in rows["Stack.top"][0]["content"]
    assert "@property" in rows["Stack.top"][1]["content"]
    assert (
        "Read a settings file of lines `key = value` at the given path."
        in (rows["load"][0]["content"])
    )


def test_answers_without_docstring_are_the_same_code():
    original = {
        node.name: node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)
    }
    docstrings = set()
    for place in range(60):  # the wording depends on where the source is from
        row = dict(chat_rows(SOURCE, f"stdlib/{place}.py"))["Stack.top"]
        code = row[1]["content"].split("```python\n")[1].removesuffix("\n```")
        (node,) = ast.parse(code).body
        docstrings.add(ast.get_docstring(node) is not None)
        body = node.body[1:] if ast.get_docstring(node) else node.body
        assert [ast.dump(part) for part in body] == [
            ast.dump(part) for part in original["top"].body[1:]
        ]
    assert docstrings == {True, False}


def test_source_that_is_no_python_gives_no_rows():
    assert list(chat_rows("print 'old'", "x")) == []
    assert list(chat_rows("\0", "x")) == []
    assert list(chat_rows("x = '\\d'\n", "x")) == []  # a SyntaxWarning is not ours to show


def test_chat_rows_come_from_many_files_and_know_theirs():
    rows = list(itertools.islice(read_stdlib_chat("0"), 300))
    files = [row.provenance.split(":")[0] for row in rows]
    assert len(set(files)) >= 50
    root = Path(sysconfig.get_paths()["stdlib"])
    for row, file in itertools.islice(zip(rows, files, strict=True), 10):
        assert row.family == (root / file.removeprefix("stdlib/")).read_text(encoding="utf-8")


def test_every_chat_row_comes_once(tmp_path):
    many = "\n".join(
        SOURCE.replace("Stack", f"Stack{i}").replace("load", f"l{i}") for i in range(9)
    )
    (tmp_path / "many.py").write_text(many)
    (tmp_path / "few.py").write_text(SOURCE)
    names = [row.provenance for row in read_stdlib_chat("0", tmp_path)]
    assert sorted(names) == sorted(
        [f"stdlib/many.py:{name}" for name, _ in chat_rows(many, "")]
        + [f"stdlib/few.py:{name}" for name, _ in chat_rows(SOURCE, "")]
    )
    assert len(names) == 30

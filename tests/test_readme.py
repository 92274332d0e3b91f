"""What the README shows works as it stands, on a smaller model; and the docs' train commands are
understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from crosslens.cli import COMMANDS, main
from crosslens.training import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def trainings(page: str) -> list[list[str]]:
    """The arguments of each `crosslens train` of a file in docs that a page shows."""
    found = []
    for start in (m.end() for m in re.finditer("crosslens train (?=--config docs/)", page)):
        in_block = page[:start].count("```") % 2 == 1
        rest = page[start:].replace("\\\n", " ")
        found.append(shlex.split(rest[: rest.index("\n" if in_block else "`")], comments=True))
    return found


SHOWN = [
    pytest.param(arguments, id=f"{page.name}-{n}")
    for page in sorted((ROOT / "docs").rglob("*.md"))
    for n, arguments in enumerate(trainings(page.read_text(encoding="utf-8")))
]


def test_the_python_runs(tmp_path, tiny_model_folder, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    smaller = {
        'path="smollm2"': f'path={str(tiny_model_folder)!r}, device="cpu"',
        '"resid_mid.8", "resid_mid.16", "resid_mid.24"': '"resid_mid.1", "resid_mid.2"',
        "FitConfig(steps=300)": 'FitConfig(steps=25, batch=64, device="cpu"), '
        "text=TextConfig(tokens=1500, heldout=300, block=32)",
    }
    for old, new in smaller.items():
        assert old in block
        block = block.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec("from crosslens.text import TextConfig\n" + block, {})
    shape, counts = capsys.readouterr().out.split("]) ", 1)
    assert shape.startswith(f"torch.Size([{len(re.findall('[0-9]+', counts))}, 4096")


def test_its_commands_exist():
    shown = set(re.findall(r"^crosslens (\w+)", README, flags=re.MULTILINE))
    shown |= set(re.findall(r"`crosslens (\w+)", README))
    assert shown <= set(COMMANDS)
    assert {"train", "evaluate", "report", "show", "resume", "doctor"} <= shown


def test_its_train_line_is_understood(capsys):
    (line,) = re.findall(r"^crosslens train (.*)$", README, flags=re.MULTILINE)
    assert main(["train", *line.replace("'", "").split(), "--print-config"]) == 0
    assert "Qwen/Qwen2.5-0.5B" in capsys.readouterr().out
    assert TrainConfig().sites != ("resid_post.*",)


def test_trainings_are_found_in_lines_and_blocks():
    page = (
        "`crosslens train --config docs/a.yaml\n--seed 1` and `crosslens train --config b.yaml`\n"
        "```\ncrosslens train --config docs/c.yaml --out 'x y' \\\n  --seed 2  # why\nother\n```\n"
    )
    assert trainings(page) == [
        ["--config", "docs/a.yaml", "--seed", "1"],
        ["--config", "docs/c.yaml", "--out", "x y", "--seed", "2"],
    ]
    assert SHOWN


@pytest.mark.parametrize("arguments", SHOWN)
def test_the_configurations_that_the_docs_train_are_understood(arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["train", *arguments, "--print-config"]) == 0
    assert "wiring" in capsys.readouterr().out

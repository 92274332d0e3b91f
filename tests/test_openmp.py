"""How the command has torch's threads wait."""

from __future__ import annotations

import subprocess
import sys

import pytest

from crosslens.openmp import FEW, SPINS, give_way


def test_threads_give_way_where_nobody_has_said_otherwise(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environ = {"PATH": "x"}
    assert give_way(environ)
    assert environ == {"PATH": "x", SPINS: FEW}


@pytest.mark.parametrize("said", [{SPINS: "0"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_what_the_user_said_is_kept(said, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environ = dict(said)
    assert not give_way(environ)
    assert environ == said


def test_torch_that_is_loaded_has_read_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)
    environ: dict[str, str] = {}
    assert not give_way(environ)
    assert environ == {}


def test_the_command_says_it_before_torch_is_loaded(monkeypatch):
    for name in (SPINS, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    code = (
        "import os, sys; from crosslens.cli import main; main(['--version']); "
        f"print('torch' in sys.modules, os.environ['{SPINS}'])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == f"False {FEW}"

"""Freed memory is kept for the next step."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from crosslens.cli.memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "kept" else "-")
for _ in range(3):
    torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="glibc only",
)
def test_large_tensors_do_not_fault_their_pages_in_again():
    faults = {}
    for form in ("kept", "given back"):
        done = subprocess.run(
            [sys.executable, "-c", COUNT, form], capture_output=True, text=True, check=True
        )
        told, count = done.stdout.split()
        faults[form] = int(count)
        assert told == ("True" if form == "kept" else "-")
    assert faults["kept"] < faults["given back"] / 10

"""Freed memory is kept for the next step."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

WHERE = """
import sys, torch
from crosslens.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
address = torch.ones(7_000_000).data_ptr()
heap = next(line.split()[0] for line in open("/proc/self/maps") if "[heap]" in line)
first, last = (int(edge, 16) for edge in heap.split("-"))
print(first <= address < last)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="glibc only",
)
@pytest.mark.parametrize(("form", "in_heap"), [("kept", "True"), ("given back", "False")])
def test_large_tensors_live_where_freed_memory_is_kept(form, in_heap):
    """Outside the heap each is a mapping of its own, which goes when the tensor does."""
    done = subprocess.run(
        [sys.executable, "-c", WHERE, form], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == in_heap

"""How this process treats memory that it has freed."""

from __future__ import annotations

import ctypes
import sys

KEPT = 1 << 30
"""Bytes that may lie free at the end of the heap, and the largest block that is taken from it."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers for these settings (malloc.h)."""


def keep_freed_memory() -> bool:
    """Have glibc keep up to a gigabyte of freed memory; True if it will.

    A training step and a model's forward pass take and free the same large tensors again and again.
    By default glibc returns each to the system, which hands it out again page by page, zeroed.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = (MMAP_THRESHOLD, TRIM_THRESHOLD)
    return all(library.mallopt(setting, KEPT) == 1 for setting in settings)

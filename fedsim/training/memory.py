"""Main memory for stacks, which are freed and wanted again round after round."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of settings, in <malloc.h> of the GNU C library."""

HEAP_ITEM = 2**25
"""Bytes up to which memory comes from the heap, the most there can be: what is larger goes back to the system at once.
"""

HELD = 2**28
"""Free bytes at the heap's end beyond which they go back to the system. What lies below something in use stays anyway.
"""

SETTINGS = (
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES",
)  # fmt: skip
"""Variables by which a user says what the heap does."""


def hold_freed() -> bool:
    """Have the C library keep some of the memory that is freed: to get it anew costs microseconds for every 4 KB, on a
    virtual machine as much as training on it.

    Returns:
        Whether it does so now; not with another C library, nor where the user has set what it does.
    """
    if _is_users():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, HEAP_ITEM) and mallopt(M_TRIM_THRESHOLD, HELD))


def release_freed() -> None:
    """Have the C library give back to the system what :func:`hold_freed` has made it keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and not _is_users():
        trim(0)


def _is_users() -> bool:
    """Whether the user has set what the heap does."""
    return any(name in os.environ for name in SETTINGS)

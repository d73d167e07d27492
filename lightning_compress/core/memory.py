"""The memory of freed tensors, kept for the next ones while a model is run again and again.

The C library gives blocks of more than 32 MiB back after every layer, and the kernel clears them again before the
next: a third of the time of a forward and a backward pass over large images on a few cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3)."""
KEPT = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
"""While memory is kept."""
USUAL = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 * 2**20, M_TRIM_THRESHOLD: 64 * 2**20}
"""Afterwards: what the library's own thresholds rise to once large tensors have been freed."""

_inside: list[None] = []
"""One entry for every `freed_memory_kept` that is open."""


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keeps freed memory in the process, and gives it back at the end; may be nested.

    Does nothing without glibc, or where the environment sets its allocator.
    """
    library = _library()
    if library is None:
        yield
        return
    _inside.append(None)
    try:
        for parameter, value in KEPT.items():
            library.mallopt(parameter, value)
        yield
    finally:
        _inside.pop()
        if not _inside:
            for parameter, value in USUAL.items():
                library.mallopt(parameter, value)
            library.malloc_trim(0)


def _library() -> ctypes.CDLL | None:
    own = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    return None if own or platform.libc_ver()[0] != "glibc" else ctypes.CDLL(None)

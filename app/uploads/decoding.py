"""A lock to decode one image at a time, as each may take hundreds of megabytes."""

from __future__ import annotations

import ctypes
import sys
import threading

DECODING = threading.Lock()  # held for as long as an image lies in memory at its full size
_MMAP_THRESHOLD, _OWN_BYTES = -3, 2**20  # glibc's M_MMAP_THRESHOLD


def return_freed_memory() -> None:
    """Return the memory of decoded images to the system immediately; glibc alone keeps it per thread."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _OWN_BYTES)

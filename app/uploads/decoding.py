"""Images are decoded one at a time: each may take some hundred megabytes, and many browsers may bring one at once."""

from __future__ import annotations

import ctypes
import sys
import threading

DECODING = threading.Lock()  # held for as long as an image lies in memory at its full size
_MMAP_THRESHOLD, _OWN_BYTES = -3, 2**20  # glibc's M_MMAP_THRESHOLD


def return_freed_memory() -> None:
    """Have what an image took be given back to the system at once. Only glibc keeps it, for each thread."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _OWN_BYTES)

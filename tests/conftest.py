"""Before any test imports a kernel: Triton interprets them where no card is. @triton.jit decides when it runs, and one
process cannot do both. On a card, TRITON_INTERPRET=1 asks for the interpreter all the same.
"""

from __future__ import annotations

import ctypes
import os


def has_card() -> bool:
    """Without torch, whose import takes seconds that most tests do not need."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


if not has_card():
    os.environ["TRITON_INTERPRET"] = "1"

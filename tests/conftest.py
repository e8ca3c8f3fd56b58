"""Before any test imports a kernel: Triton interprets them where no card is. @triton.jit decides when it runs, and one
process cannot do both. On a card, TRITON_INTERPRET=1 asks for the interpreter all the same.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import shutil
import tempfile

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # where kernels alone are tested
    pass
else:  # how long an example takes on a busy machine is no property of what it tests
    settings.register_profile("diptych", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("diptych")

# No test, and no command that one starts, writes where this user's keys and files are.
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="diptych-tests-data-")
atexit.register(shutil.rmtree, os.environ["XDG_DATA_HOME"], ignore_errors=True)


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


def pytest_collection_finish() -> None:
    """Thousands of tests are no garbage: to look through them again and again stops what a test measures or bounds."""
    gc.collect()
    gc.freeze()

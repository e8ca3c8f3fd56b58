"""Where kernels run in tests: on the CPU under Triton's interpreter, or on a card; ../conftest.py decides.

Tests that need a card, those of bfloat16 among them, carry the marker `gpu`.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _mend_interpreter() -> None:
    """Triton 3.6 makes a loop bound of an array of one element by int(), which numpy 2.4 refuses."""
    import triton

    if not triton.__version__.startswith("3.6.") or np.lib.NumpyVersion(np.__version__) < "2.4.0":
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    _mend_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device and kernels that are compiled"))


@pytest.fixture(scope="session")
def place() -> torch.device:
    """Where kernels run: the card, or the CPU under the interpreter."""
    return torch.device("cpu" if INTERPRETED else "cuda")

"""The platform seam: which implementation of each op runs on which device type.

An entry names a module of the op's folder: `reference` (plain torch, any device), `cpu`, or `cuda` (Triton, cuBLAS).
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from diptych.protos.errors import StartupError

IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "cpu": {
        "paged_attention": "cpu",
        "qk_write": "reference",
        "kv_write": "cpu",
        "sampling": "cpu",
        "logprobs": "cpu",
        "linear": "cpu",
        "rotate": "cpu",
        "rms_norm": "cpu",
        "add_norm": "reference",
        "silu_mul": "reference",
        "moe": "reference",
        "step_inputs": "reference",
    },
    "cuda": {
        "paged_attention": "cuda",
        "qk_write": "cuda",
        "kv_write": "cpu",
        "sampling": "cuda",
        "logprobs": "cuda",
        "linear": "cuda",
        "rotate": "cuda",
        "rms_norm": "cuda",
        "add_norm": "cuda",
        "silu_mul": "cuda",
        "moe": "cuda",
        "step_inputs": "cuda",
    },
}


@cache
def implementation(op: str, device_type: str) -> ModuleType:
    """The module that implements `op` on `device_type`; StartupError names the supported types."""
    row = IMPLEMENTATIONS.get(device_type)
    if row is None or op not in row:
        known = ", ".join(sorted(name for name, ops in IMPLEMENTATIONS.items() if op in ops))
        raise StartupError(f"{op} has no implementation for device type {device_type!r}; it has for: {known}.")
    return importlib.import_module(f"..{op}.{row[op]}", __name__)

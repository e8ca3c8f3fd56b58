"""Random weights instead of a checkpoint's, made in memory: a model's shape decides its speed. For benchmarks.

Called by model.py. The numbers depend on the seed, the model's configuration and the kind of device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


def allocate_parameters(module: nn.Module, device: torch.device) -> None:
    """Give every parameter of a module on the meta device memory on `device`, not yet filled; ties are kept."""
    for name, parameter in list(module.named_parameters()):
        owner_name, _, leaf = name.rpartition(".")
        memory = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
        module.get_submodule(owner_name)._parameters[leaf] = memory
    tie: Any = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators start from `seed` inside and are as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def random_digest(folder: Path, seed: int) -> bytes:
    """Stands for weights.weights_digest where the weights are random."""
    return hashlib.sha256(b"random %d " % seed + (folder / "config.json").read_bytes()).digest()

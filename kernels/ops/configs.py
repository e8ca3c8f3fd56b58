"""Launch tables: which tile sizes a kernel runs with, by op and shape. Looking up never times anything.

Order: what `diptych bench kernels --tune` found on this very card (tuning.py), the exact row here, the nearest row here.
The rows were measured on one NVIDIA H200 in graphs with weights out of the cache, and stand in for cards without rows
of their own. An op adds its rows to MEASURED; the meaning of a shape's numbers is the op's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple


class Config(NamedTuple):
    """One launch: tile of a block, in how many parts a sum is split, warps, pipeline stages. Unused sizes are 0."""

    block_m: int
    block_n: int
    block_k: int
    split: int
    warps: int
    stages: int


LIBRARY: Final = Config(0, 0, 0, 0, 0, 0)  # a row that says: the library's own kernel (cuBLAS) is faster here

MEASURED: dict[str, dict[tuple[int, ...], Config]] = {
    # (rows, outs, ins): y = x @ W.T with partial sums left to the next kernel, 2026-11-22. cuBLAS in the same run:
    # 1 row 16.0, 13.4, 56.3, 32.1, 247.8 us for the shapes of llama-8b in this order; ours 14.9, 10.0, 56.3, 29.1, 235.0
    "linear": {
        (1, 6144, 4096): Config(16, 128, 128, 2, 8, 4),
        (16, 6144, 4096): Config(16, 128, 128, 2, 8, 4),
        (64, 6144, 4096): LIBRARY,  # 16.7 against 17.3
        (1, 4096, 4096): Config(16, 64, 128, 2, 4, 5),
        (16, 4096, 4096): Config(16, 64, 128, 2, 4, 5),
        (64, 4096, 4096): Config(64, 64, 128, 2, 4, 5),
        (1, 28672, 4096): Config(16, 64, 128, 1, 4, 4),
        (16, 28672, 4096): Config(16, 64, 128, 1, 4, 4),
        (64, 28672, 4096): Config(64, 128, 128, 1, 8, 4),
        (1, 4096, 14336): Config(16, 64, 128, 4, 4, 4),
        (16, 4096, 14336): Config(16, 64, 128, 2, 4, 5),
        (64, 4096, 14336): Config(64, 64, 128, 2, 4, 5),
        (1, 128256, 4096): Config(16, 64, 128, 1, 4, 4),
        (16, 128256, 4096): Config(16, 64, 128, 1, 4, 4),
        (64, 128256, 4096): Config(64, 128, 128, 1, 8, 4),
        (1, 5120, 2048): Config(16, 64, 128, 2, 4, 5),
        (16, 5120, 2048): Config(16, 64, 128, 1, 4, 4),
        (64, 5120, 2048): LIBRARY,  # 8.5 against 9.3
        (1, 2048, 4096): Config(16, 64, 128, 8, 4, 4),
        (16, 2048, 4096): Config(16, 64, 128, 4, 4, 4),
        (64, 2048, 4096): Config(64, 64, 128, 4, 4, 4),
    },
}

_tuned: dict[str, dict[tuple[int, ...], Config]] = {}
_found: dict[tuple[str, tuple[int, ...]], Config] = {}


def choose(op: str, shape: tuple[int, ...]) -> Config:
    """The configuration of `op` for `shape`. KeyError: the op has no rows."""
    found = _found.get((op, shape))
    if found is None:
        found = _tuned.get(op, {}).get(shape) or nearest(MEASURED[op], shape)
        _found[op, shape] = found
    return found


def nearest(rows: Mapping[tuple[int, ...], Config], shape: tuple[int, ...]) -> Config:
    """The row whose shape differs by the smallest factors; of equally near ones the first. ValueError: no rows."""
    exact = rows.get(shape)
    if exact is not None:
        return exact

    def distance(other: tuple[int, ...]) -> float:
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(shape, other, strict=True))

    return rows[min(rows, key=distance)]


def use_tuned(rows: Mapping[str, Mapping[tuple[int, ...], Config]]) -> None:
    """Prefer these rows, by op, from now on to the ones here. Graphs that were captured keep theirs."""
    _tuned.clear()
    _tuned.update({op: dict(found) for op, found in rows.items()})
    _found.clear()

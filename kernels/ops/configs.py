"""Launch tables: which tile sizes a kernel runs with, by op and shape. Looking up never times anything.

Order: what `diptych bench kernels --tune` found on this very card (tuning.py), the row of this shape, the nearest row.
The rows were measured on one NVIDIA H200 in graphs with weights out of the cache, and stand in for cards without rows
of their own. An op adds its rows to MEASURED; the meaning of a shape's numbers is the op's.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch

log = logging.getLogger(__name__)


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
    # (rows, outs, ins): y = x @ W.T, partial sums left to the next kernel. 2026-11-22; us of cuBLAS, ours
    "linear": {
        (1, 6144, 4096): Config(16, 64, 128, 2, 4, 4),  # 16.1, 14.3
        (16, 6144, 4096): Config(16, 64, 128, 2, 4, 4),  # 16.6, 14.5
        (32, 6144, 4096): Config(32, 64, 128, 1, 4, 5),  # 16.0, 15.4
        (64, 6144, 4096): Config(64, 64, 128, 1, 4, 5),  # 16.4, 16.3
        (128, 6144, 4096): LIBRARY,  # 16.7, 18.9
        (1, 4096, 4096): Config(16, 64, 128, 2, 4, 5),  # 13.4, 10.0
        (16, 4096, 4096): Config(16, 64, 128, 2, 4, 5),  # 13.5, 10.0
        (32, 4096, 4096): Config(32, 64, 128, 2, 4, 5),  # 13.9, 10.4
        (64, 4096, 4096): Config(64, 64, 128, 2, 4, 5),  # 11.9, 11.1
        (128, 4096, 4096): LIBRARY,  # 14.1
        (1, 28672, 4096): Config(16, 64, 128, 1, 4, 4),  # 57.6, 55.0
        (16, 28672, 4096): LIBRARY,  # 56.1
        (32, 28672, 4096): LIBRARY,  # 56.9
        (64, 28672, 4096): LIBRARY,  # 60.6, 61.4
        (128, 28672, 4096): LIBRARY,  # 65.5
        (1, 4096, 14336): Config(16, 64, 128, 2, 4, 5),  # 31.7, 29.0
        (16, 4096, 14336): Config(16, 64, 128, 2, 4, 5),  # 32.9, 29.9
        (32, 4096, 14336): Config(32, 64, 128, 2, 4, 5),  # 32.7, 30.4
        (64, 4096, 14336): Config(64, 64, 128, 2, 4, 5),  # 36.6, 31.7
        (128, 4096, 14336): Config(128, 64, 128, 2, 4, 4),  # 37.7, 35.2
        (1, 5120, 2048): Config(16, 64, 128, 2, 4, 4),  # 8.3, 7.8
        (16, 5120, 2048): Config(16, 64, 128, 1, 4, 5),  # 9.0, 7.9
        (32, 5120, 2048): LIBRARY,
        (64, 5120, 2048): LIBRARY,  # 8.5, 9.3
        (128, 5120, 2048): LIBRARY,
        (1, 2048, 4096): Config(16, 64, 128, 4, 4, 5),  # 9.6, 6.3
        (16, 2048, 4096): Config(16, 64, 128, 4, 4, 4),  # 9.9, 6.6
        (32, 2048, 4096): Config(32, 64, 128, 4, 4, 5),  # 9.9, 6.8
        (64, 2048, 4096): Config(64, 64, 128, 4, 4, 4),  # 10.4, 7.2
        (128, 2048, 4096): LIBRARY,  # 10.2, 9.9 in eight parts, which cost the next kernel more
    },
    # (rows, outs, ins): the same with whole sums
    "linear_whole": {
        (1, 128256, 4096): Config(16, 64, 128, 1, 4, 4),  # 240.6, 232.2
        (16, 128256, 4096): Config(16, 128, 128, 1, 4, 3),  # 244.3, 236.5
        (32, 128256, 4096): Config(32, 128, 128, 1, 8, 4),  # 255.5, 242.6
        (64, 128256, 4096): Config(64, 128, 128, 1, 8, 4),  # 270.8, 251.0
        (128, 128256, 4096): LIBRARY,  # 266.3
        (1, 151936, 2048): Config(16, 64, 128, 1, 4, 5),  # 144.4, 137.7
        (64, 151936, 2048): LIBRARY,  # 156.1
        (128, 151936, 2048): LIBRARY,
        (1, 28672, 4096): Config(16, 64, 128, 1, 4, 4),
        (16, 28672, 4096): LIBRARY,
        (1, 4096, 4096): LIBRARY,
        (128, 4096, 4096): LIBRARY,
    },
    # (16 * pairs / experts, outs, ins): both projections of the experts; block_m is the first's. Rows 1 to 4,096 are so
    # many tokens of qwen3-30b-a3b (128 experts, 8 a token). The row of 256 was not measured.
    "moe_up": {
        (1, 768, 2048): Config(16, 64, 128, 0, 4, 4),
        (8, 768, 2048): Config(16, 32, 128, 0, 4, 4),
        (64, 768, 2048): Config(16, 128, 128, 0, 4, 3),
        (128, 768, 2048): Config(16, 128, 128, 0, 4, 3),
        (256, 768, 2048): Config(32, 64, 128, 0, 4, 3),
        (512, 768, 2048): Config(64, 64, 64, 0, 4, 3),
        # 4,096 tokens: 454 us by 128 x 64 in 3 stages, 429 so, 424 with weights by TMA; 8,192: 799, 769 so, 843 in 4.
        (4096, 768, 2048): Config(128, 128, 64, 0, 8, 4),
        (8192, 768, 2048): Config(128, 128, 64, 0, 8, 3),
    },
    "moe_down": {
        (1, 2048, 768): Config(16, 64, 128, 0, 4, 3),
        (8, 2048, 768): Config(16, 64, 128, 0, 4, 3),
        (64, 2048, 768): Config(16, 64, 128, 0, 4, 3),
        (128, 2048, 768): Config(16, 64, 128, 0, 4, 3),
        (256, 2048, 768): Config(32, 128, 64, 0, 4, 4),
        (512, 2048, 768): Config(64, 128, 64, 0, 8, 4),
        (4096, 2048, 768): Config(128, 256, 64, 0, 8, 4),
        (8192, 2048, 768): Config(128, 256, 64, 0, 8, 3),
    },
    # (rows, head size, bytes a number): attention of rows with one new token; block_n: keys of a tile.
    "attend_rows": {
        (1, 128, 2): Config(16, 128, 0, 0, 4, 3),
        (1, 136, 2): Config(16, 64, 0, 0, 4, 3),
        (1, 256, 2): Config(16, 64, 0, 0, 4, 3),
        (64, 64, 2): Config(16, 64, 0, 0, 4, 3),
        (64, 128, 2): Config(16, 64, 0, 0, 4, 3),
        (64, 256, 2): Config(16, 32, 0, 0, 4, 3),
        # float32 is multiplied without tensor cores: wider tiles spill 100 to 12,000 bytes a thread (Triton 3.6).
        (1, 128, 4): Config(16, 16, 0, 0, 4, 2),
        (1, 256, 4): Config(16, 16, 0, 0, 4, 2),
        (64, 128, 4): Config(16, 16, 0, 0, 4, 2),
        (64, 256, 4): Config(16, 16, 0, 0, 4, 2),
    },
    # (head size, bytes a number): attention of prompts; tile of queries and of keys.
    "attend_prompts": {
        (64, 2): Config(64, 64, 0, 0, 4, 3),
        # Against 64 x 64 in 3 stages 1,079 and 1,120 us at 1 x 8,192; 128 x 128 in 2 stages 1,209. It takes nearly all
        # of a multiprocessor's shared memory, and heads beyond 128 are computed as 256 wide.
        (128, 2): Config(128, 128, 0, 0, 8, 3),
        (136, 2): Config(64, 64, 0, 0, 4, 3),
        (256, 2): Config(64, 32, 0, 0, 4, 3),
        (64, 4): Config(32, 32, 0, 0, 4, 2),
        (80, 4): Config(16, 16, 0, 0, 4, 2),
        (128, 4): Config(16, 16, 0, 0, 4, 2),
        (256, 4): Config(16, 16, 0, 0, 4, 2),
    },
    # The same where all rows go through one kernel, one token as well as many.
    "attend_tiles": {
        (64, 2): Config(64, 64, 0, 0, 4, 3),
        (128, 2): Config(64, 64, 0, 0, 4, 3),
        (256, 2): Config(64, 32, 0, 0, 4, 3),
        (64, 4): Config(32, 32, 0, 0, 4, 2),
        (80, 4): Config(16, 16, 0, 0, 4, 2),
        (128, 4): Config(16, 16, 0, 0, 4, 2),
        (256, 4): Config(16, 16, 0, 0, 4, 2),
    },
}

_tuned: dict[str, dict[tuple[int, ...], Config]] | None = None  # None: the file was not looked for yet
_found: dict[tuple[str, tuple[int, ...]], Config] = {}


def choose(op: str, shape: tuple[int, ...]) -> Config:
    """The configuration of `op` for `shape` on the current card. KeyError: the op has no rows."""
    found = _found.get((op, shape))
    if found is None:
        tuned = read_tuned() if _tuned is None else _tuned
        found = tuned.get(op, {}).get(shape) or nearest(MEASURED[op], shape)
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


def tuned_file() -> Path | None:
    """Where the tuned rows of the current card and this Triton lie; None without a card."""
    if not torch.cuda.is_available():
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    card = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name())
    major, minor = torch.cuda.get_device_capability()
    version = importlib.metadata.version("triton")
    return cache / "diptych" / "kernels" / f"{card}-sm{major}{minor}-triton{version}.json"


def read_tuned() -> dict[str, dict[tuple[int, ...], Config]]:
    """What was tuned on this card, from now on preferred by `choose`. A file that is not one of ours counts as none,
    with a warning. Graphs that were captured keep what they have.
    """
    global _tuned
    path = tuned_file()
    rows: dict[str, dict[tuple[int, ...], Config]] = {}
    if path is not None and path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = {
                op: {tuple(map(int, shape)): _config(config) for shape, config in pairs} for op, pairs in found.items()
            }
        except (OSError, ValueError, TypeError, AttributeError) as exc:
            log.warning("tuned launch tables are not used: %s: %s", path, exc)
    _tuned = rows
    _found.clear()
    return rows


def _config(numbers: Iterable[int]) -> Config:
    found = Config(*map(int, numbers))
    return LIBRARY if found == LIBRARY else found  # it is told by identity


def write_tuned(rows: Mapping[str, Mapping[tuple[int, ...], Config]]) -> Path:
    """Add these rows to the file of the current card, of which there must be one; `choose` reads it from now on."""
    path = tuned_file()
    assert path is not None
    merged = read_tuned()
    for op, found in rows.items():
        merged.setdefault(op, {}).update(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    lines = {
        op: [[list(shape), list(config)] for shape, config in sorted(found.items())] for op, found in merged.items()
    }
    written.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    written.replace(path)
    read_tuned()
    return path

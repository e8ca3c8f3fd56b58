"""What an op offers to be measured and tuned: `cases(device)` and `trials(device)` of its bench.py, if it has one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .configs import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One that wants its inputs in a form of its own, or plans before it runs: `prepare(*inputs)` is not timed."""

    prepare: Callable[..., tuple[Any, ...]]
    run: Callable[..., object]  # run(*prepared)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call to time. `make()` gives fresh random inputs; it is called until they outgrow the card's cache."""

    name: str
    make: Callable[[], tuple[Any, ...]]
    run: Callable[..., object]  # run(*inputs); must be capturable in a graph
    size_bytes: int  # read and written by one call at least
    flop: int = 0  # 0: its bandwidth is what counts
    peers: Mapping[str, Callable[..., object] | Peer] = field(default_factory=dict)  # the same work by somebody else


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One row of a launch table to be found: run(config, *inputs) for each of `configs`, None where one cannot run."""

    op: str
    shape: tuple[int, ...]
    make: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]  # its answer may have one more dimension in front: addends
    wanted: Callable[..., Any]  # wanted(*inputs): the right answer, a float64 tensor
    size_bytes: int
    configs: Sequence[Config]


def benches() -> dict[str, ModuleType]:
    """op -> its bench.py, of every op that has one."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/bench.py"))
    return {name: importlib.import_module(f"..{name}.bench", __name__) for name in folders}

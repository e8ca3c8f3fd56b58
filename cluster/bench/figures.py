"""Numbers for people and machines: quantiles, tables, one line of JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.protos.errors import StartupError

_SMAPS = Path("/proc/self/smaps_rollup")
_SAMPLE_S = 0.5


def quantile(values: Sequence[float], part: float) -> float:
    """The value that `part` of all values do not exceed: one of them, never between two. `values` is not empty."""
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


def spread(values: Sequence[float], digits: int = 2) -> dict[str, float] | None:
    """p50, p90, p99 and the largest; None without values."""
    if not values:
        return None
    parts = {name: quantile(values, part) for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {name: round(value, digits) for name, value in (parts | {"max": max(values)}).items()}


def system() -> str:
    """Whose figures these are."""
    return f"diptych {importlib.metadata.version('diptych')}"


def regime() -> str:
    """A line about the machine, for the head of a table."""
    cores = len(os.sched_getaffinity(0))
    return f"{system()}, Python {platform.python_version()}, {cores} cores, load average {os.getloadavg()[0]:.1f}"


def why_unwritable(out: Path) -> str:
    """Why `write_result` could not write that file, or nothing. What it holds stays; a new one is not left behind."""
    is_new = not out.exists()
    try:
        out.open("a").close()
        if is_new:
            out.unlink()
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""


def write_result(result: Mapping[str, Any], out: Path | None) -> None:
    """The last line of the output, and the same into the file `out`. Raises StartupError."""
    save_result(result, out)
    print(json.dumps(result), flush=True)


def save_result(result: Mapping[str, Any], out: Path | None) -> None:
    """Into the file alone. Raises StartupError."""
    if out is not None:
        try:
            out.write_text(json.dumps(result) + "\n", encoding="utf-8")
        except OSError as exc:
            raise StartupError(f"cannot write --json {out}: {exc.strerror}") from exc


class PeakMemory:
    """The largest proportional set size of this process, sampled twice a second between enter and exit."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, proportional_bytes())
            if self._end.wait(_SAMPLE_S):
                break
        self.peak_bytes = max(self.peak_bytes, proportional_bytes())


def proportional_bytes() -> int:
    """Memory of this process, shared pages divided among those who share them; 0 where the kernel does not tell."""
    with contextlib.suppress(OSError):
        for line in _SMAPS.read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0

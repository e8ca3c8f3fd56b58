"""What a figure was measured on: date, commit, versions, machine, card. Asks git and nvidia-smi; imports no torch.

A machine without either of them is no error: what is not known is null.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "triton", "transformers", "numpy", "grpcio", "ray")
_ASK_S = 10.0
_STANDING = {  # nvidia-smi's name: ours
    "name": "name",
    "driver_version": "driver",
    "memory.total": "memory_mib",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.limit": "power_limit_w",
}
_MOVING = {"clocks.sm": "sm_mhz", "power.draw": "power_w", "temperature.gpu": "celsius", "memory.used": "used_mib"}
_TEXTS = ("name", "driver")
_PERIOD_MS = 500


def provenance() -> dict[str, Any]:
    """Everything, as JSON has it. A second at most."""
    commit, dirty = commit_of(Path(__file__).resolve().parent)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit,
        "dirty": dirty,
        "versions": versions(),
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "card": card(),
    }


def commit_of(folder: Path) -> tuple[str | None, bool | None]:
    """The commit that a folder's sources are at, and whether they were changed since; None where git does not tell."""
    head = _answer(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if head is None:
        return None, None
    changes = _answer(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no", ":/"])
    return head.strip(), None if changes is None else bool(changes.strip())


def versions() -> dict[str, str | None]:
    """Of the packages that decide the speed."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def card() -> dict[str, Any] | None:
    """Name, driver, memory, limits of this machine's first card; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    told = _answer(_query(_STANDING))
    lines = told.splitlines() if told else []
    return _named(_STANDING.values(), lines[0]) if lines else None


class CardWatch:
    """Clock, power, temperature and memory in use of the first card, twice a second between enter and exit.

    Without nvidia-smi there is nothing to see, and `between` says None.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[float, dict[str, Any]]] = []
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> CardWatch:
        if shutil.which("nvidia-smi") is not None:
            command = [*_query(_MOVING), f"--loop-ms={_PERIOD_MS}"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self._thread = threading.Thread(target=self._read, name="card", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None and self._thread is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()
            if self._process.stdout is not None:
                self._process.stdout.close()

    def between(self, began: float, ended: float) -> dict[str, float] | None:
        """Medians and the largest power of what was read between two moments of time.monotonic; None: nothing was."""
        readings = [reading for at, reading in self._seen if began <= at <= ended]
        columns = {
            name: [value for reading in readings if isinstance(value := reading.get(name), (int, float))]
            for name in _MOVING.values()
        }
        found = {name: float(statistics.median(values)) for name, values in columns.items() if values}
        if columns["power_w"]:
            found["power_w_max"] = max(columns["power_w"])
        return found or None

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._seen.append((time.monotonic(), _named(_MOVING.values(), line)))


def _query(names: dict[str, str]) -> list[str]:
    return ["nvidia-smi", "--id=0", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]


def _named(names: Any, line: str) -> dict[str, Any]:
    return {
        name: cell.strip() if name in _TEXTS else _value(cell)
        for name, cell in zip(names, line.split(", "), strict=False)
    }


def _value(cell: str) -> Any:
    """A number where it is one; null for what the driver does not tell ("[N/A]")."""
    text = cell.strip()
    if text.startswith("["):
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "." not in text else number


def _answer(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

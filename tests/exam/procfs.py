"""Processes as /proc shows them: whose child, whether alive, what they are called. Standard library only."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def title_of(pid: int) -> str:
    """The command line; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def started_at(pid: int) -> str | None:
    """Tells two processes of one number apart; None when there is none."""
    found = stat_of(pid)
    return found[19] if found else None


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def lives(pid: int) -> bool:
    """Whether it runs or is stopped; a zombie is dead."""
    found = stat_of(pid)
    return bool(found) and found[0] not in ("Z", "X")


def descendants(pid: int) -> list[int]:
    """The process and all that came from it and are still its family."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (found := stat_of(int(entry))):
            parents.setdefault(int(found[1]), []).append(int(entry))
    family = [pid]
    for member in family:
        family += parents.get(member, [])
    return family


def send(pid: int, number: signal.Signals) -> None:
    """A signal, if it is still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def reap(pid: int) -> None:
    """Of a child that has ended: read its exit code, so that it is no zombie."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass

"""Sees engines die from outside: when, which life, and when the router told that it knew."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from procfs import stat_of
from rig import Process, Rig, RigError

PERIOD_S = 0.01
LATE_S = 0.5  # the router may know of a death before this thread got its time
ROSTER_S = 0.5  # how often the list of engines is asked


@dataclass(frozen=True, slots=True)
class Death:
    """A process that stopped or ended. `at_unix` is late by PERIOD_S at most, `at` the same on time.monotonic."""

    process: Process
    at_unix: float
    at: float
    was_stopped: bool


class Watch:
    """Looks at the engines' processes a hundred times a second, in a thread, until `close`."""

    def __init__(self, rig: Rig) -> None:
        self.deaths: list[Death] = []
        self._rig = rig
        self._began = time.time()
        self._alive: dict[int, Process] = {}
        self.stood_still_s = 0.0  # the longest time that this thread itself did not get
        self._seen: set[int] = set()  # processes that are dead or were stopped
        self._closed = threading.Event()
        self._refresh()
        self._threads = [
            threading.Thread(target=self._look, daemon=True),
            threading.Thread(target=self._ask, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def untrue(self, losses: list[dict[str, Any]]) -> list[str]:
        """Losses since this began of engines that neither ended nor were stopped."""
        true = {(death.process.name, death.process.epoch) for death in self.deaths}
        return [
            f"{loss['engine']} epoch {loss['epoch']}: {loss.get('cause')}"
            for loss in losses
            if loss["at_unix"] >= self._began and (loss["engine"], int(loss["epoch"])) not in true
        ]

    def losses(self) -> list[dict[str, Any]]:
        """What the router tells of engines that it lost: engine, epoch, at_unix, cause."""
        return list(self._rig.get("/info").get("losses", []))

    def detection(self, losses: list[dict[str, Any]]) -> tuple[list[float], list[str]]:
        """Seconds from each death to the router's knowledge of it; and the deaths that it does not tell."""
        found, missing = [], []
        for death in self.deaths:
            told = [
                loss["at_unix"] - death.at_unix
                for loss in losses
                if (loss["engine"], int(loss["epoch"])) == (death.process.name, death.process.epoch)
                and loss["at_unix"] >= death.at_unix - LATE_S
            ]
            if told:
                found.append(max(0.0, min(told)))
            else:
                missing.append(f"{death.process.name} epoch {death.process.epoch}")
        return found, missing

    def _refresh(self) -> None:
        listed = {process.pid: process for process in self._rig.engines()}
        for pid in self._alive.keys() - listed.keys():
            if (stat_of(pid) or ["X"])[0] not in "XZT":
                self._alive.pop(pid, None)  # dismissed: its end is no death
        self._alive |= {pid: process for pid, process in listed.items() if pid not in self._seen}

    def _ask(self) -> None:
        while not self._closed.wait(ROSTER_S):
            try:
                self._refresh()
            except RigError:
                continue  # the router is away

    def _look(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(PERIOD_S):
            late, looked = time.monotonic() - looked, time.monotonic()
            self.stood_still_s = max(self.stood_still_s, late)
            for pid, process in list(self._alive.items()):
                state = (stat_of(pid) or ["X"])[0]
                if state in "XZT" and pid not in self._seen:
                    self._seen.add(pid)
                    self.deaths.append(Death(process, time.time(), time.monotonic(), state == "T"))
                if state in "XZ":
                    self._alive.pop(pid, None)

"""An event loop without a machine below it: time passes only when everybody waits, and then at once.

The real router runs on it unchanged. What would reach outside (sockets, threads, signals) raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn


class NothingToDo(Exception):
    """Everybody waits for somebody, and no timer runs: the run would hang for ever."""


class SimLoop(asyncio.BaseEventLoop):
    """Virtual seconds from 0. It is its own selector: `select` is where time passes."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._selector = self
        self.num_waits = 0

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise NothingToDo
        if timeout > 0:
            # The timer's own moment, not `now + timeout`: that may fall short of it by a rounding.
            self._now = max(self._now, self._scheduled[0].when())
            self.num_waits += 1
        return []

    def at(self, when: float, job: Callable[[], None]) -> asyncio.TimerHandle:
        """`job` at a moment of this loop's time."""
        return self.call_at(when, job)

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def run_in_executor(self, *args: Any) -> NoReturn:
        raise NotImplementedError("a simulation has no threads")

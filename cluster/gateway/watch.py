"""A bound on each wait of an attempt, with one timer for all of them: most events come long before it.

attempt.py waits with it. asyncio.timeout does the same at ten times the price per event, and belongs to one task.
"""

from __future__ import annotations

import asyncio


class Watch:
    """Of one attempt; one wait at a time, between `begin` and `end`. `close` ends its timer."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0
        self._due = 0.0
        self._task: asyncio.Task[object] | None = None
        self._cancels = 0
        self._is_late = False

    def begin(self, timeout_s: float) -> None:
        """The running task is about to wait; after `timeout_s` seconds it is cancelled."""
        self._due = due = self._loop.time() + timeout_s
        if self._timer is None or self._rings_at > due:
            self._rearm()
        self._task = task = asyncio.current_task()
        assert task is not None
        self._cancels = task.cancelling()
        self._is_late = False

    def end(self) -> bool:
        """The wait is over. True: it took too long, and if it ended with an exception, that was our doing."""
        task, self._task = self._task, None
        if not self._is_late:
            return False
        assert task is not None
        return task.uncancel() <= self._cancels

    def close(self) -> None:
        """No wait follows. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rearm(self) -> None:
        self.close()
        self._rings_at = self._due
        self._timer = self._loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._loop.time() < self._due:
            self._rearm()
        elif not self._is_late:
            self._is_late = True
            self._task.cancel()

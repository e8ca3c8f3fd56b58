"""Notices a step thread that does not come back from a turn: a device or a kernel that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

CHECKS = 8  # within the limit


class StallWatch:
    """Calls `on_stall(seconds)` once, in a thread of its own, when a turn of the step loop takes longer than `limit_s`.

    `phase` is the loop's: odd within a turn, another number in each.
    """

    def __init__(self, phase: Callable[[], int], *, limit_s: float, on_stall: Callable[[float], None]) -> None:
        self._phase = phase
        self._limit_s = limit_s
        self._period_s = limit_s / CHECKS
        self._on_stall = on_stall
        self._seen = 0
        self._stalled_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)

    def start(self) -> None:
        """From now until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Does not wait: `on_stall` may be what calls this."""
        self._ended.set()

    def is_stalled(self, elapsed_s: float) -> bool:
        """`elapsed_s` have passed since the last question. A process that was stopped itself held nobody up: what is
        longer than two periods counts as two.
        """
        phase = self._phase()
        if phase != self._seen or phase % 2 == 0:
            self._seen, self._stalled_s = phase, 0.0
        else:
            self._stalled_s += min(elapsed_s, 2 * self._period_s)
        return self._stalled_s > self._limit_s

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self._period_s):
            now = time.monotonic()
            if self.is_stalled(now - last):
                self._on_stall(self._stalled_s)
                return
            last = now

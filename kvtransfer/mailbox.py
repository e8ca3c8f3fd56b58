"""A thread that works off calls in order: how the step thread and the asyncio thread reach a transfer machine."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

Job = Callable[[], None]


class Mailbox:
    """`post` from any thread; jobs run one at a time on a daemon thread, and `tick` about every `tick_s` seconds
    while `is_idle` is false. A job that raises is logged and counted in `num_faults`; the thread goes on.
    """

    def __init__(self, name: str, *, tick: Job, is_idle: Callable[[], bool], tick_s: float) -> None:
        self.num_faults = 0
        self._tick = tick
        self._is_idle = is_idle
        self._tick_s = tick_s
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._stopped = False

    def start(self) -> None:
        """Begin to work; jobs posted before are kept."""
        self._thread.start()

    def post(self, job: Job) -> None:
        """Never blocks, never raises. After `stop` nothing runs any more."""
        self._jobs.put(job)

    @property
    def size(self) -> int:
        """Jobs waiting, about."""
        return self._jobs.qsize()

    def stop(self) -> None:
        """Drop what waits, end the thread and join it. Idempotent; not to be called from a job."""
        self._stopped = True
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        ticked_at = time.monotonic()
        while not self._stopped:
            try:
                job = self._jobs.get(timeout=None if self._is_idle() else self._tick_s)
            except queue.Empty:
                job = None
            self._do(job)
            if time.monotonic() - ticked_at >= self._tick_s:
                self._do(self._tick)
                ticked_at = time.monotonic()

    def _do(self, job: Job | None) -> None:
        if job is None or self._stopped:
            return
        try:
            job()
        except Exception:
            self.num_faults += 1
            log.exception("the transfer thread met an error of its own")

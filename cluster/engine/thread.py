"""The step thread: the one thread of an engine that computes.

OpenMP keeps a team of workers for every thread that ever computed in parallel. With a second team libgomp counts more
threads than cores and lets workers sleep between any two operations: a step of 64 sequences took 251 ms instead of 97
(two cores) because the model had been loaded in another thread. So loading and warming up happen here, too.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

ResultT = TypeVar("ResultT")


class StepThread:
    """Runs what it is given, in order. A daemon: a process that ends does not wait for it."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], ResultT]) -> ResultT:
        """What `function` returns or raises there."""
        future: Future[ResultT] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as exc:
                future.set_exception(exc)

        self._work.put(run)
        return future.result()

    def begin(self, function: Callable[[], None]) -> None:
        """Run `function`, which handles its own errors, without waiting for it."""
        self._work.put(function)

    def end(self, timeout_s: float) -> None:
        """The thread ends when what it runs has returned; waits for that so long."""
        self._work.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (function := self._work.get()) is not None:
            function()

"""The two threads that an engine starts itself: one that computes, one with an event loop.

OpenMP keeps a team of workers for every thread that ever computed in parallel. With a second team libgomp counts more
threads than cores and lets workers sleep between any two operations: a step of 64 sequences took 251 ms instead of 97
(two cores) because the model had been loaded in another thread. So loading and warming up happen here, too.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

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


class AsyncioThread:
    """Runs an event loop, `loop`, from now until `end`. A daemon, too."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)  # without one it would be this thread's, too
        self.loop = self._runner.get_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="asyncio", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, ResultT], timeout_s: float | None = None) -> ResultT:
        """What `coroutine` returns or raises there. Raises TimeoutError after `timeout_s`, without ending it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def end(self, timeout_s: float) -> None:
        """Cancel what still runs there, let it clean up, and end; waits for that so long."""
        self.loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        # The runner awaits what it cancels. A loop that just stops leaves tasks half way, and whatever they would yet
        # await (a channel's close) fails when their memory is collected, in the midst of something else.
        with self._runner:
            self._runner.run(self._until_ended())

    async def _until_ended(self) -> None:
        await self._ended.wait()

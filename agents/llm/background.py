"""The event loop behind synchronous calls: one thread of this process, begun with the first call and kept.

machine.py runs its steps here. What is bound to a loop (connections) is made for each loop once, by `of_this_loop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, Generic, TypeVar

from .errors import UsageError

T = TypeVar("T")


class Background:
    """A loop in a daemon thread. The caller's context variables hold in what runs there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._inbox: _Inbox | None = None
        self._left_behind: tuple[asyncio.AbstractEventLoop | None, ...] = ()

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """None before the first call."""
        return self._loop

    @property
    def is_here(self) -> bool:
        """Whether this is the loop's own thread."""
        return threading.current_thread() is self._thread

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begins `work`. Raises UsageError in this loop's own thread, which would wait for itself."""
        loop = self._started()
        self._check_thread(work)
        return asyncio.run_coroutine_threadsafe(work, loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result. What interrupts the wait (Ctrl-C) cancels it, and is raised when it has ended, its connections
        closed; a second interrupt does not wait. Raises UsageError in this loop's own thread.
        """
        loop = self._started()
        self._check_thread(work)
        inbox, errand = self._inbox, _Errand(work, loop)
        assert inbox is not None
        inbox.put(errand.begin)
        try:
            errand.latch.acquire()
        except BaseException:
            inbox.put(errand.cancel)
            if not errand.is_over:  # else the latch may be taken already: the interrupt came behind that
                errand.latch.acquire()
            raise
        return errand.outcome()

    def _check_thread(self, work: Coroutine[Any, Any, Any]) -> None:
        if self.is_here:
            work.close()
            raise UsageError(
                "a synchronous call inside the loop of synchronous calls waits for itself: await its .aio(...) there"
            )

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._inbox = _Inbox(self._loop)
                self._thread = threading.Thread(
                    target=_kept_running, args=(self._loop,), name="diptych-llm", daemon=True
                )
                self._thread.start()
            return self._loop

    def forget(self) -> None:
        """In the child of a fork there is no thread. The parent's loop is kept there: its end would unregister sockets
        that both processes still share.
        """
        self._left_behind = (*self._left_behind, self._loop)
        self._lock, self._loop, self._thread, self._inbox = threading.Lock(), None, None, None


class _Inbox:
    """What other threads want called on a loop, in their order. As `call_soon_threadsafe`, which reads its socket until
    an exception tells that it is empty, and costs 0.04 ms more of a call.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left: deque[Callable[[], None]] = deque()
        self._read_end, self._write_end = os.pipe()  # for as long as the loop, which nothing closes
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)
        loop.add_reader(self._read_end, self._empty)

    def put(self, wanted: Callable[[], None]) -> None:
        """From any thread. `wanted` raises nothing."""
        self._left.append(wanted)
        with contextlib.suppress(BlockingIOError):  # so full that the loop will look anyway
            os.write(self._write_end, b"x")

    def _empty(self) -> None:
        os.read(self._read_end, 4096)
        while self._left:
            self._left.popleft()()


class _Errand(Generic[T]):
    """Work that another thread waits for by the `latch`, a bare lock that is given back from within the task: once. An
    Event, set in a callback of the task, costs 13 us more of CPU: more locks, and one more turn of the loop.
    """

    __slots__ = ("_context", "_fault", "_found", "_loop", "_task", "_work", "is_over", "latch")

    def __init__(self, work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> None:
        self.latch = threading.Lock()
        self.latch.acquire()
        self.is_over = False
        self._work = work
        self._loop = loop
        self._context = copy_context()
        self._fault: BaseException | None = None

    def begin(self) -> None:
        """On the loop."""
        self._task = self._loop.create_task(self._done(), context=self._context)

    def cancel(self) -> None:
        """On the loop, behind `begin`."""
        self._task.cancel()
        self._task.add_done_callback(self._left)

    def outcome(self) -> T:
        """Of work that is over. Raises what it raised."""
        if self._fault is None:
            return self._found
        try:
            raise self._fault
        finally:
            self._fault = None  # whose traceback holds this frame

    async def _done(self) -> None:
        try:
            self._found = await self._work
        except BaseException as exc:
            self._fault = exc
        finally:
            self._open()

    def _left(self, _: object) -> None:
        if not self.is_over:  # cancelled before its first step
            self._work.close()
            self._open()

    def _open(self) -> None:
        self.is_over = True
        self.latch.release()


def _kept_running(loop: asyncio.AbstractEventLoop) -> None:
    """Whoever waits for a task gets what it raised; what ends loops must not end that of all other calls."""
    while not loop.is_closed():
        try:
            loop.run_forever()
        except (KeyboardInterrupt, SystemExit):  # of a developer's own coroutine
            continue
        return


background = Background()
os.register_at_fork(after_in_child=background.forget)

_kept: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[object, Any]] = weakref.WeakKeyDictionary()


async def of_this_loop(key: object, make: Callable[[], T], close: Callable[[T], Awaitable[None]]) -> T:
    """What `make` made for the running loop and `key`; closed when asyncio.run, or another runner, ends the loop."""
    loop = asyncio.get_running_loop()
    kept = _kept.setdefault(loop, {})
    if key not in kept:
        kept[key] = made = make()
        guard = _closing(made, close, kept, key)
        await anext(guard)  # the loop ends its asynchronous generators before it closes
        kept[key, "guard"] = guard
    found: T = kept[key]
    return found


async def let_go(key: object) -> None:
    """Closes what the running loop has for `key`, if anything; it is made anew where it is asked for again."""
    kept = _kept.get(asyncio.get_running_loop(), {})
    guard = kept.pop((key, "guard"), None)
    if guard is not None:
        await guard.aclose()


async def _closing(
    made: T, close: Callable[[T], Awaitable[None]], kept: dict[object, Any], key: object
) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        kept.pop(key, None)
        with contextlib.suppress(RuntimeError):  # a loop that is closed already has no connections left
            await close(made)

"""What blocks, awaited: a function, and an iterator, each in a thread of its own.

upstreams.py uses it for makers' synchronous clients. The loop's own pool of threads has room for few calls at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_MOST_WAITING = 256  # pieces that nobody has taken; then the iterator is not read


async def in_thread(work: Callable[[], T]) -> T:
    """Its result. A cancelled wait leaves the thread to its end, which nobody hears of."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # one of the two is there

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = context.run(work)
        except StopIteration as exc:  # no future takes it
            error = RuntimeError(f"{exc!r} came out of a call")
        except BaseException as exc:
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="diptych-llm-client", daemon=True).start()
    return await future


class Closable(Protocol[T_co]):
    """An iterator that holds something open."""

    def __iter__(self) -> Iterator[T_co]: ...

    def close(self) -> None:
        """Let go of it."""


class Pump(Generic[T]):
    """Reads an iterator ahead in a thread, which closes it. `interrupt` makes a waiting read of it end."""

    def __init__(self, begin: Callable[[], Closable[T]], interrupt: Callable[[Closable[T]], None]) -> None:
        self._begin = begin
        self._interrupt = interrupt
        self._loop = asyncio.get_running_loop()
        self._source: Closable[T] | None = None
        self._waiting: deque[T] = deque()
        self._has_more = asyncio.Event()
        self._room = threading.Semaphore(_MOST_WAITING)
        self._is_left = threading.Event()
        self._is_over = False
        self._error: BaseException | None = None

    async def pieces(self) -> AsyncGenerator[T, None]:
        """What it yields. Raises what it raises. Closing it closes the iterator; one that has not begun to answer yet
        is left to its thread, which closes it then.
        """
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._read,), name="diptych-llm-stream", daemon=True).start()
        try:
            while True:
                while self._waiting:
                    piece = self._waiting.popleft()
                    self._room.release()
                    yield piece
                if self._is_over:
                    if self._error is not None:
                        raise self._error
                    return
                await self._more()
        finally:
            self._is_left.set()
            self._room.release()
            if self._source is not None and not self._is_over:
                self._interrupt(self._source)
                while not self._is_over:
                    await self._more()

    async def _more(self) -> None:
        self._has_more.clear()
        if self._is_over or (self._waiting and not self._is_left.is_set()):
            return
        await self._has_more.wait()

    def _read(self) -> None:
        error: BaseException | None = None
        try:
            self._source = source = self._begin()
            try:
                pieces = iter(source)
                while not self._is_left.is_set():
                    self._waiting.append(next(pieces))
                    self._wake()
                    self._room.acquire()
            except StopIteration:
                pass
            finally:
                source.close()
        except BaseException as exc:
            error = exc
        finally:
            self._wake(is_over=True, error=error)

    def _wake(self, *, is_over: bool = False, error: BaseException | None = None) -> None:
        def wake() -> None:
            self._is_over, self._error = is_over or self._is_over, error or self._error
            self._has_more.set()

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(wake)

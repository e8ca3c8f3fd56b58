"""How many requests are on their way at once, and how fast they go out: `llm.Limiter`.

exchange.py and streams.py take a place for each attempt, of the call's limiter and of its registry's. One limiter may
be used by any number of threads and event loops.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from .errors import UsageError


@dataclass(slots=True, eq=False)
class _Turn:
    """One who waits. `granted` belongs to `loop`; whether a place is held is decided under the limiter's lock."""

    loop: asyncio.AbstractEventLoop
    granted: asyncio.Future[None]
    has_place: bool = False


@dataclass(slots=True)
class _Rate:
    """So much a second: a second's worth can be saved, and what was used beyond it is paid back by waiting."""

    per_s: float
    left: float
    at: float

    def wait_s(self, now: float, least: float) -> float:
        """Until `least` is there."""
        most = max(self.per_s, 1.0)
        self.left = min(most, self.left + (now - self.at) * self.per_s)
        self.at = now
        return max(0.0, (least - self.left) / self.per_s)


class Limiter:
    """at_once          the most requests on their way; who comes later waits, in the order of coming
    requests_per_s   the most that begin in a second, on average; a second's worth may begin at once
    tokens_per_s     tokens of prompts and answers: known when an answer is there, so that later requests wait for what
                     it used

    `clock` and `sleep` are a test's to choose. Raises UsageError for a number that is not above 0.
    """

    def __init__(
        self,
        at_once: int | None = None,
        *,
        requests_per_s: float | None = None,
        tokens_per_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        given = {"at_once": at_once, "requests_per_s": requests_per_s, "tokens_per_s": tokens_per_s}
        for name, value in given.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < math.inf):
                raise UsageError(f"Limiter: {name} is a number above 0, or None for no limit, not {value!r}", name)
        if at_once is not None and not isinstance(at_once, int):
            raise UsageError(f"Limiter: at_once is a whole number of requests, not {at_once!r}", "at_once")
        self.at_once = at_once
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._held = 0
        self._turns: deque[_Turn] = deque()
        now = clock()
        self._requests = None if requests_per_s is None else _Rate(requests_per_s, max(requests_per_s, 1.0), now)
        self._tokens = None if tokens_per_s is None else _Rate(tokens_per_s, max(tokens_per_s, 1.0), now)

    @property
    def held(self) -> int:
        """Requests on their way now, and those that were let in and wait for their second."""
        return self._held

    @property
    def waiting(self) -> int:
        """For a place."""
        return len(self._turns)

    async def take(self) -> None:
        """Waits for a place; `give` ends it. Cancelled, none is held."""
        await self._enter()
        try:
            while True:
                wait_s = self._wait_s()
                if wait_s <= 0:
                    return
                await self._sleep(wait_s)
        except BaseException:
            self.give()
            raise

    def give(self, tokens: int = 0) -> None:
        """A place is free again; the request used `tokens`. From any thread."""
        with self._lock:
            if self._tokens is not None:
                self._tokens.left -= tokens
            self._held -= 1
            self._let_in()

    async def _enter(self) -> None:
        loop = asyncio.get_running_loop()
        with self._lock:
            if not self._turns and (self.at_once is None or self._held < self.at_once):
                self._held += 1
                return
            turn = _Turn(loop, loop.create_future())
            self._turns.append(turn)
        try:
            await turn.granted
        except BaseException:
            with self._lock:
                if turn.has_place:
                    self._held -= 1
                else:
                    self._turns.remove(turn)
                self._let_in()
            raise

    def _let_in(self) -> None:
        """Those whose turn it is. Under the lock."""
        while self._turns and (self.at_once is None or self._held < self.at_once):
            turn = self._turns.popleft()
            try:
                turn.loop.call_soon_threadsafe(_grant, turn.granted)
            except RuntimeError:  # that loop is closed, and its waiter with it
                continue
            turn.has_place = True
            self._held += 1

    def _wait_s(self) -> float:
        """Seconds until a request may begin; 0: it begins now."""
        with self._lock:
            now = self._clock()
            wait_s = max(
                0.0 if self._requests is None else self._requests.wait_s(now, 1.0),
                0.0 if self._tokens is None else self._tokens.wait_s(now, 1.0),
            )
            if wait_s <= 0 and self._requests is not None:
                self._requests.left -= 1.0
            return wait_s


def _grant(granted: asyncio.Future[None]) -> None:
    if not granted.done():
        granted.set_result(None)


@dataclass(slots=True)
class Place:
    """A step: a place of each limiter, in their order. As a context it gives them back, `tokens` told."""

    limiters: Sequence[Limiter]
    most_s: float | None = None
    tokens: int = 0
    _held: list[Limiter] = field(default_factory=list)

    async def perform(self) -> None:
        """Wait for all of them. Raises TimeoutError after `most_s`, and holds none then."""
        try:
            async with asyncio.timeout(self.most_s):
                for limiter in self.limiters:
                    await limiter.take()
                    self._held.append(limiter)
        except BaseException:
            self.give()
            raise

    def give(self) -> None:
        """Back, once."""
        while self._held:
            self._held.pop().give(self.tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give()


def distinct(limiters: Iterable[Limiter | None]) -> tuple[Limiter, ...]:
    """Those that there are, each once."""
    return tuple(dict.fromkeys(one for one in limiters if one is not None))

"""How many requests a router takes in: a bounded number in work, a bounded queue, an honest refusal beyond it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from diptych.protos.errors import DeadlineExceeded, Overloaded

_SMOOTHING = 0.1  # weight of the newest duration in the running mean


class Admission:
    """First come, first served. One event loop; `leave` after every `enter` that returned."""

    def __init__(self, *, max_running: int, max_waiting: int, clock: Callable[[], float]) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.running = 0
        self._clock = clock
        self._queue: deque[asyncio.Future[None]] = deque()
        self._mean_s = 1.0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    async def enter(self, deadline: float) -> None:
        """Take a place, waiting for one until `deadline` (on the clock). Raises Overloaded, DeadlineExceeded."""
        if self.running < self.max_running and not self._queue:
            self.running += 1
            return
        if len(self._queue) >= self.max_waiting:
            raise Overloaded(
                f"this router has {self.running} requests in work and {len(self._queue)} waiting, which is its limit",
                self.retry_after_s(),
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            async with asyncio.timeout(max(deadline - self._clock(), 0)):
                await place
        except TimeoutError:
            self._give_up(place)
            raise DeadlineExceeded("the request's deadline passed while it waited for a place") from None
        except asyncio.CancelledError:
            self._give_up(place)
            raise

    def leave(self, duration_s: float) -> None:
        """Give the place back after `duration_s` seconds in work."""
        self._mean_s += _SMOOTHING * (duration_s - self._mean_s)
        self._pass_on()

    def retry_after_s(self) -> float:
        """When a place should be free: the queue's length times what one place takes."""
        return min(max(self._mean_s * (len(self._queue) + 1) / self.max_running, 1.0), 60.0)

    def _give_up(self, place: asyncio.Future[None]) -> None:
        if place.done() and not place.cancelled():  # the place came in the same moment
            self._pass_on()
        elif place in self._queue:
            self._queue.remove(place)

    def _pass_on(self) -> None:
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_result(None)  # the place changes hands: `running` stays
                return
        self.running -= 1

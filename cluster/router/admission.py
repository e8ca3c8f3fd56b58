"""How many requests a router takes in: a bounded number in work, a bounded queue, an honest refusal beyond it.

The queue has the order of the engines' own (protos/fair_line.py): priority, tenants by share, deadline, arrival.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from diptych.protos.errors import DeadlineExceeded, Overloaded
from diptych.protos.fair_line import FairLine, Place
from diptych.protos.types import GenerateRequest, TransferKey

_SMOOTHING = 0.1  # weight of the newest duration in the running mean


@dataclass(eq=False, slots=True)
class _Waiting:
    key: TransferKey
    place: Place
    seat: asyncio.Future[None]


class Admission:
    """One event loop; `leave` after every `enter` that returned."""

    def __init__(self, *, max_running: int, max_waiting: int, clock: Callable[[], float]) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.running = 0
        self._clock = clock
        self._line = FairLine[_Waiting]()
        self._arrivals = itertools.count()
        self._mean_s = 1.0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._line)

    async def enter(self, request: GenerateRequest) -> None:
        """Take a seat, waiting for one until the request's deadline. Raises Overloaded, DeadlineExceeded."""
        place = Place.of(request, next(self._arrivals))
        if self.running < self.max_running and not self._line:
            self.running += 1
            return
        if len(self._line) >= self.max_waiting:
            self._make_room(place)
        me = _Waiting(request.key, place, asyncio.get_running_loop().create_future())
        self._line.add(me.key, me, place)
        try:
            async with asyncio.timeout(None if request.deadline is None else max(request.deadline - self._clock(), 0)):
                await me.seat
        except TimeoutError:
            self._give_up(me)
            raise DeadlineExceeded("the request's deadline passed while it waited for a place") from None
        except asyncio.CancelledError:
            self._give_up(me)
            raise
        self._line.charge(place, len(request.prompt))

    def leave(self, request: GenerateRequest, *, num_tokens: int, duration_s: float) -> None:
        """Give the seat back after `duration_s` seconds in work and so many generated tokens."""
        self._mean_s += _SMOOTHING * (duration_s - self._mean_s)
        self._line.charge(Place.of(request, 0), num_tokens)
        self._pass_on()

    def retry_after_s(self) -> float:
        """When a seat should be free: the queue's length times what one seat takes."""
        return min(max(self._mean_s * (len(self._line) + 1) / self.max_running, 1.0), 60.0)

    def _make_room(self, place: Place) -> None:
        """The queue is full: somebody less urgent, or the youngest of a tenant that holds more of it, gives way."""
        held = Counter(other.place.tenant for other in self._line)

        def claim(one: Place, more: int) -> tuple[int, float]:
            return one.priority, (held[one.tenant] + more) / one.weight

        last = max(self._line, key=lambda other: (claim(other.place, 0), other.place.arrival), default=None)
        refusal = Overloaded(
            f"this router has {self.running} requests in work and {len(self._line)} waiting, which is its limit",
            self.retry_after_s(),
        )
        if last is None or claim(last.place, 0) <= claim(place, 1):
            raise refusal
        self._line.discard(last.key)
        if not last.seat.done():
            last.seat.set_exception(refusal)

    def _give_up(self, me: _Waiting) -> None:
        if me.seat.done() and not me.seat.cancelled() and me.seat.exception() is None:  # the seat came just now
            self._pass_on()
        else:
            self._line.discard(me.key)

    def _pass_on(self) -> None:
        while (next_one := self._line.head()) is not None:
            self._line.take(next_one.key)
            if not next_one.seat.done():
                next_one.seat.set_result(None)  # the seat changes hands: `running` stays
                return
        self.running -= 1

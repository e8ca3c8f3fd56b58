"""How many requests a router takes in: a bounded number in work, a bounded queue, an honest refusal beyond it.

The queue has the order of the engines' own (protos/fair_line.py): priority, tenants by share, deadline, arrival. While
several tenants ask, the last eighth of the seats is for those that have less than their share: requests of one length
end all at once, and who asks rarely would wait for that moment.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from diptych.protos.errors import CapacityError, DeadlineExceeded, Overloaded, OverShare
from diptych.protos.fair_line import FairLine, Place
from diptych.protos.types import GenerateRequest, TransferKey

SHORTEST_S, LONGEST_S = 1.0, 3600.0  # that a refused client is told to wait
_SMOOTHING = 0.1  # weight of the newest request in the running means
_TURNS_SAVED = 4.0  # requests that a tenant below its share may have ahead of others at once
_RESERVE = 8  # one seat in so many is kept
_PRESENT_S = 10.0  # a tenant that asked so lately may ask again soon
_KeyT = TypeVar("_KeyT")


@dataclass(eq=False, slots=True)
class _Waiting:
    key: TransferKey
    place: Place
    seat: asyncio.Future[None]


class Admission:
    """One event loop; `leave` after every `enter` that returned."""

    def __init__(
        self,
        *,
        max_running: int,
        max_waiting: int,
        clock: Callable[[], float],
        room: Callable[[], int] | None = None,
    ) -> None:
        """`room`: how many those behind it can take now, which bounds `max_running` too."""
        self._most_running = max_running
        self._room = room
        self.max_waiting = max_waiting
        self.running = 0
        self._clock = clock
        self._line = FairLine[_Waiting]()
        self._arrivals = itertools.count()
        self._present: OrderedDict[str, tuple[float, float]] = OrderedDict()  # when each last asked, and its weight
        self._present_weight = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._inside: Counter[str] = Counter()  # in work, by tenant
        self._held: Counter[str] = Counter()  # places of the queue, by tenant
        self._groups: Counter[tuple[int, str]] = Counter()  # the same, by priority and tenant
        self._weights: dict[str, float] = {}  # of tenants that wait or are in work
        self._mean_s: float | None = None  # that a request keeps its seat; None: none has left yet
        self._mean_tokens = 0.0
        self._busy_since = 0.0  # when the first one that is in work came, as long as none has left

    @property
    def max_running(self) -> int:
        """Seats."""
        return self._most_running if self._room is None else min(self._most_running, self._room())

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._line)

    async def enter(self, request: GenerateRequest) -> None:
        """Take a seat, waiting for one until the request's deadline.

        Raises Overloaded; OverShare where all is full and this tenant has more than its share of it; DeadlineExceeded.
        """
        place = Place.of(request, next(self._arrivals))
        self._see(place)
        self._pass_on()
        if self._may_sit(place):  # who waits while a seat is free may not take it
            if not self.running:
                self._busy_since = self._clock()
            self._sit(place)
            return
        if len(self._line) >= self.max_waiting:
            self._make_room(place)
        me = _Waiting(request.key, place, asyncio.get_running_loop().create_future())
        self._join(me)
        self._plan_look()
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

    def check(self, place: Place) -> None:
        """Raises what `enter` would raise at once for a request of that place."""
        if len(self._line) >= self.max_waiting and not self._may_sit(place):
            self._victims(place)

    def leave(self, request: GenerateRequest, *, num_tokens: int, duration_s: float) -> None:
        """Give the seat back after `duration_s` seconds in work and so many generated tokens."""
        if self._mean_s is None:
            self._mean_s = duration_s
        self._mean_s += _SMOOTHING * (duration_s - self._mean_s)
        self._mean_tokens += _SMOOTHING * (len(request.prompt) + num_tokens - self._mean_tokens)
        self._line.credit = _TURNS_SAVED * self._mean_tokens
        self._line.charge(Place.of(request, 0), num_tokens)
        self._rise(request.tenant)
        self._plan_look()

    def wait_s(self, place: Place) -> float:
        """How long a request of that place would wait now: the seats that must come free before its turn, times what
        the seats take. Turns go round by weight, so of another tenant only so many are ahead as its share allows.
        """
        mine = self._held[place.tenant] + 1
        ahead = 0.0
        for (priority, tenant), count in self._groups.items():
            if priority < place.priority:
                ahead += count
            elif priority == place.priority and tenant != place.tenant:
                ahead += min(count, math.ceil(mine * self._weights[tenant] / place.weight))
        mean_s = self._mean_s if self._mean_s is not None else self._clock() - self._busy_since
        own = self._groups[place.priority, place.tenant] + 1
        return (ahead + own) * mean_s / self.max_running

    def _join(self, me: _Waiting) -> None:
        self._line.add(me.key, me, me.place)
        self._held[me.place.tenant] += 1
        self._groups[me.place.priority, me.place.tenant] += 1
        self._weights[me.place.tenant] = me.place.weight

    def _gone(self, place: Place) -> None:
        """Whoever had that place has left the queue."""
        _take_one(self._groups, (place.priority, place.tenant))
        _take_one(self._held, place.tenant)
        self._forget(place.tenant)

    def _forget(self, tenant: str) -> None:
        if tenant not in self._held and tenant not in self._inside:
            self._weights.pop(tenant, None)

    def _make_room(self, place: Place) -> None:
        """The queue is full: somebody less urgent, or the youngest of a tenant that holds more of it, gives way."""
        last = self._victims(place)
        members = (one for one in self._line if (one.place.priority, one.place.tenant) == last)
        victim = max(members, key=lambda one: one.place.arrival)
        refusal = self._refusal(victim.place, newcomer=place)
        self._line.discard(victim.key)
        self._gone(victim.place)
        if not victim.seat.done():
            victim.seat.set_exception(refusal)

    def _victims(self, place: Place) -> tuple[int, str]:
        """Priority and tenant of whom one has to give way. Raises the refusal of `place` itself."""

        def claim(priority: int, tenant: str) -> tuple[int, float]:
            return priority, self._held[tenant] / self._weights[tenant]

        last = max(self._groups, key=lambda group: claim(*group), default=None)
        mine = (place.priority, (self._held[place.tenant] + 1) / place.weight)
        if last is None or claim(*last) <= mine:
            raise self._refusal(place, newcomer=place)
        return last

    def _refusal(self, place: Place, *, newcomer: Place) -> CapacityError:
        """For the request of `place`, because of `newcomer`, which may be the same."""
        wait_s = min(max(self.wait_s(place), SHORTEST_S), LONGEST_S)
        weights = self._weights | {newcomer.tenant: newcomer.weight}
        held = self._inside[place.tenant] + self._held[place.tenant] + (newcomer.tenant == place.tenant)
        total = self.running + len(self._line) + 1
        if len(weights) > 1 and held / place.weight > total / sum(weights.values()):
            return OverShare(
                f"this router is full, and {held} of its {total - 1} requests are this tenant's, more than its share "
                "while others ask too; send fewer at a time",
                wait_s,
            )
        return Overloaded(
            f"this router has {self.running} requests in work and {len(self._line)} waiting, which is its limit", wait_s
        )

    def _give_up(self, me: _Waiting) -> None:
        if me.seat.done() and not me.seat.cancelled() and me.seat.exception() is None:  # the seat came just now
            self._rise(me.place.tenant)
        elif me.key in self._line:
            self._line.discard(me.key)
            self._gone(me.place)

    def _see(self, place: Place) -> None:
        """Its tenant asks now."""
        now, before = self._clock(), self._present.pop(place.tenant, (0.0, 0.0))
        self._present_weight += place.weight - before[1]
        self._present[place.tenant] = now, place.weight

    def _forget_absent(self) -> None:
        long_ago = self._clock() - _PRESENT_S
        while self._present and (oldest := next(iter(self._present.values())))[0] <= long_ago:
            self._present_weight -= oldest[1]
            self._present.popitem(last=False)

    def _look_again(self) -> None:
        self._timer = None
        self._pass_on()
        self._plan_look()

    def _plan_look(self) -> None:
        """Somebody waits though a seat is free: when the others have been away for long enough, it is his."""
        if self._timer is None and self._line and self.running < self.max_running:
            self._timer = asyncio.get_running_loop().call_later(_PRESENT_S / 4, self._look_again)

    def _may_sit(self, place: Place) -> bool:
        """Whether a seat is free, and not kept for others."""
        seats = self.max_running
        free = seats - self.running
        if free > max(seats // _RESERVE, int(seats > 1)) or len(self._present) < 2:
            return free > 0
        weights = self._present_weight + (place.weight if place.tenant not in self._present else 0.0)
        return free > 0 and (self._inside[place.tenant] + 1) * weights <= seats * place.weight

    def _sit(self, place: Place) -> None:
        self.running += 1
        self._inside[place.tenant] += 1
        self._weights[place.tenant] = place.weight

    def _rise(self, tenant: str) -> None:
        self.running -= 1
        _take_one(self._inside, tenant)
        self._pass_on()
        self._forget(tenant)

    def _pass_on(self) -> None:
        """Free seats go to those that may take them."""
        self._forget_absent()
        while self.running < self.max_running and (next_one := self._next()) is not None:
            self._line.take(next_one.key)
            self._gone(next_one.place)
            if not next_one.seat.done():
                next_one.seat.set_result(None)
                self._sit(next_one.place)

    def _next(self) -> _Waiting | None:
        head = self._line.head()
        if head is None or self._may_sit(head.place):
            return head
        may = [one for one in self._line if self._may_sit(one.place)]
        return min(may, key=lambda one: (one.place.priority, one.place.arrival), default=None)


def _take_one(counter: Counter[_KeyT], key: _KeyT) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]

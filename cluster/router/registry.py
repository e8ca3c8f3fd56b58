"""The requests of a router replica by their ids: those in work, and for a while those that ended. In memory alone.

The API opens an entry per HTTP request and asks about it by id; the router adds a life for each call of it. A call
without an entry gets one that nobody can ask about. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diptych.cluster.observability.metrics import RouterMetrics
from diptych.protos.errors import Cancelled, DiptychError

from .life import Life, State, Wrongs, ending

MAX_ENDED = 4096  # requests that are remembered after their end
MAX_ENDED_OF_TENANT = 1024  # of them: who sends very many pushes out his own
KEPT_S = 600.0
_PROGRESS = {state: at for at, state in enumerate(State)}


class TrackedRequest:
    """One request of a client, with a life for each of its choices that has begun."""

    __slots__ = (
        "_over",
        "_told",
        "born",
        "created",
        "ended_at",
        "endpoint",
        "error_code",
        "error_message",
        "id",
        "interrupt",
        "lives",
        "model",
        "priority",
        "state_at_end",
        "tenant",
    )

    def __init__(self, id: str, *, tenant: str, endpoint: str, born: float) -> None:
        """`born`: when its head was read, on the router's clock."""
        self.id = id
        self.tenant = tenant
        self.endpoint = endpoint
        self.model = ""
        self.priority = 0
        self.born = born
        self.created = time.time()  # unix
        self.lives: list[Life] = []
        self.interrupt: DiptychError | None = None
        self.state_at_end: State | None = None
        self.ended_at = 0.0
        self.error_code = ""
        self.error_message = ""
        self._over: asyncio.Event | None = None
        self._told: DiptychError | None = None

    @property
    def state(self) -> State:
        """Of the choice that is furthest, while any is in work; then how all of it ended."""
        if self.state_at_end is not None:
            return self.state_at_end
        live = [life.state for life in self.lives if not life.is_over]
        if live:
            return max(live, key=_PROGRESS.__getitem__)
        # The last token is out and the rest of the answer is being made, or the next choice has yet to begin.
        return State.DECODING if self.lives else State.RECEIVED

    @property
    def num_tokens(self) -> int:
        """That the client was given, of all choices."""
        return sum(life.num_tokens for life in self.lives)

    def answered_with(self, error: DiptychError) -> None:
        """Its client was told `error` by whoever does not raise it."""
        self._told = error

    def add(self, life: Life) -> None:
        """One of its calls begins. It ends at once where the request was cancelled before."""
        self.lives.append(life)
        if self.interrupt is not None:
            life.interrupts.fire(self.interrupt)

    def cancel(self) -> bool:
        """End it with Cancelled, whatever it does now; False when it was over or told so before."""
        if self.state_at_end is not None or self.interrupt is not None:
            return False
        self.interrupt = Cancelled(f"this request was cancelled by POST /v1/requests/{self.id}/cancel")
        for life in self.lives:
            life.interrupts.fire(self.interrupt)
        return True

    async def over(self, timeout_s: float) -> bool:
        """Wait until it has ended, for so long at most; whether it has."""
        if self.state_at_end is None:
            if self._over is None:
                self._over = asyncio.Event()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._over.wait()
            except TimeoutError:
                return False
        return True

    def settle(self, error: BaseException | None, now: float) -> None:
        """It has ended at `now`: by `error`, or as its lives did."""
        was_placed = any(life.num_placements for life in self.lives)
        error, self._told = error or self._told, None
        if error is None:
            ends = {life.state: life for life in self.lives if life.is_over}
            worst = next((ends[one] for one in (State.FAILED, State.CANCELLED, State.REFUSED) if one in ends), None)
            if worst is not None:
                state, code, message = worst.state, worst.error_code, worst.error_message
            else:
                state, code, message = ending(None if self.lives else GeneratorExit(), State.RECEIVED)
        else:
            state, code, message = ending(error, State.DECODING if was_placed else State.RECEIVED)
        self.state_at_end, self.error_code, self.error_message = state, code, message
        self.ended_at = now
        self.interrupt = None  # errors that were raised hold on to all that was on the stack
        for life in self.lives:
            life.interrupts.error = None
        if self._over is not None:
            self._over.set()


class Registry:
    """One per router, one event loop. `clock` in seconds."""

    def __init__(self, metrics: RouterMetrics, *, clock: Callable[[], float], is_strict: bool = False) -> None:
        """`is_strict`: a wrong transition raises, as tests want it."""
        self._clock = clock
        self._wrongs = Wrongs(metrics, is_strict)
        self._working: dict[str, TrackedRequest] = {}
        self._ended: OrderedDict[str, TrackedRequest] = OrderedDict()  # the oldest end first
        self._ended_of: dict[str, OrderedDict[str, TrackedRequest]] = {}  # the same, by tenant

    @contextmanager
    def request(self, id: str, *, tenant: str, endpoint: str, born: float) -> Iterator[TrackedRequest]:
        """A request for as long as the block lasts; an exception that leaves it is how it ended."""
        entry = TrackedRequest(id, tenant=tenant, endpoint=endpoint, born=born)
        self._working[id] = entry
        try:
            yield entry
        except BaseException as exc:
            self._close(entry, exc)
            raise
        self._close(entry, None)

    def begin(self, entry: TrackedRequest | None, *, model: str, born: float) -> tuple[TrackedRequest, Life]:
        """A call of `entry`, or one of its own, has arrived."""
        if entry is None:
            entry = TrackedRequest("", tenant="", endpoint="", born=born)
        entry.model = entry.model or model
        life = Life(entry.id, clock=self._clock, since=born, wrongs=self._wrongs)
        entry.add(life)
        return entry, life

    def find(self, id: str, tenant: str) -> TrackedRequest | None:
        """The tenant's request of that id; None: there is none, or it ended too long ago."""
        self._forget_old()
        entry = self._working.get(id) or self._ended.get(id)
        return entry if entry is not None and entry.tenant == tenant else None

    def latest(self, tenant: str, *, limit: int, state: State | None = None) -> list[TrackedRequest]:
        """The tenant's last requests, by their arrival, the newest first; of one state, where that is named."""
        self._forget_old()
        ended = self._ended_of.get(tenant, OrderedDict())
        mine = [*(one for one in self._working.values() if one.tenant == tenant), *ended.values()]
        found = [one for one in mine if state is None or one.state is state]
        found.sort(key=lambda one: one.born, reverse=True)
        return found[:limit]

    def __len__(self) -> int:
        return len(self._working) + len(self._ended)

    def _close(self, entry: TrackedRequest, error: BaseException | None) -> None:
        now = self._clock()
        entry.settle(error, now)
        self._working.pop(entry.id, None)
        of_tenant = self._ended_of.setdefault(entry.tenant, OrderedDict())
        self._ended[entry.id] = of_tenant[entry.id] = entry
        if len(of_tenant) > MAX_ENDED_OF_TENANT:
            self._forget(next(iter(of_tenant)))
        self._forget_old()

    def _forget_old(self) -> None:
        dead_line = self._clock() - KEPT_S
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if oldest.ended_at > dead_line and len(self._ended) <= MAX_ENDED:
                return
            self._forget(oldest.id)

    def _forget(self, id: str) -> None:
        entry = self._ended.pop(id)
        of_tenant = self._ended_of[entry.tenant]
        del of_tenant[id]
        if not of_tenant:
            del self._ended_of[entry.tenant]

"""Who may have felled an engine or its step, and how those go on: few at a time, the twice suspected alone, the guilty
not at all.

A request is unproven on an engine from its order until its first token from there. Knows refs and ids only; the router
tells it what happens.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace

from diptych.protos.errors import Quarantined
from diptych.protos.types import EngineRef

from .call import GenerateCall
from .incident import Incident

SEATS = 8  # requests with one strike that are on their way to a first token at a time
SEAT_S = 1.0  # an engine that still lives so long after an order was not killed by it
MAX_STRIKES = 3  # without a token in between: three incidents are enough, whoever else was there
_MAX_QUARANTINED = 1024
_WORDS = "engines failed each time that they worked on this request; it is refused"
_MAX_INCIDENTS = 64  # whose company is remembered


class Seat:
    """A place at the gate, or none; `release` is idempotent."""

    def __init__(self, line: asyncio.Semaphore | None = None) -> None:
        self._line = line
        self._timer: asyncio.TimerHandle | None = None

    def release_later(self) -> None:
        """The request has its engines: free after SEAT_S at the latest."""
        if self._line is not None:
            self._timer = asyncio.get_running_loop().call_later(SEAT_S, self.release)

    def release(self) -> None:
        """The next one may try."""
        if self._timer is not None:
            self._timer.cancel()
        if self._line is not None:
            self._line.release()
            self._line = None


class Gate:
    """One event loop."""

    def __init__(self) -> None:
        self._lines = (asyncio.Semaphore(SEATS), asyncio.Semaphore(1))

    async def enter(self, num_strikes: int) -> Seat:
        """At once without a strike; else as soon as one of the seats for its number of strikes is free."""
        if not num_strikes:
            return Seat()
        line = self._lines[min(num_strikes, 2) - 1]
        await line.acquire()
        return Seat(line)


class Suspects:
    """Which requests are unproven on which engines, and in whose company they were when it failed."""

    def __init__(self) -> None:
        self._unproven: dict[EngineRef, set[bytes]] = {}
        self._company: dict[Incident, set[bytes]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._unproven.values()))

    def placed(self, request: bytes, engines: Iterable[EngineRef]) -> None:
        """`request` was sent there."""
        for engine in engines:
            self._unproven.setdefault(engine, set()).add(request)

    def cleared(self, request: bytes, engines: Iterable[EngineRef]) -> None:
        """A token came from there, or `request` is there no more."""
        for engine in engines:
            present = self._unproven.get(engine)
            if present is not None:
                present.discard(request)
                if not present:
                    del self._unproven[engine]

    def is_alone(self, request: bytes, incident: Incident) -> bool:
        """Whether no other unproven request was struck by it. Ask before any of them is cleared."""
        if incident not in self._company:
            present = self._unproven.get(incident.engine, set())
            self._company[incident] = set(present) if incident.hit is None else present & incident.hit
            while len(self._company) > _MAX_INCIDENTS:
                del self._company[next(iter(self._company))]
        return self._company[incident] <= {request}


class Quarantine:
    """Requests that are refused for `period_s` after engines failed over them. `clock` in seconds."""

    def __init__(self, *, period_s: float, clock: Callable[[], float]) -> None:
        self._period_s = period_s
        self._clock = clock
        self._until: dict[bytes, float] = {}

    def add(self, call: GenerateCall) -> Quarantined:
        """Refuse `call` and its like from now on; the error says why."""
        self._until.pop(name := _fingerprint(call), None)
        self._until[name] = self._clock() + self._period_s
        while len(self._until) > _MAX_QUARANTINED:
            del self._until[next(iter(self._until))]
        return Quarantined(f"{_WORDS} for {self._period_s:g} s")

    def check(self, call: GenerateCall) -> None:
        """Raises Quarantined."""
        if not self._until:
            return
        until = self._until.get(name := _fingerprint(call))
        if until is None:
            return
        left = until - self._clock()
        if left > 0:
            raise Quarantined(f"{_WORDS} for another {left:.0f} s")
        del self._until[name]


def _fingerprint(call: GenerateCall) -> bytes:
    # Without the seed: the API draws one for every request that names none.
    told = (call.model, call.prompt, replace(call.sampling, seed=0), call.constraint)
    return hashlib.sha256(repr(told).encode()).digest()

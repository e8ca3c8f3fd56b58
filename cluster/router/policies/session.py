"""The same engines for all requests of a session."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..placement import Ask, Choice, EngineLoad, others
from .least_load import LeastLoad

MAX_SESSIONS = 65_536  # the one unused for longest gives way


@dataclass(slots=True)
class _Seat:
    prefill: str
    decode: str
    expires: float


class Session:
    """New sessions by rendezvous hashing, so that replicas agree without talking; known ones stay where they were,
    also when engines come, for `ttl_s` after their last request. A request without a session goes by least load.
    """

    name = "session"
    sees_caches = False

    def __init__(self, *, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._seats: OrderedDict[bytes, _Seat] = OrderedDict()  # least recently used first
        self._without = LeastLoad()

    def choose(self, ask: Ask, prefill: Sequence[EngineLoad], decode: Sequence[EngineLoad]) -> Choice:
        """See PlacementPolicy."""
        if ask.session is None:
            return self._without.choose(ask, prefill, decode)
        # Clients choose the words and their length: what is kept of a session has the same size for all.
        key, now = _digest(ask.model, *ask.session), self._clock()
        seat = self._seats.pop(key, None)
        if seat is not None and seat.expires <= now:
            seat = None
        then = self._pick(key, decode, seat.decode if seat else "")
        rest = others(prefill, then)
        first = self._pick(key, rest, seat.prefill if seat else "") if rest else None
        names = (first.ref.engine_id if first else "", then.ref.engine_id)
        known = seat is not None and names == (seat.prefill, seat.decode)
        self._seats[key] = _Seat(*names, now + self._ttl_s)
        while len(self._seats) > MAX_SESSIONS or next(iter(self._seats.values())).expires <= now:
            self._seats.popitem(last=False)
        return Choice(first, then, f"session: {'known' if known else 'new'}")

    def _pick(self, key: bytes, engines: Sequence[EngineLoad], seat: str) -> EngineLoad:
        for engine in engines:
            if engine.ref.engine_id == seat:
                return engine
        return max(engines, key=lambda engine: _weight(key, engine.ref.engine_id))


def _weight(key: bytes, engine: str) -> bytes:
    return hashlib.blake2b(engine.encode(), key=key, digest_size=8).digest()


def _digest(*words: str) -> bytes:
    return hashlib.blake2b("\0".join(words).encode(errors="surrogatepass"), digest_size=16).digest()

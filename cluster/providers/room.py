"""Room for what was fetched: so many bytes at once in all requests of a process; who waits gets a part in turn.

fetch.py has one, inlined_media.py takes parts of it. Knows no addresses and no formats.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from diptych.protos.errors import Overloaded

from .metrics import FetchMetrics

RETRY_AFTER_S = 2.0


@dataclass(slots=True, eq=False)
class _Turn:
    size_bytes: int
    granted: asyncio.Future[None]


class Room:
    """Of one event loop. `held_bytes` is what is taken now."""

    def __init__(self, most_bytes: int, metrics: FetchMetrics | None = None) -> None:
        self.held_bytes = 0
        self._most_bytes = most_bytes
        self._metrics = metrics
        self._turns: deque[_Turn] = deque()

    @property
    def num_waiting(self) -> int:
        """For a part."""
        return len(self._turns)

    @asynccontextmanager
    async def part(self, size_bytes: int, wait_s: float) -> AsyncIterator[Part]:
        """`size_bytes`, or all there are where that is less, until the block's end. Nobody who came later is let
        before. Raises Overloaded after `wait_s`.
        """
        part = Part(self, min(size_bytes, self._most_bytes))
        await self._take(part.size_bytes, wait_s)
        try:
            yield part
        finally:
            part.shrink(0)

    async def _take(self, size_bytes: int, wait_s: float) -> None:
        if not self._turns and self.held_bytes + size_bytes <= self._most_bytes:
            self._hold(size_bytes)
            return
        turn = _Turn(size_bytes, asyncio.get_running_loop().create_future())
        self._turns.append(turn)
        self._tell()
        try:
            async with asyncio.timeout(wait_s):
                await turn.granted
        except BaseException as exc:
            if turn in self._turns:
                self._turns.remove(turn)
                self._hold(0)
            else:
                self._hold(-size_bytes)
            if not isinstance(exc, TimeoutError):
                raise
            if self._metrics is not None:
                self._metrics.refused.inc()
            raise Overloaded(
                f"this server holds {self._most_bytes} bytes of files behind addresses at once, and other requests' "
                "take them up: try again later, or send the content itself as data:TYPE;base64,...",
                RETRY_AFTER_S,
            ) from None

    def _hold(self, more_bytes: int) -> None:
        """`more_bytes`, or less; and whoever is next, if there is room."""
        self.held_bytes += more_bytes
        while self._turns and self.held_bytes + self._turns[0].size_bytes <= self._most_bytes:
            turn = self._turns.popleft()
            self.held_bytes += turn.size_bytes
            if not turn.granted.done():  # else it was given up just now, and comes to give this back
                turn.granted.set_result(None)
        self._tell()

    def _tell(self) -> None:
        if self._metrics is not None:
            self._metrics.held_bytes.set(self.held_bytes)
            self._metrics.waiting.set(len(self._turns))


class Part:
    """What one holder has."""

    def __init__(self, room: Room, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._room = room

    def shrink(self, size_bytes: int) -> None:
        """To so many bytes; the rest is for others."""
        less = self.size_bytes - size_bytes
        if less > 0:
            self.size_bytes = size_bytes
            self._room._hold(-less)

"""Seats for the lines of batches in one router: a bounded number in work, the next one to the tenant that has fewest.

Called by run.py. The router's own line and the engines' decide afterwards, beside the interactive requests.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Seats:
    """One event loop."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant; who waits longest comes first

    @asynccontextmanager
    async def seat(self, tenant: str) -> AsyncIterator[None]:
        """For as long as the block lasts; waits for one."""
        await self._enter(tenant)
        try:
            yield
        finally:
            self._leave(tenant)

    async def _enter(self, tenant: str) -> None:
        if self._free:
            self._free -= 1
            self._held[tenant] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the seat came just now
                self._leave(tenant)
            raise

    def _leave(self, tenant: str) -> None:
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        while self._waiting:
            name = min(self._waiting, key=lambda one: self._held[one])
            line = self._waiting.pop(name)
            turn = line.popleft()
            if line:
                self._waiting[name] = line  # behind the others: those with as many seats take turns
            if not turn.done():  # it was cancelled and left it in the line
                self._held[name] += 1
                turn.set_result(None)
                return
        self._free += 1

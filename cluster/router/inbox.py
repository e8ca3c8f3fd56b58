"""Frames of one engine's stream: one at a time, or several where their readers are behind.

An engine's step is a frame, and each of its tokens wakes the task of one answer. While all of them run, the next frames
come; handed out together, their tokens leave in one piece of text each, so that a router never falls further behind.

    frame --> readers run for 18 ms --> frame, and what comes within 1 ms of it --> ...
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from diptych.protos import engine_pb2 as pb

SHARE = 1 / 16  # of the time that readers needed, to wait for further frames: idle time where there are none
LEAST_LAG_S = 0.004  # readers that need less are not behind
MOST_FRAMES = 32  # handed out together


class Inbox:
    """`next` for one caller, then `close`. `read` gives a frame or raises; it is called once at a time."""

    def __init__(self, read: Callable[[], Awaitable[pb.EngineFrame]]) -> None:
        self._read = read
        self._reading: asyncio.Future[pb.EngineFrame] | None = None
        self._lag_s = 0.0  # from the last frames until whoever they woke had run

    async def next(self) -> list[pb.EngineFrame]:
        """The next frames in their order, at least one. Raises what reading raised, after all frames before it."""
        frames = [await self._one()]
        if self._lag_s < LEAST_LAG_S:
            return frames
        patience = self._lag_s * SHARE
        while len(frames) < MOST_FRAMES:
            if self._reading is None:
                self._reading = asyncio.ensure_future(self._read())
            await asyncio.wait([self._reading], timeout=patience)
            if not self._reading.done() or self._reading.cancelled() or self._reading.exception() is not None:
                break
            frames.append(await self._one())
        return frames

    def given_out(self) -> None:
        """The caller has woken the readers of the last frames."""
        loop = asyncio.get_running_loop()
        loop.call_soon(self._all_ran, loop.time())  # behind them in the loop's line

    def close(self) -> None:
        """Read no more."""
        if self._reading is not None:
            self._reading.cancel()

    async def _one(self) -> pb.EngineFrame:
        reading, self._reading = self._reading, None
        return await (self._read() if reading is None else reading)

    def _all_ran(self, woken_at: float) -> None:
        self._lag_s = asyncio.get_running_loop().time() - woken_at

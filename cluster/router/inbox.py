"""Frames of one engine's stream: one at a time, or several where the answers' tasks are behind.

An engine's step is a frame, and each of its tokens wakes the task of one answer. While all of them run, the next frames
come; told together, their tokens leave in one piece of text each, so that a router never falls further behind.

    frame --> tasks run for 18 ms --> frame, and what comes within 1 ms of it --> ...
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from diptych.protos import engine_pb2 as pb

SHARE = 1 / 16  # of the time that the tasks needed, to wait for further frames: idle time where there are none
LEAST_LAG_S = 0.004  # tasks that need less are not behind
MOST_FRAMES = 32  # told together


class Inbox:
    """`run` once. `read` gives a frame or raises, and is called once at a time; `take` gets the frames in order."""

    def __init__(
        self,
        read: Callable[[], Awaitable[pb.EngineFrame]],
        take: Callable[[pb.EngineFrame], None],
        clock: Callable[[], float],
    ) -> None:
        self._read = read
        self._take = take
        self._clock = clock
        self._held: list[pb.EngineFrame] = []
        self._reading: asyncio.Future[pb.EngineFrame] | None = None
        self._lag_s = 0.0  # from the last frames until whoever they woke had run

    async def run(self) -> None:
        """Until it is cancelled, or raises what `read` or `take` raised. What was read by then has been taken, unless
        `take` raised.
        """
        try:
            while True:
                await self._gather()
                self._give_out()
                asyncio.get_running_loop().call_soon(
                    self._all_ran, self._clock()
                )  # behind the tasks in the loop's line
        finally:
            self._end()

    async def _gather(self) -> None:
        self._held.append(await self._one())
        if self._lag_s < LEAST_LAG_S:
            return
        end = self._clock() + self._lag_s * SHARE
        while len(self._held) < MOST_FRAMES and (left := end - self._clock()) > 0:
            if self._reading is None:
                self._reading = asyncio.ensure_future(self._read())
            await asyncio.wait([self._reading], timeout=left)
            if not _is_whole(self._reading):
                break
            self._held.append(await self._one())

    async def _one(self) -> pb.EngineFrame:
        reading, self._reading = self._reading, None
        return await (self._read() if reading is None else reading)

    def _give_out(self) -> None:
        frames, self._held = self._held, []
        for frame in frames:
            self._take(frame)

    def _end(self) -> None:
        if self._reading is not None:
            if self._held and _is_whole(self._reading):
                self._held.append(self._reading.result())
            self._reading.cancel()
        self._give_out()

    def _all_ran(self, woken_at: float) -> None:
        self._lag_s = self._clock() - woken_at


def _is_whole(reading: asyncio.Future[pb.EngineFrame]) -> bool:
    return reading.done() and not reading.cancelled() and reading.exception() is None

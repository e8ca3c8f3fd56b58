"""Frames one by one, and together where whoever they wake is behind. No frame is lost, doubled or out of order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from diptych.cluster.router.inbox import LEAST_LAG_S, MOST_FRAMES, SHARE, Inbox
from diptych.protos import engine_pb2 as pb
from diptych.protos.errors import EngineLost

BEHIND_S = 1000.0  # a wait for further frames, which is of real time, does not end within a test then


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Stream:
    """An inbox with frames as they are put, in a time of its own; an exception ends it.

    `told` has what was taken, by turns of the loop. Whoever a frame wakes holds the loop for `wakes_s`.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.sent: asyncio.Queue[pb.EngineFrame | Exception] = asyncio.Queue()
        self.is_read = False
        self.frame_s = 0.0  # until a frame that is there has been read
        self.wakes_s = 0.0
        self.nonsense: int | None = None
        self.told: list[list[int]] = []
        self._is_new = True
        self.task = asyncio.create_task(Inbox(self.read, self.take, self.clock).run())

    def put(self, *numbers: int) -> None:
        for number in numbers:
            self.sent.put_nowait(pb.EngineFrame(tokens=pb.StepTokens(handle=[number])))

    async def read(self) -> pb.EngineFrame:
        assert not self.is_read, "two reads of one stream at a time"
        self.is_read = True
        try:
            await asyncio.sleep(0)
            frame = await self.sent.get()
        finally:
            self.is_read = False
        self.clock.advance(self.frame_s)
        if isinstance(frame, Exception):
            raise frame
        return frame

    def take(self, frame: pb.EngineFrame) -> None:
        (number,) = frame.tokens.handle
        if number == self.nonsense:
            raise EngineLost("nonsense")
        loop = asyncio.get_running_loop()
        if self._is_new:
            self._is_new = False
            self.told.append([])
            loop.call_soon(self.clock.advance, self.wakes_s)
            loop.call_soon(setattr, self, "_is_new", True)
        self.told[-1].append(number)


async def turns(count: int = 40) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
async def stream() -> AsyncIterator[Stream]:
    made = Stream()
    yield made
    made.task.cancel()
    await asyncio.gather(made.task, return_exceptions=True)


async def told(stream: Stream, *groups: list[int]) -> None:
    """Waits for them, and for what should not follow."""
    async with asyncio.timeout(20):
        while stream.told != list(groups):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await turns()
    assert stream.told == list(groups)


async def fallen_behind(stream: Stream, seconds: float = BEHIND_S) -> None:
    """After frame 0."""
    stream.wakes_s = seconds
    stream.put(0)
    await told(stream, [0])
    stream.told.clear()


async def test_frames_come_one_by_one_while_nobody_is_behind(stream: Stream) -> None:
    stream.wakes_s = LEAST_LAG_S / 2
    stream.put(1, 2, 3)
    await told(stream, [1], [2], [3])


async def test_what_came_while_tasks_ran_is_told_together(stream: Stream) -> None:
    await fallen_behind(stream)
    stream.wakes_s = 0.0
    stream.frame_s = BEHIND_S * SHARE / 3.5
    stream.put(1, 2, 3, 4, 5, 6)
    await told(stream, [1, 2, 3, 4, 5], [6])  # all that is read within the share; then they have caught up


async def test_frames_that_keep_coming_are_held_no_longer_than_the_share(stream: Stream) -> None:
    await fallen_behind(stream)
    stream.frame_s = BEHIND_S * SHARE * 0.6
    stream.put(*range(1, 7))
    await told(stream, [1, 2, 3], [4, 5, 6])


async def test_an_engine_that_never_pauses_cannot_hold_back_its_frames(stream: Stream) -> None:
    await fallen_behind(stream)
    stream.put(*range(1, 2 * MOST_FRAMES + 1))
    await told(stream, [*range(1, MOST_FRAMES + 1)], [*range(MOST_FRAMES + 1, 2 * MOST_FRAMES + 1)])


async def test_a_frame_that_comes_after_the_wait_is_the_next_one(stream: Stream) -> None:
    await fallen_behind(stream, 2 * LEAST_LAG_S)
    stream.wakes_s = 0.0
    stream.put(1)
    await told(stream, [1])
    assert stream.is_read, "the wait for another was in vain, and goes on"
    stream.put(2)
    await told(stream, [1], [2])


async def test_a_loss_is_told_after_the_frames_before_it(stream: Stream) -> None:
    await fallen_behind(stream)
    stream.put(1, 2)
    stream.sent.put_nowait(EngineLost("gone"))
    stream.put(3)
    with pytest.raises(EngineLost, match="gone"):
        await stream.task
    assert stream.told == [[1, 2]]


@pytest.mark.parametrize("late", [(), (3,)])
async def test_frames_that_were_read_are_told_when_the_stream_is_given_up(
    stream: Stream, late: tuple[int, ...]
) -> None:
    """Among them may be the end of an answer, which would be computed again for nothing."""
    await fallen_behind(stream)
    stream.put(1, 2)
    await turns()
    assert stream.told == []
    assert stream.is_read
    stream.put(*late)
    await asyncio.sleep(0)  # the read is over, nobody has looked yet
    stream.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream.task
    assert stream.told == [[1, 2, *late]]
    await asyncio.sleep(0)
    assert not stream.is_read


async def test_nothing_is_told_after_nonsense(stream: Stream) -> None:
    await fallen_behind(stream)
    stream.nonsense = 2
    stream.frame_s = BEHIND_S * SHARE * 0.6
    stream.put(1, 2, 3)
    with pytest.raises(EngineLost, match="nonsense"):
        await stream.task
    assert stream.told == [[1]]
    await asyncio.sleep(0)
    assert not stream.is_read

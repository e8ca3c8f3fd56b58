"""Frames one by one, and together where whoever they wake is behind. No frame is lost, doubled or out of order."""

from __future__ import annotations

import asyncio
import time

import pytest

from diptych.cluster.router.inbox import LEAST_LAG_S, MOST_FRAMES, Inbox
from diptych.protos import engine_pb2 as pb
from diptych.protos.errors import EngineLost


class Stream:
    """Frames as they are put; an exception ends it."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[pb.EngineFrame | Exception] = asyncio.Queue()
        self.is_read = False

    def put(self, *numbers: int) -> None:
        for number in numbers:
            self.sent.put_nowait(pb.EngineFrame(tokens=pb.StepTokens(handle=[number])))

    async def read(self) -> pb.EngineFrame:
        assert not self.is_read, "two reads of one stream at a time"
        self.is_read = True
        try:
            frame = await self.sent.get()
        finally:
            self.is_read = False
        if isinstance(frame, Exception):
            raise frame
        return frame


def numbers(frames: list[pb.EngineFrame]) -> list[int]:
    return [frame.tokens.handle[0] for frame in frames]


async def wake(inbox: Inbox, *, seconds: float) -> None:
    """A reader that holds the loop for so long once it is woken."""
    asyncio.get_running_loop().call_soon(time.sleep, seconds)
    inbox.given_out()
    for _ in range(3):
        await asyncio.sleep(0)


async def test_frames_come_one_by_one_while_nobody_is_behind() -> None:
    stream = Stream()
    inbox = Inbox(stream.read)
    stream.put(1, 2, 3)
    for number in (1, 2, 3):
        assert numbers(await inbox.next()) == [number]
        await wake(inbox, seconds=0)


async def test_what_came_while_readers_ran_is_handed_out_together() -> None:
    stream = Stream()
    inbox = Inbox(stream.read)
    stream.put(1)
    assert numbers(await inbox.next()) == [1]
    await wake(inbox, seconds=2 * LEAST_LAG_S)
    stream.put(2, 3, 4)
    assert numbers(await inbox.next()) == [2, 3, 4]
    await wake(inbox, seconds=0)
    stream.put(5, 6)
    assert numbers(await inbox.next()) == [5], "they have caught up"
    assert numbers(await inbox.next()) == [6]


async def test_a_frame_that_comes_after_the_wait_is_the_next_one() -> None:
    stream = Stream()
    inbox = Inbox(stream.read)
    stream.put(1)
    await inbox.next()
    await wake(inbox, seconds=2 * LEAST_LAG_S)
    stream.put(2)
    assert numbers(await inbox.next()) == [2]  # its wait for another was in vain, and goes on
    assert stream.is_read
    await wake(inbox, seconds=0)
    stream.put(3)
    assert numbers(await inbox.next()) == [3]


async def test_an_engine_that_never_pauses_cannot_hold_back_its_frames() -> None:
    stream = Stream()
    inbox = Inbox(stream.read)
    stream.put(0)
    await inbox.next()
    await wake(inbox, seconds=0.5)  # patience beyond doubt
    stream.put(*range(1, 2 * MOST_FRAMES))
    assert numbers(await inbox.next()) == list(range(1, MOST_FRAMES + 1))


async def test_a_loss_is_told_after_the_frames_before_it() -> None:
    stream = Stream()
    inbox = Inbox(stream.read)
    stream.put(1)
    await inbox.next()
    await wake(inbox, seconds=0.5)
    stream.put(2, 3)
    stream.sent.put_nowait(EngineLost("gone"))
    assert numbers(await inbox.next()) == [2, 3]
    with pytest.raises(EngineLost, match="gone"):
        await inbox.next()
    inbox.close()


async def test_closing_reads_no_more() -> None:
    stream = Stream()
    inbox = Inbox(stream.read)
    stream.put(1)
    await inbox.next()
    await wake(inbox, seconds=2 * LEAST_LAG_S)
    stream.put(2)
    await inbox.next()
    assert stream.is_read
    inbox.close()
    await asyncio.sleep(0)
    assert not stream.is_read

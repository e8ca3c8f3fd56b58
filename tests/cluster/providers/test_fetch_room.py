"""All fetched files of a process have one room: nobody gets more than is left, nobody is passed, nothing is lost."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from diptych.cluster.providers.fetch import Fetched, Fetcher
from diptych.cluster.providers.fetch_settings import FetchSettings
from diptych.cluster.providers.inlined_media import inlined_for
from diptych.cluster.providers.metrics import FetchMetrics
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.room import Room
from diptych.cluster.router.rig import until
from diptych.protos.errors import Overloaded
from diptych.protos.messages import Media, Message
from diptych.protos.openai import ChatRequest

LONG_S = 60.0


async def test_who_waits_is_let_in_in_turn_and_a_small_one_passes_no_large_one() -> None:
    """A stream of small files would keep a large one out for ever."""
    room, inside, gates = Room(100), list[str](), {name: asyncio.Event() for name in "abcd"}

    async def holder(name: str, size_bytes: int) -> None:
        async with room.part(size_bytes, LONG_S):
            inside.append(name)
            await gates[name].wait()

    async with asyncio.TaskGroup() as group:
        for name, size_bytes in (("a", 60), ("b", 60), ("c", 10), ("d", 40)):
            group.create_task(holder(name, size_bytes))
        await until(lambda: room.num_waiting == 3)
        assert (inside, room.held_bytes) == (["a"], 60)
        gates["a"].set()
        await until(lambda: len(inside) == 3)
        assert (inside, room.held_bytes, room.num_waiting) == (["a", "b", "c"], 70, 1)
        for gate in gates.values():
            gate.set()
    assert (inside, room.held_bytes) == (["a", "b", "c", "d"], 0)


async def test_one_that_is_larger_than_all_there_is_gets_it_alone() -> None:
    """And does not wait for ever."""
    room = Room(100)
    async with room.part(500, LONG_S) as part:
        assert (part.size_bytes, room.held_bytes) == (100, 100)


async def test_who_waited_too_long_is_told_and_holds_up_nobody() -> None:
    registry = CollectorRegistry()
    room = Room(100, FetchMetrics(registry))
    async with room.part(100, LONG_S) as part:
        with pytest.raises(Overloaded, match=r"holds 100 bytes of files.*send the content itself") as told:
            async with room.part(50, 0.0):
                raise AssertionError("there is no room")
        assert told.value.retry_after_s > 0
        page = generate_latest(registry).decode()
        assert "diptych_fetch_held_bytes 100.0" in page
        assert "diptych_fetch_refused_total 1.0" in page
        part.shrink(30)
        async with room.part(70, 0.0):
            assert room.held_bytes == 100
    assert "diptych_fetch_held_bytes 0.0" in generate_latest(registry).decode()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 3), st.booleans()), max_size=12), st.randoms())
async def test_whatever_becomes_of_holders_all_room_is_there_again(
    holders: list[tuple[int, int, bool]], chance: object
) -> None:
    """Also of those that were cancelled in the moment in which they got theirs."""
    room = Room(100)

    async def holder(size_bytes: int, num_rounds: int, shrinks: bool) -> None:
        async with room.part(size_bytes, LONG_S) as part:
            assert room.held_bytes <= 100
            if shrinks:
                part.shrink(size_bytes // 2)
            for _ in range(num_rounds):
                await asyncio.sleep(0)

    tasks = [asyncio.create_task(holder(*one)) for one in holders]
    for task in tasks:
        if chance.random() < 0.3:  # type: ignore[attr-defined]
            task.cancel()
        if chance.random() < 0.5:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(one is None or isinstance(one, asyncio.CancelledError) for one in found)
    assert (room.held_bytes, room.num_waiting) == (0, 0)


class Shelf(Fetcher):
    """Every file is there at once, once the gate is open; counts what is held at most."""

    def __init__(self, settings: FetchSettings) -> None:
        super().__init__(settings)
        self.gate = asyncio.Event()
        self.num_begun = 0

    async def fetch(self, *args: object, **more: object) -> Fetched:
        self.num_begun += 1
        await self.gate.wait()
        return Fetched(b"x" * 40, "image/png")


async def test_requests_at_once_fetch_no_more_than_there_is_room_for() -> None:
    """A hundred requests with a large image each were a hundred images in memory."""
    shelf = Shelf(FetchSettings(max_bytes=100, request_bytes=100, held_bytes=200))
    provider = Registry.load(None, {}).provider("anthropic")
    object.__setattr__(provider, "reads_urls", ())
    image = Media(kind="image", path="messages[0].content[0]", url="https://cdn.test/a.png")
    asked = ChatRequest.model_validate({"model": "m", "messages": (Message(role="user", parts=(image,)),)})
    done, most_held, ends = 0, 0, asyncio.Event()

    async def one() -> None:
        nonlocal done, most_held
        async with inlined_for(provider, asked, shelf, wait_s=LONG_S):
            done += 1
            most_held = max(most_held, shelf.room.held_bytes)
            await ends.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(one())
        await until(lambda: shelf.room.num_waiting == 18 and shelf.num_begun == 2)
        assert shelf.room.held_bytes == 200
        shelf.gate.set()
        await until(lambda: done == 3)
        assert (shelf.num_begun, shelf.room.held_bytes) == (3, 120)  # one more needs 100 for a while
        ends.set()
    assert (done, shelf.room.held_bytes) == (20, 0)
    assert most_held <= 200

"""A bounded number in work, a bounded queue in order, and places that are never lost or doubled."""

from __future__ import annotations

import asyncio
import random

import pytest

from diptych.cluster.router.admission import Admission
from diptych.protos.errors import DeadlineExceeded, Overloaded


async def spin() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def admission(running: int, waiting: int) -> Admission:
    return Admission(max_running=running, max_waiting=waiting, clock=asyncio.get_running_loop().time)


FAR = 1e12


async def test_the_queue_is_served_in_order() -> None:
    gate, order = admission(1, 3), list[int]()
    await gate.enter(FAR)

    async def wait(number: int) -> None:
        await gate.enter(FAR)
        order.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(3)]
    await spin()
    assert (gate.running, gate.waiting) == (1, 3)
    for count in range(1, 4):
        gate.leave(0.1)
        await spin()
        assert order == list(range(count))
    gate.leave(0.1)
    assert (gate.running, gate.waiting) == (0, 0)
    await asyncio.gather(*tasks)


async def test_one_more_than_the_queue_holds_is_refused_at_once() -> None:
    gate = admission(1, 0)
    await gate.enter(FAR)
    with pytest.raises(Overloaded) as caught:
        await gate.enter(FAR)
    assert 1 <= caught.value.retry_after_s <= 60


async def test_a_deadline_ends_the_wait() -> None:
    gate = admission(1, 1)
    await gate.enter(FAR)
    with pytest.raises(DeadlineExceeded):
        await gate.enter(0)
    assert (gate.running, gate.waiting) == (1, 0)


async def test_a_place_given_to_one_who_just_left_goes_to_the_next() -> None:
    gate = admission(1, 2)
    await gate.enter(FAR)
    first, second = (asyncio.create_task(gate.enter(FAR)) for _ in range(2))
    await spin()
    gate.leave(0.1)  # the first one's place is set, but its task has not run yet
    first.cancel()
    await spin()
    assert first.cancelled()
    assert second.done()
    assert gate.running == 1


async def test_random_comings_and_goings_end_where_they_began() -> None:
    gate, chance = admission(3, 5), random.Random(1)

    async def one() -> None:
        try:
            await gate.enter(FAR)
        except Overloaded:
            return
        assert gate.running <= 3
        try:
            await asyncio.sleep(0)
        finally:
            gate.leave(0.01)

    tasks = []
    for _ in range(500):
        tasks.append(asyncio.create_task(one()))
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (gate.running, gate.waiting) == (0, 0)

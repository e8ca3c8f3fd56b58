"""A bounded number in work, a bounded queue in order, and places that are never lost or doubled."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter

import pytest

from diptych.cluster.router.admission import Admission
from diptych.protos.errors import DeadlineExceeded, Overloaded
from diptych.protos.types import GenerateRequest, SamplingParams, TransferKey


async def spin() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def admission(running: int, waiting: int) -> Admission:
    return Admission(max_running=running, max_waiting=waiting, clock=asyncio.get_running_loop().time)


FAR = 1e12
_NUMBERS = itertools.count()


def request(
    *, tenant: str = "", weight: float = 1.0, priority: int = 0, deadline: float = FAR, prompt: int = 10
) -> GenerateRequest:
    return GenerateRequest(
        key=TransferKey(next(_NUMBERS).to_bytes(16, "big")),
        prompt=(1,) * prompt,
        sampling=SamplingParams(max_tokens=1),
        deadline=deadline,
        priority=priority,
        tenant=tenant,
        weight=weight,
    )


def leave(gate: Admission) -> None:
    gate.leave(request(), num_tokens=1, duration_s=0.1)


async def test_the_queue_is_served_in_order() -> None:
    gate, order = admission(1, 3), list[int]()
    await gate.enter(request())

    async def wait(number: int) -> None:
        await gate.enter(request())
        order.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(3)]
    await spin()
    assert (gate.running, gate.waiting) == (1, 3)
    for count in range(1, 4):
        leave(gate)
        await spin()
        assert order == list(range(count))
    leave(gate)
    assert (gate.running, gate.waiting) == (0, 0)
    await asyncio.gather(*tasks)


async def test_one_more_than_the_queue_holds_is_refused_at_once() -> None:
    gate = admission(1, 0)
    await gate.enter(request())
    with pytest.raises(Overloaded) as caught:
        await gate.enter(request())
    assert 1 <= caught.value.retry_after_s <= 60


async def test_a_deadline_ends_the_wait() -> None:
    gate = admission(1, 1)
    await gate.enter(request())
    with pytest.raises(DeadlineExceeded):
        await gate.enter(request(deadline=0))
    assert (gate.running, gate.waiting) == (1, 0)


async def test_a_place_given_to_one_who_just_left_goes_to_the_next() -> None:
    gate = admission(1, 2)
    await gate.enter(request())
    first, second = (asyncio.create_task(gate.enter(request())) for _ in range(2))
    await spin()
    leave(gate)  # the first one's place is set, but its task has not run yet
    first.cancel()
    await spin()
    assert first.cancelled()
    assert second.done()
    assert gate.running == 1


async def test_random_comings_and_goings_end_where_they_began() -> None:
    gate, chance = admission(3, 5), random.Random(1)

    async def one() -> None:
        try:
            await gate.enter(request())
        except Overloaded:
            return
        assert gate.running <= 3
        try:
            await asyncio.sleep(0)
        finally:
            leave(gate)

    tasks = []
    for _ in range(500):
        tasks.append(asyncio.create_task(one()))
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (gate.running, gate.waiting) == (0, 0)


async def served(gate: Admission, requests: dict[str, GenerateRequest]) -> list[str]:
    """The names in the order in which they get the one seat."""
    order: list[str] = []

    async def one(name: str) -> None:
        await gate.enter(requests[name])
        order.append(name)
        gate.leave(requests[name], num_tokens=0, duration_s=0.1)

    await gate.enter(request())
    tasks = [asyncio.create_task(one(name)) for name in requests]
    await spin()
    leave(gate)
    await asyncio.gather(*tasks)
    return order


async def test_the_queue_goes_by_priority_then_by_deadline() -> None:
    requests = {
        "late": request(deadline=300),
        "low": request(priority=1, deadline=100),
        "soon": request(deadline=200),
        "high": request(priority=-1),
    }
    gate = Admission(max_running=1, max_waiting=9, clock=lambda: 0.0)
    assert await served(gate, requests) == ["high", "soon", "late", "low"]


async def test_a_tenant_with_many_requests_does_not_hold_up_one_with_few() -> None:
    requests = {f"many{i}": request(tenant="many") for i in range(8)}
    requests |= {f"few{i}": request(tenant="few") for i in range(2)}
    order = await served(admission(1, 20), requests)
    assert {"few0", "few1"} <= set(order[:5])


async def test_weights_are_shares_of_the_seats_while_both_wait() -> None:
    requests = {f"a{i}": request(tenant="a", weight=3.0) for i in range(30)}
    requests |= {f"b{i}": request(tenant="b") for i in range(30)}
    order = await served(admission(1, 60), requests)
    assert Counter(name[0] for name in order[:20])["a"] in range(13, 18)


async def test_a_full_queue_takes_a_newcomer_in_for_one_of_a_tenant_that_fills_it() -> None:
    gate = admission(1, 4)
    await gate.enter(request())
    hog = [asyncio.create_task(gate.enter(request(tenant="hog"))) for _ in range(4)]
    await spin()
    guest = asyncio.create_task(gate.enter(request(tenant="guest")))
    await spin()
    assert [task.done() for task in hog] == [False, False, False, True]
    assert isinstance(hog[3].exception(), Overloaded)
    with pytest.raises(Overloaded):
        await gate.enter(request(tenant="hog"))
    assert gate.waiting == 4
    assert not guest.done()
    for _ in (*hog[:3], guest):
        leave(gate)
    await asyncio.gather(*hog[:3], guest)
    leave(gate)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_a_full_queue_takes_an_urgent_one_in_for_a_less_urgent_one() -> None:
    gate = admission(1, 1)
    await gate.enter(request())
    patient = asyncio.create_task(gate.enter(request(priority=5)))
    await spin()
    urgent = asyncio.create_task(gate.enter(request(priority=0)))
    await spin()
    assert isinstance(patient.exception(), Overloaded)
    leave(gate)
    await urgent
    leave(gate)
    assert gate.running == 0

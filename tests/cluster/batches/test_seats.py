"""Seats for lines: never more than there are, never one lost, the next to the tenant with the fewest."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from diptych.cluster.batches.seats import Seats


@pytest.mark.parametrize("seed", range(20))
async def test_no_seat_is_lost_or_made_whoever_gives_up(seed: int) -> None:
    """A task that is cancelled at the moment its seat comes must pass it on."""
    rng, seats, held = random.Random(seed), Seats(4), Counter[str]()

    async def work(tenant: str) -> None:
        async with seats.seat(tenant):
            held[tenant] += 1
            assert sum(held.values()) <= 4
            try:
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                held[tenant] -= 1

    tasks = []
    for _ in range(300):
        tasks.append(asyncio.create_task(work(rng.choice("abc"))))
        if rng.random() < 0.5:
            rng.choice(tasks).cancel()
        if rng.random() < 0.3:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert seats._free == 4
    assert not seats._waiting
    assert not seats._held


async def test_a_tenant_with_one_batch_gets_as_many_seats_as_one_with_many() -> None:
    seats, held, most = Seats(8), Counter[str](), Counter[str]()
    go = asyncio.Event()

    async def work(tenant: str) -> None:
        async with seats.seat(tenant):
            held[tenant] += 1
            most[tenant] = max(most[tenant], held[tenant])
            if not go.is_set():
                await go.wait()
            await asyncio.sleep(0)
            held[tenant] -= 1

    greedy = [asyncio.create_task(work("greedy")) for _ in range(100)]
    await asyncio.sleep(0)
    modest = [asyncio.create_task(work("modest")) for _ in range(8)]
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(*modest)
    assert sum(task.done() for task in greedy) <= 8 + 8 + 4
    await asyncio.gather(*greedy)
    assert most["modest"] >= 4

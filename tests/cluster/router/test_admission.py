"""A bounded number in work, a bounded queue in order, and places that are never lost or doubled."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from diptych.cluster.router.admission import Admission
from diptych.protos.errors import CapacityError, DeadlineExceeded, Overloaded, OverShare
from diptych.protos.types import GenerateRequest, SamplingParams, TransferKey


async def spin() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def admission(running: int, waiting: int) -> Admission:
    return Admission(max_running=running, max_waiting=waiting, clock=asyncio.get_running_loop().time)


FAR = 1e12
_NUMBERS = itertools.count()


def request(
    *, tenant: str = "", weight: float = 1.0, priority: int = 0, deadline: float | None = FAR, prompt: int = 10
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


@pytest.mark.parametrize("tenants", [1, 3])
async def test_random_comings_and_goings_end_where_they_began(tenants: int) -> None:
    gate, chance = admission(3, 5), random.Random(1)

    async def one() -> None:
        mine = request(tenant=f"t{chance.randrange(tenants)}", priority=chance.randrange(2))
        try:
            await gate.enter(mine)
        except CapacityError:
            return
        assert gate.running <= 3
        try:
            await asyncio.sleep(0)
        finally:
            gate.leave(mine, num_tokens=1, duration_s=0.1)

    tasks = []
    for _ in range(500):
        tasks.append(asyncio.create_task(one()))
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (gate.running, gate.waiting) == (0, 0)
    assert not gate._inside
    assert not gate._held
    assert not gate._groups
    assert not gate._weights


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
    assert isinstance(hog[3].exception(), OverShare)
    with pytest.raises(OverShare):
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


@dataclass
class Load:
    """Time that only events move: clients that come, seats that are given back."""

    max_running: int
    max_waiting: int
    service_s: Callable[[str], float]
    now: float = 0.0
    waits: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))  # arrival, wait
    told: dict[str, list[tuple[float, CapacityError]]] = field(default_factory=lambda: defaultdict(list))

    async def run(self, arrivals: list[tuple[float, GenerateRequest]]) -> Admission:
        gate = Admission(max_running=self.max_running, max_waiting=self.max_waiting, clock=lambda: self.now)
        events: list[tuple[float, int, GenerateRequest, bool]] = []
        count = itertools.count()
        for at, one in arrivals:
            heapq.heappush(events, (at, next(count), one, True))
        waiting: dict[asyncio.Task[None], tuple[float, GenerateRequest]] = {}
        while events:
            self.now, _, one, is_arrival = heapq.heappop(events)
            if is_arrival:
                waiting[asyncio.create_task(gate.enter(one))] = self.now, one
            else:
                gate.leave(one, num_tokens=20, duration_s=self.service_s(one.tenant))
            await spin()
            for task in [task for task in waiting if task.done()]:
                came, entered = waiting.pop(task)
                error = task.exception()
                if isinstance(error, CapacityError):
                    self.told[entered.tenant].append((self.now, error))
                    continue
                assert error is None
                self.waits[entered.tenant].append((came, self.now - came))
                leaves_at = self.now + self.service_s(entered.tenant)
                heapq.heappush(events, (leaves_at, next(count), entered, False))
        return gate

    def ratios(self, tenant: str, since: float, until: float) -> list[float]:
        """What refused clients were told, over what the one who had joined last before them waited in truth."""
        joined = sorted(self.waits[tenant])
        found = []
        for at, error in self.told[tenant]:
            before = [wait for came, wait in joined if came <= at]
            if since <= at < until and before and before[-1] >= 1:
                found.append(error.retry_after_s / before[-1])
        return found


def steadily(rate: float, span_s: float, **fields: object) -> list[tuple[float, GenerateRequest]]:
    made: list[tuple[float, GenerateRequest]] = []
    for i in range(int(rate * span_s)):
        made.append((i / rate, request(deadline=None, **fields)))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("service_s", [0.5, 4.0])
async def test_retry_after_is_the_wait_within_a_factor_of_two(service_s: float) -> None:
    """Guards against a number made up: told too short, clients come back for nothing; too long, seats stay empty."""
    chance = random.Random(3)
    load = Load(4, 40, lambda tenant: service_s * chance.uniform(0.5, 1.5))
    capacity = 4 / service_s
    gate = await load.run(steadily(5 * capacity, 60 * service_s))
    ratios = load.ratios("", 5 * service_s, 55 * service_s)
    assert len(ratios) > 500
    assert 0.75 <= statistics.median(ratios) <= 1.33
    assert sum(0.5 <= ratio <= 2 for ratio in ratios) >= 0.95 * len(ratios)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_retry_after_knows_a_tenants_share() -> None:
    """Guards against one number for all: who has three quarters of the seats waits a third as long."""
    load = Load(4, 60, lambda tenant: 1.0)
    arrivals = steadily(20, 60, tenant="gold", weight=3.0) + steadily(20, 60, tenant="iron")
    await load.run(arrivals)
    for tenant in ("gold", "iron"):
        ratios = load.ratios(tenant, 20, 55)
        assert len(ratios) > 100
        assert 0.5 <= statistics.median(ratios) <= 2, tenant


async def test_a_tenant_far_over_its_share_costs_another_no_wait() -> None:
    """Guards against a queue in which the number of requests is a claim. R15 on a clock of its own."""
    alone, beside = Load(8, 64, lambda tenant: 1.0), Load(8, 64, lambda tenant: 1.0)
    mine = steadily(2, 60, tenant="b")
    await alone.run(mine)
    await beside.run(steadily(2, 60, tenant="b") + steadily(80, 60, tenant="a"))
    assert not beside.told["b"]
    assert {type(error) for _, error in beside.told["a"]} == {OverShare}

    def p95(load: Load) -> float:
        times = sorted(1.0 + wait for _, wait in load.waits["b"])
        return times[int(0.95 * len(times))]

    assert p95(beside) <= 1.5 * p95(alone)


async def test_five_times_the_capacity_keeps_every_seat_busy() -> None:
    """Guards against refusals that starve the work, and a backlog that outlives the load. R14 on a clock of its own."""
    load = Load(8, 64, lambda tenant: 1.0)
    gate = await load.run(steadily(40, 60))
    served = [came + wait + 1.0 for came, wait in load.waits[""]]
    assert sum(end <= 60 for end in served) >= 0.95 * 8 * 59
    assert max(served) <= 60 + 10
    assert {type(error) for _, error in load.told[""]} == {Overloaded}
    assert (gate.running, gate.waiting) == (0, 0)


async def test_before_anything_has_ended_the_age_of_the_work_is_the_estimate() -> None:
    """Guards against `retry-after: 1` for minutes while long requests hold every seat."""
    now = [0.0]
    gate = Admission(max_running=1, max_waiting=0, clock=lambda: now[0])
    await gate.enter(request())
    now[0] = 45.0
    with pytest.raises(Overloaded) as caught:
        await gate.enter(request())
    assert caught.value.retry_after_s == 45.0


@pytest.mark.parametrize("rate", [1, 2])
async def test_who_asks_rarely_does_not_wait_for_requests_that_end_all_at_once(rate: float) -> None:
    """Guards against seats that become free once in a request's length, because all were taken together."""
    load = Load(32, 64, lambda tenant: 10.0)
    rare = [(20 + at, one) for at, one in steadily(rate / 10, 160, tenant="b")]
    await load.run(steadily(30, 180, tenant="a") + rare)
    waits = sorted(wait for came, wait in load.waits["b"] if came > 40)
    assert waits[int(0.95 * len(waits))] <= 5.0
    assert statistics.median(waits) == 0


async def test_a_tenant_alone_has_every_seat_and_soon_after_others_have_gone() -> None:
    """Guards against seats that stay empty for nobody."""
    now = [0.0]
    gate = Admission(max_running=8, max_waiting=8, clock=lambda: now[0])
    guest = request(tenant="b")
    await gate.enter(guest)
    gate.leave(guest, num_tokens=1, duration_s=1.0)
    mine = [request(tenant="a") for _ in range(10)]
    tasks = [asyncio.create_task(gate.enter(one)) for one in mine]
    await spin()
    assert (gate.running, gate.waiting) == (7, 3)
    await gate.enter(guest)
    assert gate.running == 8
    gate.leave(guest, num_tokens=1, duration_s=1.0)
    assert (gate.running, gate.waiting) == (7, 3)
    now[0] += 10.0
    gate._look_again()
    await spin()
    assert (gate.running, gate.waiting) == (8, 2)
    for one in mine:
        gate.leave(one, num_tokens=1, duration_s=1.0)
        await spin()
    await asyncio.gather(*tasks)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_two_tenants_that_both_fill_it_use_every_seat() -> None:
    load = Load(8, 64, lambda tenant: 1.0)
    await load.run(steadily(20, 30, tenant="a") + steadily(20, 30, tenant="b"))
    ends = [came + wait + 1.0 for tenant in "ab" for came, wait in load.waits[tenant]]
    assert sum(2 <= end < 30 for end in ends) >= 0.95 * 8 * 28

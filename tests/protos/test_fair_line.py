"""The line against its rules: classes, shares, deadlines, arrival; nobody waits for ever."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.protos.fair_line import TURNS_PER_OLDEST, FairLine, Place
from diptych.protos.types import GenerateRequest, SamplingParams, TransferKey

Line = FairLine[Place]


def key(place: Place) -> TransferKey:
    return TransferKey(place.arrival.to_bytes(16, "big"))


def join(line: Line, place: Place, *, front: bool = False) -> Place:
    line.add(key(place), place, place, front=front)
    return place


def serve(line: Line, tokens: int = 1) -> Place:
    place = line.head()
    assert place is not None
    assert line.take(key(place)) is place
    line.charge(place, tokens)
    return place


def test_the_order_is_class_then_put_back_then_deadline_then_arrival() -> None:
    line = Line()
    places = [
        Place(arrival=1),
        Place(arrival=2, deadline=9.0),
        Place(arrival=3, deadline=5.0),
        Place(arrival=4, priority=-1),
        Place(arrival=5),
        Place(arrival=6, priority=2, deadline=1.0),
    ]
    for place in places:
        join(line, place)
    for arrival in (9, 8):
        join(line, Place(arrival=arrival), front=True)
    join(line, Place(arrival=7, priority=2), front=True)
    assert [serve(line).arrival for _ in range(9)] == [4, 8, 9, 3, 2, 1, 5, 7, 6]
    assert line.head() is None
    assert len(line) == 0


def test_a_place_is_read_off_a_request() -> None:
    request = GenerateRequest(
        key=TransferKey(bytes(16)),
        prompt=(1,),
        sampling=SamplingParams(max_tokens=1),
        priority=3,
        tenant="a",
        weight=2.5,
        deadline=7.0,
    )
    assert Place.of(request, 4) == Place(arrival=4, priority=3, tenant="a", weight=2.5, deadline=7.0)
    assert Place.of(GenerateRequest(key=request.key, prompt=(1,), sampling=request.sampling), 1).deadline == math.inf


costs = st.integers(1, 50)


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 7.0]), min_size=2, max_size=5),
    backlog=st.lists(costs, min_size=60, max_size=120),
    random_seed=st.integers(0, 2**20),
)
def test_tenants_that_wait_all_the_time_get_their_weighted_shares(
    weights: list[float], backlog: list[int], random_seed: int
) -> None:
    """At any moment two normalised services differ by at most one greatest cost of each: the bound of SFQ."""
    rng = random.Random(random_seed)
    line, arrivals, greatest = Line(), iter(range(10**9)), max(backlog)
    got = [0.0] * len(weights)

    def refill(tenant: int) -> None:
        join(line, Place(arrival=next(arrivals), tenant=str(tenant), weight=weights[tenant]))

    for tenant in range(len(weights)):
        refill(tenant)
        refill(tenant)
    for _ in range(200):
        cost = rng.choice(backlog)
        tenant = int(serve(line, cost).tenant)
        got[tenant] += cost / weights[tenant]
        refill(tenant)
        for a, weight_a in enumerate(weights):
            for b, weight_b in enumerate(weights):
                assert got[a] - got[b] <= greatest / weight_a + greatest / weight_b + 1e-9


def test_who_was_idle_has_no_credit_and_who_comes_new_no_privilege() -> None:
    line, arrivals = Line(), iter(range(10**6))
    for _ in range(100):
        join(line, Place(arrival=next(arrivals), tenant="busy"))
    for _ in range(50):
        assert serve(line, 10).tenant == "busy"
    for _ in range(50):
        join(line, Place(arrival=next(arrivals), tenant="idle"))
    got = Counter(serve(line, 10).tenant for _ in range(40))
    assert abs(got["idle"] - got["busy"]) <= 1, got


def test_what_is_used_without_waiting_puts_nobody_else_back() -> None:
    """A tenant with few long answers under way must not find the start of newcomers, its own, far ahead."""
    line, arrivals = Line(), iter(range(10**6))
    light = Place(arrival=next(arrivals), tenant="light")
    heavy = [join(line, Place(arrival=next(arrivals), tenant="heavy")) for _ in range(20)]
    for _ in range(1000):
        line.charge(light, 4)
        line.charge(heavy[0], 60)
    join(line, Place(arrival=next(arrivals), tenant="light"))
    assert "light" in {serve(line, 10).tenant for _ in range(2)}


def test_ever_new_tenants_cannot_hold_back_one_that_waits() -> None:
    line, arrivals = Line(), iter(range(10**6))
    join(line, Place(arrival=next(arrivals), tenant="patient"))
    for number in range(3):
        join(line, Place(arrival=next(arrivals), tenant=f"first {number}"))
    line.charge(Place(arrival=0, tenant="patient"), 500)
    for number in range(2000):
        join(line, Place(arrival=next(arrivals), tenant=f"new {number}", deadline=float(number)))
        if serve(line, 10).tenant == "patient":
            return
    raise AssertionError("the patient tenant starved")


def test_ever_new_deadlines_cannot_hold_back_one_without() -> None:
    line = Line()
    join(line, Place(arrival=0))
    for number in range(1, TURNS_PER_OLDEST + 1):
        join(line, Place(arrival=2 * number, deadline=float(number)))
        join(line, Place(arrival=2 * number + 1, deadline=float(number)))
        if serve(line).arrival == 0:
            return
    raise AssertionError("a request without a deadline starved")


def test_accounts_do_not_pile_up() -> None:
    line = Line()
    join(line, Place(arrival=0, tenant="stays"))
    for number in range(1, 5000):
        join(line, Place(arrival=number, tenant=str(number)))
        if number % 3:
            served = serve(line, 3)
            if served.tenant == "stays":
                join(line, served)
        else:
            line.discard(key(Place(arrival=number)))
    (lane,) = line._lanes.values()
    assert len(lane.accounts) <= 2 * len(line) + 64 + 8
    for place in list(line):
        line.discard(key(place))
    assert not line._lanes
    assert not line._priorities


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_use_keeps_to_the_order(seed: int) -> None:
    """Whoever is at the head is of the most urgent class, put back if anybody there is, else first of its tenant."""
    rng = random.Random(seed)
    line, waiting = Line(), dict[TransferKey, tuple[Place, bool]]()
    for arrival in range(400):
        if rng.random() < 0.6:
            place = Place(
                arrival=arrival,
                priority=rng.choice([0, 0, 0, 1, -3]),
                tenant=rng.choice("abc"),
                weight=rng.choice([0.5, 1.0, 3.0]),
                deadline=rng.choice([math.inf, math.inf, float(rng.randrange(20))]),
            )
            front = rng.random() < 0.15
            waiting[key(join(line, place, front=front))] = (place, front)
        if waiting and rng.random() < 0.15:
            gone = rng.choice(list(waiting))
            line.discard(gone)
            del waiting[gone]
        if waiting and rng.random() < 0.2:
            line.charge(rng.choice(list(waiting.values()))[0], rng.randrange(30))
        if waiting and rng.random() < 0.5:
            head = line.head()
            assert head is not None
            assert head.priority == min(place.priority for place, _ in waiting.values())
            peers = [(p, f) for p, f in waiting.values() if p.priority == head.priority]
            if any(front for _, front in peers):
                assert head.arrival == min(p.arrival for p, front in peers if front)
            else:
                own = [p for p, _ in peers if p.tenant == head.tenant]
                assert head.arrival == min(p.arrival for p in own) or head == min(
                    own, key=lambda p: (p.deadline, p.arrival)
                )
            assert line.take(key(head)) is head
            del waiting[key(head)]
            line.charge(head, rng.randrange(1, 40))
        assert len(line) == len(waiting)
        assert set(line) == {place for place, _ in waiting.values()}


def test_the_same_calls_give_the_same_order() -> None:
    def play() -> list[int]:
        rng, line, order = random.Random(3), Line(), list[int]()
        for arrival in range(500):
            tenant = rng.choice("abcdef")
            join(line, Place(arrival=arrival, tenant=tenant, weight=1 + ord(tenant) % 3, priority=rng.randrange(2)))
            if rng.random() < 0.7:
                order.append(serve(line, rng.randrange(1, 100)).arrival)
        return order

    assert play() == play()


def test_who_waits_twice_is_a_mistake() -> None:
    line = Line()
    place = join(line, Place(arrival=1))
    with pytest.raises(AssertionError):
        join(line, place)

"""Breakers, the retry budget and sliding counts, by the numbers that their settings name."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.gateway.breaker import Breaker, Pass
from diptych.cluster.gateway.course import Breakers
from diptych.cluster.gateway.retries import RetryBudget, SlidingCount
from diptych.cluster.gateway.settings import BreakerSettings
from diptych.cluster.gateway.testing import ScriptedTarget
from diptych.protos.failures import Failure, FailureKind
from diptych.protos.testing import FakeClock

KIND = FailureKind


def failure(kind: FailureKind = KIND.SERVER, retry_after_s: float | None = None) -> Failure:
    return Failure(kind=kind, message="", retry_after_s=retry_after_s)


def entered(breaker: Breaker) -> Pass:
    found = breaker.enter()
    assert found is not None
    return found


def made() -> tuple[Breaker, FakeClock]:
    clock = FakeClock()
    return Breaker(BreakerSettings(), clock), clock


def test_it_opens_after_five_requests_of_which_half_failed_and_not_before() -> None:
    """One failed request of one opened it, and the target was gone for everybody."""
    breaker, _ = made()
    for told in (True, False, True, False):
        if told:
            entered(breaker).answered()
        else:
            entered(breaker).failed(failure())
    assert breaker.state == "closed"
    entered(breaker).failed(failure())
    assert (breaker.state, breaker.why) == ("open", KIND.SERVER)
    assert breaker.enter() is None


def test_three_refused_connections_are_enough() -> None:
    """A host that is gone was asked by five requests before anybody drew a conclusion."""
    breaker, _ = made()
    for _ in range(3):
        assert breaker.state == "closed"
        entered(breaker).failed(failure(KIND.CONNECT))
    assert breaker.state == "open"


def test_what_failed_long_ago_opens_nothing() -> None:
    """Five failures over a day are no outage."""
    breaker, clock = made()
    for _ in range(8):
        entered(breaker).failed(failure())
        clock.advance(10)
    assert breaker.state == "closed"


def test_a_probe_closes_it_at_its_first_content_or_doubles_the_wait() -> None:
    """All who waited were let in at once, and brought the target down again."""
    breaker, clock = made()
    for _ in range(3):
        entered(breaker).failed(failure(KIND.CONNECT))
    waits = []
    for _ in range(6):
        waits.append(breaker.opens_in_s)
        clock.advance(breaker.opens_in_s)
        probe = entered(breaker)
        assert (probe.is_probe, breaker.state, breaker.enter()) == (True, "half_open", None)
        probe.failed(failure())
    assert waits == [5, 10, 20, 40, 60, 60]
    clock.advance(60)
    probe = entered(breaker)
    probe.began()
    assert breaker.state == "closed"
    probe.failed(failure())  # in the middle of its answer: one failure of a target that answers
    assert breaker.state == "closed"


def test_a_probe_that_was_given_up_leaves_its_place() -> None:
    """A client that went away kept a target closed for ever."""
    breaker, clock = made()
    entered(breaker).failed(failure(KIND.RATE_LIMITED, 3))
    clock.advance(3)
    entered(breaker).close()
    assert entered(breaker).is_probe


@pytest.mark.parametrize(
    ("kind", "retry_after_s", "wait_s"),
    [
        (KIND.AUTH, None, math.inf),
        (KIND.NOT_FOUND, None, 300),
        (KIND.QUOTA, None, 600),
        (KIND.RATE_LIMITED, 17.0, 17),
        (KIND.RATE_LIMITED, None, 1),
        (KIND.RATE_LIMITED, 1e9, 3600),
    ],
)
def test_what_opens_at_once_opens_for_its_own_time(
    kind: FailureKind, retry_after_s: float | None, wait_s: float
) -> None:
    """A wrong key was tried again every five seconds, until the provider locked the account."""
    breaker, clock = made()
    entered(breaker).failed(failure(kind, retry_after_s))
    assert breaker.opens_in_s == wait_s
    clock.advance(min(wait_s, 1e6) - 0.001)
    assert breaker.enter() is None
    clock.advance(0.001)
    assert (breaker.enter() is None) == (wait_s == math.inf)


@pytest.mark.parametrize("kind", [KIND.BAD_REQUEST, KIND.CONTEXT_LENGTH, KIND.UNSUPPORTED, KIND.TOTAL_TIMEOUT])
def test_what_is_the_requests_fault_opens_nothing(kind: FailureKind) -> None:
    """One client with a broken program closed a target for all."""
    breaker, _ = made()
    for _ in range(50):
        entered(breaker).failed(failure(kind))
    assert breaker.state == "closed"


def test_an_old_attempt_says_nothing_about_a_breaker_that_opened_since() -> None:
    """A long stream that began before an outage ended it on paper."""
    breaker, _ = made()
    old = entered(breaker)
    for _ in range(3):
        entered(breaker).failed(failure(KIND.CONNECT))
    old.began()
    old.answered()
    assert breaker.state == "open"


def test_another_key_is_another_chance() -> None:
    """After the operator had set a new key, the target stayed closed until the process was started again."""
    breakers = Breakers(BreakerSettings(), FakeClock())
    target = ScriptedTarget("p/a", key_id="old")
    entered(breakers.of(target)).failed(failure(KIND.AUTH))
    assert not breakers.of(target).admits
    target.key_id = "new"
    assert breakers.of(target).admits
    assert breakers.states() == {"p/a": "closed"}


async def test_who_waits_is_told_of_a_change() -> None:
    """Waiting by the clock alone, requests slept on when a probe had long succeeded."""
    breaker, clock = made()
    entered(breaker).failed(failure(KIND.RATE_LIMITED, 1))
    clock.advance(1)
    probe = entered(breaker)
    change = breaker.changed()
    probe.began()
    assert change.done()
    await asyncio.sleep(0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*FailureKind, None]), st.floats(0, 30)), max_size=40))
def test_a_breaker_always_admits_again_unless_a_key_is_needed(story: list[tuple[FailureKind | None, float]]) -> None:
    """Whatever happens, no target is lost for ever."""
    breaker, clock = made()
    had_auth = False
    for kind, seconds in story:
        passage = breaker.enter()
        if passage is not None:
            had_auth = had_auth or kind is KIND.AUTH
            if kind is None:
                passage.answered()
            else:
                passage.failed(failure(kind))
            passage.close()
        assert (breaker.opens_in_s == 0) == breaker.admits
        clock.advance(seconds)
    if not had_auth:
        clock.advance(3600)
        entered(breaker).answered()
        assert breaker.state == "closed"


def test_the_retry_budget_is_a_tenth_of_recent_requests_with_a_floor() -> None:
    """Every request tried three times turned a slow provider into a dead one."""
    clock = FakeClock()
    budget = RetryBudget(fraction=0.1, floor=3, clock=clock)
    assert [budget.try_take() for _ in range(4)] == [True, True, True, False]
    for _ in range(200):
        budget.admitted()
    assert [budget.try_take() for _ in range(18)] == [True] * 17 + [False]
    clock.advance(11)
    assert [budget.try_take() for _ in range(4)] == [True, True, True, False]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 3), max_size=60))
def test_a_sliding_count_is_that_of_its_window_to_a_tenth(gaps: list[float]) -> None:
    """Counted in steps, or each request would cost memory for half a minute."""
    count, times, now = SlidingCount(10.0), [], 100.0
    for gap in gaps:
        now += gap
        count.add(now)
        times.append(now)
        least, most = (sum(now - age < at for at in times) for age in (8.999, 10.0))
        assert least <= count.total(now) <= most + 1


def test_the_end_of_an_old_probe_closes_nothing() -> None:
    """A probe's long answer ended after the next outage had begun, and declared it over."""
    breaker, clock = made()
    entered(breaker).failed(failure(KIND.RATE_LIMITED, 1))
    clock.advance(1)
    probe = entered(breaker)
    probe.began()
    entered(breaker).failed(failure(KIND.QUOTA))
    clock.advance(600)
    other = entered(breaker)
    probe.answered()
    assert (other.is_probe, breaker.state) == (True, "half_open")


def test_names_that_clients_make_up_displace_no_configured_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `direct`, who named enough models opened the way to a target again that was closed off for everybody."""
    monkeypatch.setattr("diptych.cluster.gateway.course.MAX_BREAKERS", 4)
    breakers = Breakers(BreakerSettings(), FakeClock(), frozenset({"p/a"}))
    entered(breakers.of(ScriptedTarget("p/a"))).failed(failure(KIND.QUOTA))
    for i in range(9):
        breakers.of(ScriptedTarget(f"p/made-up-{i}"))
    assert breakers.states()["p/a"] == "open"
    assert len(breakers.states()) == 4

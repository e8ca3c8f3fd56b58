"""Limits of requests and tokens: what is taken is put right, a router keeps its part, a shadow refuses nobody."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as bounds
from hypothesis import strategies as st

from diptych.cluster.gateway.limits import Bucket, LimitReached, Limits, Visit
from diptych.cluster.gateway.money_settings import LimitSettings
from diptych.protos.errors import RateLimited


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def admit(limits: Limits, scope: str = "", tokens: tuple[int, int] = (10, 10), **settings: Any) -> Visit:
    rule = LimitSettings.model_validate(settings)
    return limits.admit([("a", rule, scope)], input_tokens=tokens[0], output_tokens=tokens[1])


def test_requests_come_again_as_the_minute_passes() -> None:
    """Retry-After is when the next one may come, not a minute."""
    clock = Clock()
    limits = Limits(clock)
    for left in (1, 0):
        visit = admit(limits, requests_per_minute=2)
        assert [(one.kind, one.limit, one.remaining) for one in visit.allowances] == [("requests", 2, left)]
    with pytest.raises(LimitReached, match="the limit a is 2 requests a minute") as told:
        admit(limits, requests_per_minute=2)
    assert told.value.retry_after_s == pytest.approx(30)
    assert told.value.allowances[0].reset_s == pytest.approx(60)
    assert isinstance(told.value, RateLimited)
    assert pickle.loads(pickle.dumps(told.value)).allowances == told.value.allowances
    admit(limits, "key=other", requests_per_minute=2)
    clock.now = 30.0
    admit(limits, requests_per_minute=2)


def test_tokens_are_taken_as_guessed_and_put_right_when_known() -> None:
    """A request that may have 900 tokens and has 10 must not keep the next one waiting for a minute."""
    clock = Clock()
    limits = Limits(clock)
    rule = {"output_tokens_per_minute": 1000, "input_tokens_per_minute": 100}
    visit = admit(limits, tokens=(10, 900), **rule)
    with pytest.raises(LimitReached, match="1000 tokens of answers a minute, and this request may have 900"):
        admit(limits, tokens=(10, 900), **rule)
    visit.leave(input_tokens=250, output_tokens=10)
    with pytest.raises(LimitReached, match="100 tokens of prompts") as told:
        admit(limits, tokens=(10, 900), **rule)
    assert told.value.retry_after_s == pytest.approx((150 + 10) / 100 * 60)
    clock.now = 100.0
    admit(limits, tokens=(10, 5000), **rule)  # more than a minute holds: when it is full


def test_so_many_at_once() -> None:
    """The seat of one that is over is free again, once."""
    limits = Limits(Clock())
    visits = [admit(limits, concurrency=2) for _ in range(2)]
    with pytest.raises(LimitReached, match="lets 2 requests be in work"):
        admit(limits, concurrency=2)
    visits[0].leave(input_tokens=1, output_tokens=1)
    admit(limits, concurrency=2)
    with pytest.raises(LimitReached):
        admit(limits, concurrency=2)


def test_a_shadow_counts_and_lets_through() -> None:
    """New limits are tried on real traffic first."""
    over: list[tuple[str, bool]] = []
    limits = Limits(Clock(), lambda name, is_shadow: over.append((name, is_shadow)))
    for _ in range(3):
        visit = admit(limits, requests_per_minute=1, shadow=True)
        assert visit.allowances == ()
    assert over == [("a", True)] * 2


def test_one_refusal_takes_nothing_of_the_other_limits() -> None:
    """Requests that one limit refuses would use up the other."""
    limits = Limits(Clock())
    wide, narrow = LimitSettings(requests_per_minute=10), LimitSettings(requests_per_minute=1)
    rules = [("wide", wide, ""), ("narrow", narrow, "")]
    limits.admit(rules, input_tokens=1, output_tokens=1)
    for _ in range(20):
        with pytest.raises(LimitReached):
            limits.admit(rules, input_tokens=1, output_tokens=1)
    assert limits.admit(rules[:1], input_tokens=1, output_tokens=1).allowances[0].remaining == 8


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 4), st.floats(0, 20)), max_size=60))
@bounds(max_examples=40)
def test_routers_together_keep_the_limit(num_routers: int, arrivals: list[tuple[int, float]]) -> None:
    """Each has its part: in no minute do all of them let through more than the limit and what was saved up."""
    clock = Clock()
    routers = [Limits(clock) for _ in range(num_routers)]
    for router in routers:
        router.share(num_routers)
    passed = 0
    for which, later in arrivals:
        clock.now += later
        try:
            admit(routers[which % num_routers], requests_per_minute=20)
            passed += 1
        except LimitReached:
            pass
    assert passed <= 20 + clock.now / 60 * 20 + 1e-6


def test_a_changed_number_of_routers_keeps_what_was_used() -> None:
    """A router that comes up must not give everybody a fresh minute."""
    bucket = Bucket(100, 0.0)
    bucket.take(100, 0.0)
    bucket.share(2, 0.0)
    assert bucket.level(0.0) == 0.0
    assert bucket.wait_s(50, 0.0) == pytest.approx(60)
    bucket.share(1, 0.0)
    assert bucket.level(60.0) == 100.0

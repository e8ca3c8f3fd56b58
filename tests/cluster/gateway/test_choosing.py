"""Strategies, hedges, breakers and budgets as requests meet them: who is asked, how often, and who is left alone."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journeys import HELLO, gateway, parse_chat, read, run, text_of

from diptych.cluster.gateway.load import Load, Quantiles
from diptych.cluster.gateway.ports import Context
from diptych.cluster.gateway.strategies import Asked, BetterOfTwo, Member, Sticky, conversation_key
from diptych.cluster.gateway.testing import HANG, ScriptedTarget, Wait, fails, says
from diptych.protos.deltas import Content
from diptych.protos.errors import DeadlineExceeded, Overloaded
from diptych.protos.failures import FailureKind
from diptych.protos.replies import Began

KIND = FailureKind
BODY = b'{"model":"chat","messages":[{"role":"user","content":"%d"}]}'


def members(*names: str, weights: dict[str, float] | None = None) -> list[Member]:
    return [
        Member(target=ScriptedTarget(name, [says("x")]), weight=(weights or {}).get(name, 1.0), load=Load())
        for name in names
    ]


def asked(n: int = 0, session: str = "") -> Asked:
    return Asked(request=parse_chat(BODY % n), session=session, now=100.0)


def test_p2c_takes_the_quicker_and_the_idler_one_and_tries_what_it_does_not_know() -> None:
    """Load went by turns to a target that took ten times as long."""
    a, b = members("p/a", "p/b")
    way = BetterOfTwo(random.Random(1))
    a.load.measured(1.0, 100.0, is_stream=True)
    b.load.measured(0.2, 100.0, is_stream=True)
    assert {way.pick([a, b], asked()).target.name for _ in range(20)} == {"p/b"}
    b.load.in_flight = 9
    assert {way.pick([a, b], asked()).target.name for _ in range(20)} == {"p/a"}
    new = members("p/new")[0]
    a.load.in_flight = 3
    assert way.pick([a, new], asked()).target.name == "p/new"


def test_a_slow_moment_is_forgotten() -> None:
    """A target that was slow once was never asked again, so that nobody learned that it was quick."""
    load = Load()
    load.measured(8.0, 100.0, is_stream=True)
    assert load.latency_s(100.0) == 8.0
    assert load.latency_s(160.0) == pytest.approx(2.0)


def test_p2c_divides_by_weights() -> None:
    """Nine to one in the configuration was one to one in fact."""

    async def job() -> None:
        heavy, light = ScriptedTarget("p/a", [[Wait(1), *says("x")]]), ScriptedTarget("p/b", [[Wait(1), *says("x")]])
        gate = gateway(
            heavy,
            light,
            strategy="p2c",
            targets=[{"target": "p/a", "weight": 9}, {"target": "p/b", "weight": 1}],
        )
        await asyncio.gather(*(gate.chat("chat", HELLO) for _ in range(100)))
        assert 85 <= len(heavy.requests) <= 95

    run(job())


def test_weighted_is_by_chance_and_priority_by_place() -> None:
    """The two were mixed up."""

    async def job() -> None:
        for strategy, low, high in (("weighted", 140, 180), ("priority", 200, 200)):
            a, b = ScriptedTarget("p/a", [says("x")]), ScriptedTarget("p/b", [says("x")])
            entries = [{"target": "p/a", "weight": 4}, {"target": "p/b", "weight": 1}]
            gate = gateway(a, b, strategy=strategy, targets=entries)
            for _ in range(200):
                await gate.chat("chat", HELLO)
            assert low <= len(a.requests) <= high
            assert len(a.requests) + len(b.requests) == 200

    run(job())


def test_lowest_cost_takes_what_is_known_to_be_cheap() -> None:
    """Unknown counted as free."""

    async def job() -> None:
        prices = {"p/dear": Decimal("0.5"), "p/cheap": Decimal("0.1")}
        targets = [ScriptedTarget(name, [says(name)]) for name in ("p/unknown", "p/dear", "p/cheap")]
        gate = gateway(
            *targets, strategy="lowest_cost", ports={"prices": lambda target, request: prices.get(target.name)}
        )
        assert (await gate.chat("chat", HELLO)).message.content == "p/cheap"

    run(job())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 4))
def test_sticky_moves_only_the_conversations_of_a_target_that_is_gone(n: int, gone: int) -> None:
    """By the remainder of a hash, every conversation moved, and every prompt cache was cold."""
    all_of = members(*(f"p/{i}" for i in range(5)))
    first = Sticky().pick(all_of, asked(n))
    left = [member for i, member in enumerate(all_of) if i != gone]
    second = Sticky().pick(left, asked(n))
    assert second is first or first is all_of[gone]


def test_sticky_follows_weights_sessions_and_first_messages() -> None:
    """A conversation's second turn went elsewhere, because its messages had changed."""
    all_of = members("p/a", "p/b", weights={"p/a": 3.0})
    found = Counter(Sticky().pick(all_of, asked(n)).target.name for n in range(400))
    assert 270 <= found["p/a"] <= 330
    assert len({Sticky().pick(all_of, asked(n, "s")).target.name for n in range(50)}) == 1
    one = parse_chat(b'{"model":"m","messages":[{"role":"user","content":"a"}]}')
    two = parse_chat(
        b'{"model":"m","messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},'
        b'{"role":"user","content":"c"}]}'
    )
    assert conversation_key(one) == conversation_key(two) != conversation_key(one, "s")


def test_a_session_of_the_context_is_what_sticks() -> None:
    """The session was read from nowhere."""

    async def job() -> None:
        targets = [ScriptedTarget(f"p/{i}", [says("x")]) for i in range(8)]
        gate = gateway(*targets, strategy="sticky")
        for n in range(10):
            await gate.chat("chat", [{"role": "user", "content": str(n)}], context=Context(session="s"))
        assert sorted(len(target.requests) for target in targets)[-1] == 10

    run(job())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=20, max_size=600), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_quantiles_are_those_of_the_last_256(samples: list[float], part: float) -> None:
    """An hour of quiet hid a minute of trouble."""
    quantiles = Quantiles()
    for sample in samples:
        quantiles.add(sample)
    last = sorted(samples[-256:])
    found = quantiles.at(part)
    assert found in last
    assert sum(sample <= found for sample in last) >= part * len(last)


def slow_first(seconds: float) -> Any:
    return [Began("slow"), Wait(seconds), *says("slow")[1:]]


def test_a_slow_beginning_is_hedged_and_the_first_content_wins() -> None:
    """The loser went on, and both were told to the client."""

    async def job() -> None:
        slow, quick = ScriptedTarget("p/a", [slow_first(HANG)]), ScriptedTarget("p/b", [says("quick")])
        gate = gateway(slow, quick, hedge={"after": 2, "max_fraction": 0.5})
        await gate.chat("chat", HELLO, timeout_s=3)  # half a hedge is saved by each
        loop, began = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        items, exc, record = await read(gate)
        assert (exc, text_of(items), slow.open) == (None, "quick", 0)
        assert loop.time() - began == pytest.approx(2.0)
        assert [(entry.cause, entry.outcome) for entry in record.attempts] == [("first", "lost"), ("hedge", "answered")]
        assert record.target == "p/b"

    run(job())


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_leaves_while_a_hedges_loser_is_closed_leaves_nothing_behind(is_stream: bool) -> None:
    """The winner, which nobody had yet, was never closed: it counted as in work for ever."""

    class Slow(ScriptedTarget):
        async def stream(self, request: Any, terms: Any, record: Any) -> Any:
            try:
                async for event in ScriptedTarget.stream(self, request, terms, record):
                    yield event
            finally:
                await asyncio.sleep(1)

    async def job() -> None:
        slow, quick = Slow("p/a", [slow_first(HANG)]), ScriptedTarget("p/b", [says("quick")])
        gate = gateway(slow, quick, hedge={"after": 2, "max_fraction": 0.5})
        for _ in range(2):  # half a hedge is saved by each
            with suppress(DeadlineExceeded):
                await gate.chat("chat", HELLO, timeout_s=0.5)
        answer: Coroutine[Any, Any, Any] = read(gate) if is_stream else gate.chat("chat", HELLO)
        asking = asyncio.create_task(answer)
        await asyncio.sleep(2.5)
        loads = [member.load for member in gate._routes.of("chat").members]
        assert sum(load.in_flight for load in loads) > 0
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert [load.in_flight for load in loads] == [0, 0]
        await asyncio.sleep(1)
        assert (slow.open, quick.open) == (0, 0)

    run(job())


def test_at_most_three_of_a_hundred_are_hedged() -> None:
    """A slow morning doubled the bill."""

    async def job() -> None:
        slow, quick = ScriptedTarget("p/a", [slow_first(3)]), ScriptedTarget("p/b", [says("quick")])
        gate = gateway(slow, quick, hedge={"after": 1, "max_fraction": 0.03})
        for _ in range(200):
            await read(gate)
        assert len(quick.requests) == 6

    run(job())


def test_the_95th_of_a_hundred_is_learned_before_anything_is_hedged() -> None:
    """With no samples every request was hedged at once."""

    async def job() -> None:
        usual = [[Began(), Wait(0.2 - n / 1000), *says("x")[1:]] for n in range(120)]  # each quicker than those before
        first = ScriptedTarget("p/a", [slow_first(60), *usual, slow_first(60)])
        other = ScriptedTarget("p/b", [says("other")])
        gate = gateway(first, other, hedge={"after": "p95", "max_fraction": 0.5}, timeouts={"first_token_s": 100})
        for _ in range(121):
            await read(gate)
        assert other.requests == []
        began = asyncio.get_running_loop().time()
        items, _, _ = await read(gate)
        assert text_of(items) == "other"
        assert asyncio.get_running_loop().time() - began == pytest.approx(0.195)

    run(job())


@pytest.mark.parametrize(
    "params",
    [{"tools": [{"type": "function", "function": {"name": "f"}}]}, {"provider_options": {"p": {"store": True}}}],
)
def test_what_must_not_happen_twice_is_never_hedged(params: dict[str, Any]) -> None:
    """A tool was called by two answers of one request."""

    async def job() -> None:
        slow, quick = ScriptedTarget("p/a", [slow_first(3)]), ScriptedTarget("p/b", [says("quick")])
        gate = gateway(slow, quick, hedge={"after": 1, "max_fraction": 0.5})
        for _ in range(4):
            await read(gate, **params)
        assert quick.requests == []

    run(job())


def test_a_hedge_whose_first_attempt_fails_still_answers_and_both_failures_count() -> None:
    """The race ended with the first to finish, even if that was a failure."""

    async def job() -> None:
        bad = ScriptedTarget("p/a", [[Wait(2), fails(KIND.SERVER)]])
        slow = ScriptedTarget("p/b", [slow_first(5)])
        third = ScriptedTarget("p/c", [says("third")])
        gate = gateway(bad, slow, third, hedge={"after": 1, "max_fraction": 0.5})
        await read(gate)
        items, exc, record = await read(gate)
        assert (exc, text_of(items)) == (None, "slow")
        assert [entry.outcome for entry in record.attempts] == ["failed", "answered"]
        slow.scripts = [[Wait(3), fails(KIND.SERVER)]]
        await read(gate)
        items, exc, record = await read(gate)
        assert (exc, text_of(items)) == (None, "third")
        assert [entry.outcome for entry in record.attempts] == ["failed", "failed", "answered"]

    run(job())


def test_a_target_that_is_down_is_left_alone_and_found_again() -> None:
    """Each request went to a dead target first, for as long as it was dead."""

    async def job() -> None:
        bad = ScriptedTarget("p/a", [*[[fails(KIND.CONNECT)]] * 3, says("back")])
        good = ScriptedTarget("p/b", [says("good")])
        gate = gateway(bad, good)
        texts = [(await gate.chat("chat", HELLO)).message.content for _ in range(20)]
        assert (set(texts), len(bad.requests)) == ({"good"}, 3)
        record = (await gate.answer(parse_chat(BODY % 1)))[1]
        assert record.skipped == {"p/a": "open after connect"}
        await asyncio.sleep(5)
        assert (await gate.chat("chat", HELLO)).message.content == "back"

    run(job())


def test_when_all_are_open_the_one_that_opens_soonest_is_waited_for() -> None:
    """A router that fails at once, where users would rather wait; and one that waits, where the deadline says no."""

    async def job() -> None:
        down = ScriptedTarget("p/a", [*[[fails(KIND.CONNECT)]] * 4, says("back")])
        gate = gateway(down, retries=0)
        for _ in range(3):
            with pytest.raises(Exception, match="as told"):
                await gate.chat("chat", HELLO)
        loop, began = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        with pytest.raises(Overloaded) as caught:
            await gate.chat("chat", HELLO, timeout_s=2)
        assert (loop.time() - began, caught.value.retry_after_s) == (0.0, pytest.approx(5.0))
        waiting = [loop.create_task(gate.chat("chat", HELLO)) for _ in range(10)]
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert sorted(str(answer) for answer in done if isinstance(answer, Exception)) == ["p/a: as told"]  # the probe
        assert sum(not isinstance(answer, Exception) for answer in done) == 9
        assert len(down.requests) == 3 + 1 + 9
        assert loop.time() - began == pytest.approx(15.0)  # 5, and 10 after the probe had failed

    run(job())


def test_an_outage_moves_everybody_for_nothing_and_a_storm_is_ended_by_the_budget() -> None:
    """Two hundred requests in work when a target dies: all must move. When all targets die: not all may try again."""

    async def job() -> None:
        dying = ScriptedTarget("p/a", [[Wait(1), fails(KIND.SERVER)]])
        good = ScriptedTarget("p/b", [[Wait(1), *says("good")]])
        gate = gateway(dying, good, retries=2)
        done = await asyncio.gather(*(gate.chat("chat", HELLO) for _ in range(200)))
        assert {reply.message.content for reply in done} == {"good"}
        both = [ScriptedTarget(f"p/{x}", [[Wait(1), fails(KIND.SERVER)]]) for x in "ab"]
        gate = gateway(*both, retries=2)
        failed = await asyncio.gather(*(gate.chat("chat", HELLO) for _ in range(200)), return_exceptions=True)
        assert all(isinstance(answer, Exception) for answer in failed)
        assert sum(len(target.requests) for target in both) <= 200 + 200 + 20

    run(job())


def test_a_target_that_cannot_do_it_costs_neither_a_retry_nor_its_good_name() -> None:
    """With three targets that lack a feature, the fourth, which has it, was never asked."""

    async def job() -> None:
        lacking = [ScriptedTarget(f"p/{i}", [says("x")], cannot="no seeds here") for i in range(5)]
        able = ScriptedTarget("p/able", [says("able")])
        gate = gateway(*lacking, able, retries=0)
        for _ in range(8):
            assert (await gate.chat("chat", HELLO)).message.content == "able"
        gate = gateway(*lacking)
        with pytest.raises(Exception, match="no seeds here") as caught:
            await gate.chat("chat", HELLO)
        assert getattr(caught.value, "param", None) == "seed"

    run(job())


def test_attempts_are_capped_and_nested_fallbacks_are_followed_once() -> None:
    """A circle of routes, each the other's fallback, was walked until the deadline."""

    async def job() -> None:
        targets = [ScriptedTarget(f"p/{x}", [[fails(KIND.SERVER)]]) for x in "abcd"]
        routes = {
            "two": {"targets": ["p/b"], "fallback": ["three", "p/d"], "retries": 9},
            "three": {"targets": ["p/c"], "fallback": ["p/d"]},
        }
        gate = gateway(*targets, targets=["p/a"], routes=routes, fallback=["two", "three"], retries=1)
        _, exc, record = await read(gate)
        assert exc is not None
        assert [entry.target for entry in record.attempts] == ["p/a", "p/a", "p/b", "p/c", "p/d"]
        assert [entry.cause for entry in record.attempts] == ["first", "retry", "fallback", "fallback", "fallback"]

    run(job())


def test_a_probe_that_is_a_long_stream_does_not_keep_the_others_out() -> None:
    """Half open until the end of a ten-minute answer."""

    async def job() -> None:
        target = ScriptedTarget(
            "p/a", [*[[fails(KIND.CONNECT)]] * 3, [Began(), Content("x"), Wait(15), *says("y")[1:]]]
        )
        gate = gateway(target, retries=0)
        for _ in range(3):
            await read(gate)
        await asyncio.sleep(5)
        loop = asyncio.get_running_loop()
        long = loop.create_task(read(gate))
        await asyncio.sleep(1)
        began = loop.time()
        async with gate.stream("chat", HELLO, stream=True) as events:
            async for item in events:
                if isinstance(item, Content):
                    break
        assert loop.time() == began
        assert (await long)[1] is None

    run(job())

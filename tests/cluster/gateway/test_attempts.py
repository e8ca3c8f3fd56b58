"""What follows each kind of failure, before and after the client has seen something: the tables as they are written."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from journeys import HELLO, gateway, read, run, text_of

from diptych.cluster.gateway.ports import Context, Standing
from diptych.cluster.gateway.public import AnswerBroken, ContentPolicyViolation, UpstreamFailed, UpstreamRefused
from diptych.cluster.gateway.record import ExchangeRecord
from diptych.cluster.gateway.retries import CONSEQUENCES
from diptych.cluster.gateway.signals import Continued, Restarted
from diptych.cluster.gateway.target import Target
from diptych.cluster.gateway.testing import HANG, Script, ScriptedTarget, Wait, fails, says
from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Reasoning
from diptych.protos.errors import (
    Cancelled,
    ContextTooLong,
    DeadlineExceeded,
    DiptychError,
    FirstTokenTimeout,
    InvalidRequest,
    Overloaded,
    RateLimited,
)
from diptych.protos.failures import FailureKind
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Began, Ended, Usage

KIND = FailureKind
BEGAN = Began("a", "m")
# kind: (tries at a single target, whether another target of the route gets it, whether `fallback` does, public error)
TABLE: dict[FailureKind, tuple[int, bool, type[Exception]]] = {
    KIND.BAD_REQUEST: (1, False, InvalidRequest),
    KIND.UNSUPPORTED: (1, True, InvalidRequest),
    KIND.CONTEXT_LENGTH: (1, False, ContextTooLong),
    KIND.CONTENT_POLICY: (1, False, ContentPolicyViolation),
    KIND.AUTH: (1, True, UpstreamRefused),
    KIND.NOT_FOUND: (1, True, UpstreamRefused),
    KIND.RATE_LIMITED: (1, True, RateLimited),
    KIND.QUOTA: (1, True, Overloaded),
    KIND.OVERLOADED: (2, True, Overloaded),
    KIND.SERVER: (3, True, UpstreamFailed),
    KIND.CONNECT: (2, True, UpstreamFailed),
    KIND.FIRST_TOKEN_TIMEOUT: (1, True, FirstTokenTimeout),
    KIND.IDLE_TIMEOUT: (1, True, DeadlineExceeded),
    KIND.TOTAL_TIMEOUT: (1, False, DeadlineExceeded),
    KIND.CANCELLED: (1, False, Cancelled),
}


def test_the_table_knows_every_kind() -> None:
    """A new kind without consequences would end requests with a KeyError."""
    assert set(TABLE) == set(CONSEQUENCES) == set(FailureKind)


@pytest.mark.parametrize("mode", ["whole", "A", "B"])
@pytest.mark.parametrize("kind", FailureKind)
def test_a_failure_before_any_content_is_retried_and_moved_as_the_table_says(kind: FailureKind, mode: str) -> None:
    """Guards the table itself, for whole answers and for streams before and behind their headers."""
    tries, moves, error = TABLE[kind]
    script: list[Any] = [BEGAN, Usage(input_tokens=3), Content("")] if mode == "B" else []

    async def ask(gate: Any) -> tuple[str, Exception | None]:
        if mode == "whole":
            try:
                return (await gate.chat("chat", HELLO)).message.content, None
            except Exception as exc:
                return "", exc
        items, exc, _ = await read(gate)
        return text_of(items), exc

    async def alone() -> None:
        target = ScriptedTarget("p/a", [[*script, fails(kind)]])
        text, exc = await ask(gateway(target))
        assert type(exc) is error
        assert (len(target.requests), target.open, text) == (tries, 0, "")

    async def with_another() -> None:
        bad, good = ScriptedTarget("p/a", [[*script, fails(kind)]]), ScriptedTarget("p/b", [says("fine")])
        text, exc = await ask(gateway(bad, good))
        assert (text, len(bad.requests), len(good.requests)) == (("fine", 1, 1) if moves else ("", 1, 0))
        assert (exc is None) == moves

    async def with_fallback() -> None:
        bad, good = ScriptedTarget("p/a", [[*script, fails(kind)]]), ScriptedTarget("p/b", [says("fine")])
        gate = gateway(bad, good, routes={"next": {"targets": ["p/b"]}}, fallback=["next"])
        text, exc = await ask(gate)
        assert (text, len(bad.requests)) == (("fine", tries) if moves else ("", 1))
        assert (exc is None) == moves

    for case in (alone, with_another, with_fallback):
        run(case())


@pytest.mark.parametrize(
    ("kind", "key"),
    [(KIND.CONTEXT_LENGTH, "context_fallback"), (KIND.CONTENT_POLICY, "content_policy_fallback")],
)
def test_these_two_kinds_have_fallbacks_of_their_own(kind: FailureKind, key: str) -> None:
    """A request that is too long went to `fallback`, whose context is no longer, and was paid for twice."""

    async def job() -> None:
        short, long, other = (ScriptedTarget(f"p/{x}", [[fails(kind)]]) for x in ("short", "long", "other"))
        long.scripts = [says("fits")]
        gate = gateway(
            short,
            long,
            other,
            routes={"long": {"targets": ["p/long"]}, "other": {"targets": ["p/other"]}},
            fallback=["other"],
            **{key: ["long"]},
        )
        items, exc, record = await read(gate)
        assert (exc, text_of(items), len(other.requests)) == (None, "fits", 0)
        assert [entry.target for entry in record.attempts] == ["p/short", "p/long"]

    run(job())


def test_nothing_is_shown_before_the_first_content_and_began_comes_once() -> None:
    """A client saw the role of an attempt that failed, and then a second one."""

    async def job() -> None:
        bad = ScriptedTarget("p/a", [[Began("bad"), Usage(input_tokens=9), fails(KIND.SERVER)]])
        good = ScriptedTarget("p/b", [[Began("good"), Reasoning("hm"), Content("x"), Usage(), Ended("stop")]])
        items, exc, record = await read(gateway(bad, good))
        assert exc is None
        assert items == [Began("good"), Reasoning("hm"), Content("x"), Usage(), Ended("stop")]
        assert [(entry.phase, entry.outcome) for entry in record.attempts] == [("B", "failed"), ("C", "answered")]
        assert record.target == "p/b"

    run(job())


def test_an_answer_without_content_is_an_answer() -> None:
    """A model that says nothing was asked again, and paid for again."""

    async def job() -> None:
        target = ScriptedTarget("p/a", [[BEGAN, Usage(output_tokens=0), Ended("stop")]])
        items, exc, _ = await read(gateway(target))
        assert (exc, items[-1], len(target.requests)) == (None, Ended("stop"), 1)

    run(job())


def test_an_answer_that_a_filter_took_away_goes_on_where_that_is_configured() -> None:
    """Azure answers 200, no text and content_filter; without a fallback that is the answer, and no error."""

    async def job() -> None:
        script = [BEGAN, Usage(), Ended("content_filter")]
        items, exc, _ = await read(gateway(ScriptedTarget("p/a", [script])))
        assert (exc, items[-1]) == (None, Ended("content_filter"))
        other = ScriptedTarget("p/b", [says("fine")])
        gate = gateway(
            ScriptedTarget("p/a", [script]),
            other,
            routes={"b": {"targets": ["p/b"]}},
            content_policy_fallback=["b"],
        )
        items, exc, _ = await read(gate)
        assert (exc, text_of(items)) == (None, "fine")

    run(job())


@pytest.mark.parametrize("kind", [KIND.SERVER, KIND.CONNECT, KIND.OVERLOADED, KIND.IDLE_TIMEOUT])
def test_a_raw_client_that_saw_a_text_gets_an_error_and_no_finish(kind: FailureKind) -> None:
    """Phase C: a finish was made up, so that half a text looked whole; or a second model's words were spliced in."""

    async def job() -> None:
        partial = [BEGAN, Usage(input_tokens=5, output_tokens=1), Content("half"), fails(kind)]
        target, other = ScriptedTarget("p/a", [partial]), ScriptedTarget("p/b", [says("other")])
        items, exc, record = await read(gateway(target, other))
        assert isinstance(exc, AnswerBroken)
        assert (exc.kind_of_failure, exc.usage.input_tokens) == (kind, 5)
        assert (text_of(items), len(other.requests)) == ("half", 0)
        assert not any(isinstance(item, Ended) for item in items)
        assert (record.attempts[0].phase, record.outcome) == ("C", "answer_broken")

    run(job())


def test_a_stream_that_just_ends_is_a_failure() -> None:
    """A connection that was cut cleanly looked like the answer's end."""

    async def job() -> None:
        items, exc, _ = await read(gateway(ScriptedTarget("p/a", [[BEGAN, Content("half")]])))
        assert isinstance(exc, AnswerBroken)
        empty, good = ScriptedTarget("p/a", [[]]), ScriptedTarget("p/b", [says("fine")])
        items, exc, _ = await read(gateway(empty, good))
        assert (exc, text_of(items)) == (None, "fine")

    run(job())


def test_who_asked_for_restarts_gets_the_answer_anew() -> None:
    """Phases D and E: an agent discards the half answer, calls included, and has a whole one."""

    async def job() -> None:
        call = [CallBegin(0, "f"), CallArguments(0, '{"a":'), fails(KIND.SERVER)]
        bad = ScriptedTarget("p/a", [[BEGAN, Content("half"), *call]])
        good = ScriptedTarget("p/b", [says("whole")])
        items, exc, record = await read(gateway(bad, good), restarts=True)
        assert exc is None
        at = items.index(Restarted("p/b", KIND.SERVER))
        assert text_of(items[at:]) == "whole"
        assert isinstance(items[at + 1], Began)
        assert [entry.cause for entry in record.attempts] == ["first", "restart"]

    run(job())


def test_an_own_pool_goes_on_where_a_provider_broke_off() -> None:
    """Phase C'': midstream continue; the text so far is asked to be continued, no word is lost or doubled."""

    async def job() -> None:
        bad = ScriptedTarget("p/a", [[BEGAN, Content("one two"), Content(" three "), fails(KIND.SERVER)]])
        own = ScriptedTarget("pool/x", [says(" four", " five")], is_own=True, continues="exact")
        items, exc, record = await read(gateway(bad, own, midstream="continue"), max_tokens=50)
        assert exc is None
        assert text_of(items) == "one two three four five"
        assert Continued("pool/x", KIND.SERVER) in items
        assert sum(isinstance(item, Began) for item in items) == 1
        asked = own.requests[0]
        assert (asked.messages[-1].role, asked.messages[-1].content) == ("assistant", "one two three")
        assert (asked.template.continue_final, asked.max_tokens) == (True, 46)
        assert [entry.cause for entry in record.attempts] == ["first", "continue"]

    run(job())


@pytest.mark.parametrize(
    ("params", "script", "continues"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, [Content("half")], "prefill"),
        ({"response_format": {"type": "json_object"}}, [Content("half")], "prefill"),
        ({"logprobs": True}, [Content("half")], "prefill"),
        ({}, [Reasoning("hm"), Content("half")], "prefill"),
        ({}, [Content("  ")], "prefill"),
        ({}, [Content("half")], "no"),
    ],
)
def test_what_no_text_can_go_on_from_ends_with_an_error(params: Any, script: Any, continues: Any) -> None:
    """Tools, forms, reasoning: a continuation would be another answer, and nobody would be told."""

    async def job() -> None:
        bad = ScriptedTarget("p/a", [[BEGAN, *script, fails(KIND.SERVER)]])
        other = ScriptedTarget("p/b", [says("other")], continues=continues)
        _, exc, _ = await read(gateway(bad, other, midstream="continue"), **params)
        assert isinstance(exc, AnswerBroken)
        assert other.requests == []

    run(job())


def test_auto_goes_on_only_with_the_same_weights() -> None:
    """R20: two models are never spliced unless the route says so."""

    async def job() -> None:
        for weights, text in (("w", "half and half"), ("v", "half")):
            bad = ScriptedTarget("pool/a", [[BEGAN, Content("half"), fails(KIND.SERVER)]], weights="w")
            other = ScriptedTarget("pool/b", [says(" and half")], continues="exact", weights=weights)
            items, exc, _ = await read(gateway(bad, other))
            assert (text_of(items), exc is None) == (text, weights == "w")

    run(job())


def test_a_hang_is_left_for_the_next_target_within_the_deadline() -> None:
    """The whole deadline was spent on a target that said nothing."""

    async def job() -> None:
        loop = asyncio.get_running_loop()
        for params, most_s in (({}, 8.0), ({"timeout_s": 4}, 2.0), ({"first_token_timeout_s": 6}, 3.0)):
            hung = ScriptedTarget("p/a", [[Wait(HANG)]])
            began = loop.time()
            items, exc, record = await read(gateway(hung, ScriptedTarget("p/b", [says("fine")])), **params)
            assert (exc, text_of(items), hung.open) == (None, "fine", 0)
            assert loop.time() - began == pytest.approx(most_s)
            assert record.failures == (KIND.FIRST_TOKEN_TIMEOUT,)

    run(job())


def test_the_deadline_holds_over_all_attempts_and_in_the_middle_of_an_answer() -> None:
    """R19: over by nothing at all on a clock that stands still while others work."""

    async def job() -> None:
        loop = asyncio.get_running_loop()
        for script in (
            [Wait(HANG)],
            [BEGAN, Content("x"), *[Wait(1), Content("y")] * 99],
            [Wait(4), fails(KIND.SERVER)],
        ):
            began = loop.time()
            _, exc, _ = await read(gateway(ScriptedTarget("p/a", [script])), timeout_s=10)
            assert isinstance(exc, DeadlineExceeded)
            assert loop.time() - began <= 10.0 + 1e-6

    run(job())


HUNG: Script = [Wait(HANG)]


class SlowLedger:
    """Budgets that take three seconds to be asked; nothing is set aside."""

    num_settled = 0

    async def reserve(self, request: ChatRequest, targets: Sequence[Target], context: Context) -> SlowLedger:
        await asyncio.sleep(3)
        return self

    def standing(self, request: ChatRequest, targets: Sequence[Target], context: Context) -> tuple[Standing, ...]:
        return ()

    allowances = ()

    async def again(self, record: ExchangeRecord) -> None:
        pass

    async def settle(self, record: ExchangeRecord) -> None:
        self.num_settled += 1


@pytest.mark.parametrize("streams", [False, True])
def test_time_counts_from_the_requests_arrival(streams: bool) -> None:
    """What was awaited before the first attempt came on top of the deadline: budgets, a slow body, the prompt's store.
    Nobody is asked for an answer that would come too late, and what was set aside for it is free again.
    """

    async def ask(context: Context, script: Script = HUNG, **params: Any) -> tuple[Any, float, int]:
        """What became of it, how long the attempts took all in all, how many there were."""
        loop, ledger = asyncio.get_running_loop(), SlowLedger()
        targets = [ScriptedTarget(name, [script]) for name in ("p/a", "p/b")]
        gate = gateway(*targets, ports={"ledger": ledger}, timeouts={"total_s": 40})
        began, error = loop.time(), None
        try:
            if streams:
                _, error, _ = await read(gate, context=context, **params)
            else:
                await gate.chat("chat", HELLO, context=context, **params)
        except DiptychError as exc:
            error = exc
        assert ledger.num_settled == (loop.time() - began >= 3)
        return error, loop.time() - began, sum(len(target.requests) for target in targets)

    async def job() -> None:
        limit: dict[str, Any] = {"first_token_timeout_s": 10} if streams else {"timeout_s": 10}
        for waited_s in (0, 4):
            error, took_s, _ = await ask(Context(waited_s=waited_s), **limit)
            assert isinstance(error, DeadlineExceeded)
            assert took_s == pytest.approx(10 - waited_s)
        error, took_s, tries = await ask(Context(waited_s=8), **limit)
        assert (error.http_status, tries) == (504, 0)
        error, took_s, tries = await ask(Context(waited_s=38))
        assert (error.code, took_s, tries) == ("deadline_exceeded", pytest.approx(2), 0)
        error, *_ = await ask(Context(waited_s=30), [Wait(2), *says("x")])
        assert error is None

    run(job())


def test_a_stream_that_stops_in_the_middle_is_ended_after_idle_s() -> None:
    """40404 of another router: a stall after the first token hung until the client gave up."""

    async def job() -> None:
        target = ScriptedTarget("p/a", [[BEGAN, Content("x"), Wait(19), Content("y"), Wait(HANG)]])
        _, exc, _ = await read(gateway(target))
        assert isinstance(exc, AnswerBroken)
        assert exc.kind_of_failure is KIND.IDLE_TIMEOUT
        assert asyncio.get_running_loop().time() == pytest.approx(39.0)

    run(job())


def test_a_rate_limit_is_waited_for_when_nobody_else_can() -> None:
    """Retry-After within the deadline: the same target again, then; beyond it: the client is told when."""

    async def job() -> None:
        loop = asyncio.get_running_loop()
        target = ScriptedTarget("p/a", [[fails(KIND.RATE_LIMITED, retry_after_s=5)], says("fine")])
        items, exc, _ = await read(gateway(target))
        assert (exc, text_of(items), loop.time()) == (None, "fine", pytest.approx(5.0, abs=0.01))
        target = ScriptedTarget("p/a", [[fails(KIND.RATE_LIMITED, retry_after_s=500)], says("fine")])
        _, exc, _ = await read(gateway(target))
        assert isinstance(exc, RateLimited)
        assert (exc.retry_after_s, len(target.requests)) == (500, 1)

    run(job())


def test_a_reader_who_leaves_ends_the_attempt() -> None:
    """R10: connections to providers stayed open, and their tokens were paid for."""

    async def job() -> None:
        target = ScriptedTarget("p/a", [[BEGAN, Content("x"), Wait(HANG)]])
        gate = gateway(target)
        async with gate.stream("chat", HELLO, stream=True) as events:
            async for item in events:
                if isinstance(item, Content):
                    break
        assert (target.open, events.record.outcome, events.record.attempts[0].outcome) == (0, "cancelled", "left")
        waiting = asyncio.get_running_loop().create_task(gate.chat("chat", HELLO))
        await asyncio.sleep(1)
        assert target.open == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert target.open == 0

    run(job())


def test_calls_with_broken_arguments_are_not_told_to_be_complete() -> None:
    """Phase E: half a call that ends with tool_calls would be run. Whole answers are asked for again."""

    async def job() -> None:
        call = [BEGAN, CallBegin(0, "f"), CallArguments(0, '{"a":'), CallEnd(0), Usage()]
        bad, good = ScriptedTarget("p/a", [[*call, Ended("tool_calls")]]), ScriptedTarget("p/b", [says("fine")])
        assert (await gateway(bad, good).chat("chat", HELLO)).message.content == "fine"
        items, exc, _ = await read(gateway(bad, good))
        assert isinstance(exc, AnswerBroken)
        assert not any(isinstance(item, Ended) for item in items)
        cut = ScriptedTarget("p/a", [[*call, Ended("length")]])  # the client asked for so few tokens
        items, exc, _ = await read(gateway(cut))
        assert (exc, items[-1]) == (None, Ended("length"))

    run(job())


def test_what_comes_behind_the_end_is_not_told() -> None:
    """A provider that sends its last chunks twice made two answers of one."""

    async def job() -> None:
        target = ScriptedTarget("p/a", [[*says("fine"), Content("fine"), Ended("stop")]])
        items, exc, _ = await read(gateway(target))
        assert (exc, text_of(items), sum(isinstance(item, Ended) for item in items)) == (None, "fine", 1)

    run(job())


def test_a_defect_of_one_target_leaves_the_others_their_chance(caplog: pytest.LogCaptureFixture) -> None:
    """A KeyError in one codec ended requests that another provider could answer."""

    async def job() -> None:
        bad, good = ScriptedTarget("p/a", [[KeyError("x")]]), ScriptedTarget("p/b", [says("fine")])
        items, exc, _ = await read(gateway(bad, good))
        assert (exc, text_of(items)) == (None, "fine")

    run(job())
    assert "p/a failed by a defect" in caplog.text


def test_who_has_seen_a_text_waits_no_longer_than_for_any_piece() -> None:
    """Half an answer stood still for minutes, until a closed target might open."""

    async def job() -> None:
        bad = ScriptedTarget("p/a", [[BEGAN, Content("half"), fails(KIND.IDLE_TIMEOUT)]])
        other = ScriptedTarget("p/b", [[fails(KIND.RATE_LIMITED, retry_after_s=100)], says("x")], continues="prefill")
        gate = gateway(bad, other, midstream="continue", routes={"b": {"targets": ["p/b"]}}, targets=["p/a", "p/b"])
        await read(gate, "b", timeout_s=1)
        began = asyncio.get_running_loop().time()
        _, exc, _ = await read(gate)
        assert isinstance(exc, AnswerBroken)
        assert asyncio.get_running_loop().time() == began

    run(job())

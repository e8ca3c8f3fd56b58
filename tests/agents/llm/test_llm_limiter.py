"""Limiters, and a thousand calls at once over a real server.

Guards against: more requests on their way than allowed, places that are never given back (failures, cancellation, loops
that ended), a waiter that is forgotten, memory that grows with the number of calls, connections that cancelled calls
leave open.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import tracemalloc
from typing import Any

import pytest
from provider_wire import REPLY, Wire, answers, sends, wire
from pydantic import BaseModel, field_validator

from diptych.agents import llm
from diptych.agents.llm.limiter import Place
from diptych.agents.llm.testing import Said, ScriptedModel, failure, registry_of
from diptych.agents.llm.upstream import Limits

NUM_CALLS = 1_000
NUM_TRACED = 100


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


async def test_no_more_than_allowed_at_once_in_the_order_of_coming() -> None:
    limiter, order, most = llm.Limiter(3), list[int](), 0

    async def one(number: int) -> None:
        nonlocal most
        await limiter.take()
        order.append(number)
        most = max(most, limiter.held)
        await asyncio.sleep(0)
        limiter.give()

    await asyncio.gather(*map(one, range(20)))
    assert (order, most) == (list(range(20)), 3)
    assert (limiter.held, limiter.waiting) == (0, 0)


@pytest.mark.parametrize("rate", [0.5, 4.0])
async def test_requests_begin_at_their_rate(rate: float) -> None:
    clock = Clock()
    limiter = llm.Limiter(requests_per_s=rate, clock=clock, sleep=clock.sleep)
    began = []
    for _ in range(12):
        await limiter.take()
        began.append(clock.now)
        limiter.give()
    at_once = max(rate, 1)
    assert sum(1 for at in began if at == 0) == at_once
    assert began[-1] == pytest.approx((12 - at_once) / rate)


async def test_tokens_are_paid_back_by_waiting() -> None:
    clock = Clock()
    limiter = llm.Limiter(tokens_per_s=100, clock=clock, sleep=clock.sleep)
    await limiter.take()
    limiter.give(tokens=600)
    await limiter.take()
    assert clock.now == pytest.approx(5.01)


async def test_who_gives_up_leaves_no_place_taken() -> None:
    limiter = llm.Limiter(1)
    await limiter.take()
    waiting = [asyncio.create_task(limiter.take()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    limiter.give()  # to the second: the first is cancelled, and does not know it yet
    waiting[1].cancel()
    await asyncio.wait(waiting)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    assert (limiter.held, limiter.waiting) == (1, 0)


async def test_a_place_of_several_is_all_or_nothing() -> None:
    free, full = llm.Limiter(1), llm.Limiter(1)
    await full.take()
    with pytest.raises(TimeoutError):
        await Place((free, full), most_s=0.001).perform()
    assert free.held == 0


def test_threads_and_loops_share_one() -> None:
    """A waiter was woken on a loop that was not its own."""
    limiter, most, lock = llm.Limiter(2), 0, threading.Lock()
    model = ScriptedModel([], then="x")

    @llm.call("a/m", registry=registry_of(a=model), limiter=limiter)
    def ask() -> str:
        return "go"

    def note(body: dict[str, Any]) -> str:
        nonlocal most
        with lock:
            most = max(most, limiter.held)
        return "x"

    model.then = note

    async def many() -> None:
        await asyncio.gather(*(ask.aio() for _ in range(20)))

    threads = [threading.Thread(target=lambda: [ask() for _ in range(10)]) for _ in range(3)]
    threads += [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(model.requests) == 90
    assert 1 <= most <= 2
    assert (limiter.held, limiter.waiting) == (0, 0)


async def test_a_waiter_whose_loop_has_ended_is_passed_over() -> None:
    limiter = llm.Limiter(1)
    await limiter.take()
    gone = asyncio.new_event_loop()
    task = gone.create_task(limiter.take())
    await asyncio.to_thread(lambda: gone.run_until_complete(asyncio.sleep(0)))
    assert limiter.waiting == 1
    task.cancel()
    await asyncio.to_thread(lambda: gone.run_until_complete(asyncio.gather(task, return_exceptions=True)))
    gone.close()
    limiter.give()
    await limiter.take()
    assert limiter.held == 1


def test_failures_give_their_place_back() -> None:
    limiter = llm.Limiter(1)
    registry = registry_of(a=ScriptedModel([failure("server"), "x", failure("auth"), "y"]))
    registry.limiter = limiter

    @llm.call("a/m", registry=registry, limiter=limiter, retries=llm.Retries(base_s=0))
    def ask() -> str:
        return "go"

    assert ask().value == "x"  # one limiter on both sides is one place
    with pytest.raises(llm.ProviderError):
        ask()
    for _ in ask.stream():
        assert limiter.held == 1
        break
    assert limiter.held == 0


def test_a_validator_may_call_what_its_own_call_is_limited_by() -> None:
    """The place is free again when the answer is there."""
    limiter = llm.Limiter(1)
    registry = registry_of(a=ScriptedModel([{"text": "x"}, "fine"]))

    @llm.call("a/m", registry=registry, limiter=limiter)
    def judge() -> str:
        return "well?"

    class Judged(BaseModel):
        text: str

        @field_validator("text")
        @classmethod
        def sound(cls, text: str) -> str:
            return judge().value

    @llm.call("a/m", output=Judged, registry=registry, limiter=limiter)
    def ask() -> str:
        return "go"

    assert ask().value.text == "fine"


async def test_time_that_runs_out_in_the_line_is_the_budgets_end() -> None:
    limiter = llm.Limiter(1)
    await limiter.take()
    model = ScriptedModel(["x"])

    @llm.call("a/m", registry=registry_of(a=model), limiter=limiter, budget=llm.Budget(seconds=0.01))
    def ask() -> str:
        return "go"

    with pytest.raises(llm.BudgetExceeded) as caught:
        await ask.aio()
    assert caught.value.limit == "seconds"
    assert (model.requests, caught.value.attempts) == ([], ())
    assert (limiter.held, limiter.waiting) == (1, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"at_once": 0},
        {"requests_per_s": -1.0},
        {"tokens_per_s": float("nan")},
        {"at_once": "5"},
        {"at_once": 1.5},
        {"at_once": True},
        {"requests_per_s": float("inf")},
    ],
)
def test_a_limit_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(llm.UsageError, match=next(iter(wrong))):
        llm.Limiter(**wrong)


def test_an_interrupt_behind_a_place_gives_it_back() -> None:
    """A Ctrl-C that comes when the place is given, and the call's thread has not heard of it."""
    limiter = llm.Limiter(1)

    @llm.call("a/m", registry=registry_of(a=ScriptedModel([])), limiter=limiter)
    def ask() -> str:
        return "go"

    machine = ask.machine()
    asyncio.run(next(machine).perform())
    assert limiter.held == 1
    machine.close()
    assert limiter.held == 0


# Over a real server.


def asking(told: Wire, **more: Any) -> Any:
    lab = {"base_url": f"http://127.0.0.1:{told.port}/v1", "api_key": "env:LAB_KEY", "max_connections": 1_000}
    registry = llm.Registry(providers={"lab": lab}, environ={"LAB_KEY": "sk-0123456789"}, **more)

    @llm.call("lab/m", registry=registry, retries=llm.Retries(attempts=1))
    def ask(number: int) -> str:
        return f"number {number}"

    return ask


async def test_a_thousand_calls() -> None:
    """No error, no more connections than places, and no memory of it afterwards."""
    limiter = llm.Limiter(64)
    async with wire(answers(REPLY)) as told:
        ask = asking(told, limiter=limiter)

        async def ask_for(num_calls: int) -> None:
            replies = await asyncio.gather(*(ask.aio(number) for number in range(num_calls)))
            assert {reply.value for reply in replies} == {"hello"}

        async def kept_bytes() -> int:
            await ask_for(NUM_TRACED)
            await asyncio.sleep(0)  # the loop lets go of what it has just told us
            told.seen.clear()
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        async def many() -> tuple[int, int]:
            await ask_for(NUM_CALLS)
            tracemalloc.start()
            try:
                before = await kept_bytes()
                after = await kept_bytes()
                return after - before, tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

        more_bytes, peak_bytes = await asyncio.to_thread(lambda: asyncio.run(many()))  # a loop's end closes its client
        assert told.num_accepted <= 64
        assert more_bytes < 200 * NUM_TRACED  # a reply that was kept would be some thousands
        assert peak_bytes < 40_000 * NUM_TRACED  # tasks, requests and replies of all that are held at once
        assert limiter.held == 0


async def test_cancelled_calls_close_their_connections() -> None:
    async with wire(sends(then="hang")) as told:
        ask = asking(told, limiter=llm.Limiter(200))
        tasks = [asyncio.create_task(ask.aio(number)) for number in range(500)]
        async with asyncio.timeout(30):
            while len(told.seen) < 200:
                told.changed.clear()
                await told.changed.wait()
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in done)
        await told.all_closed()
        assert told.num_open == 0
        assert len(told.seen) == 200  # those in the line never came


def test_an_entry_that_is_slow_is_ended_by_its_timeout() -> None:
    """An upstream that does not look at its limits hung for ever."""

    class Deaf(ScriptedModel):
        async def whole(self, outgoing: Any, limits: Any, wire: Any) -> Any:
            return await super().whole(outgoing, Limits(), wire)

    ask = llm.call("a/m", registry=registry_of(a=Deaf([Said(text="x", delay_s=60)])), timeout=0.01)(lambda: "go")
    with pytest.raises(llm.ProviderError) as caught:
        ask.with_(retries=llm.Retries(attempts=1))()
    assert caught.value.failure.kind == "timeout_total"

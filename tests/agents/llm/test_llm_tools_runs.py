"""Calls of tools that are run. Guards against: outcomes in another order than the calls, a tool that holds up or breaks
the others, a hanging tool that holds up the program, an exception that reaches the model with its traceback, a call
that runs without its approval or twice, and a conversation that goes on with a call nobody answered.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Iterator, Sequence
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, BeforeValidator

from diptych.agents import llm
from diptych.agents.llm.hooks import ToolRan
from diptych.agents.llm.testing.scripted import Said, ScriptedModel, tool_call

Call = tuple[str, dict[str, Any]]


def asked(tools: Sequence[Any], *calls: Call, then: Sequence[Any] = ("done",), deps: Any = None, **rest: Any) -> Any:
    """The reply of a model that makes `calls`, and the model."""
    model = ScriptedModel([Said(calls=calls), *then], **rest)
    registry = llm.Registry()
    registry.add("test", model)

    @llm.call("test/m", registry=registry, tools=tools, deps=deps, session="s-1")
    def ask() -> str:
        return "go"

    return ask(), model


def told(model: ScriptedModel) -> list[Any]:
    return [one["content"] for one in model.requests[-1]["messages"] if one["role"] == "tool"]


def test_the_loop_is_three_lines() -> None:
    @llm.tool
    def add(a: int, b: int) -> int:
        return a + b

    reply, model = asked([add], ("add", {"a": 1, "b": 2}), then=(tool_call("add", a=3, b=4), "It is 7."))
    while reply.tool_calls:
        reply = reply.resume(reply.run_tools())
    assert reply.value == "It is 7."
    roles = [one["role"] for one in model.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant", "tool"]
    assert told(model) == ["3", "7"]
    assert model.requests[-1]["messages"][:3] == model.requests[-2]["messages"]


async def test_async_and_sync_tools_in_one_answer_run_at_once_and_keep_their_order() -> None:
    met = threading.Barrier(2, timeout=10)
    both = asyncio.Event()
    waiting = 0

    @llm.tool
    async def here(n: int) -> str:
        nonlocal waiting
        waiting += 1
        if waiting == 2:
            both.set()
        await both.wait()
        return f"here {n}"

    @llm.tool
    def there(n: int) -> str:
        met.wait()
        return f"there {n}"

    names = ("there", "here", "there", "here")
    reply, _ = asked([here, there], *[(name, {"n": n}) for n, name in enumerate(names)])
    outcomes = await reply.run_tools.aio()
    assert [one.value for one in outcomes] == ["there 0", "here 1", "there 2", "here 3"]


def test_tools_that_are_not_parallel_follow_one_another_in_the_order_of_the_calls() -> None:
    log: list[str] = []

    @llm.tool(parallel=False)
    async def first(n: int) -> None:
        log.append(f"+{n}")
        await asyncio.sleep(0)
        log.append(f"-{n}")

    @llm.tool(parallel=False)
    def second(n: int) -> None:
        log.extend((f"+{n}", f"-{n}"))

    reply, _ = asked([first, second], *[("first" if n % 2 else "second", {"n": n}) for n in range(6)])
    reply.run_tools()
    assert log == [f"{sign}{n}" for n in range(6) for sign in "+-"]


async def test_no_more_than_at_once_run_beside_each_other() -> None:
    now = most = 0

    @llm.tool
    async def count() -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1

    reply, _ = asked([count], *[("count", {})] * 20)
    assert len(await reply.run_tools.aio(at_once=3)) == 20
    assert most == 3


VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


@pytest.mark.parametrize("is_async", [False, True])
def test_context_variables_of_the_caller_hold_in_tools(is_async: bool) -> None:
    def plain() -> str:
        return VARIABLE.get()

    async def waiting() -> str:
        return VARIABLE.get()

    reply, _ = asked([waiting if is_async else plain], ("waiting" if is_async else "plain", {}))
    VARIABLE.set("outer")
    assert reply.run_tools()[0].value == "outer"


def test_the_context_tells_of_the_call() -> None:
    seen: list[llm.Context[str]] = []

    @llm.tool
    def look(ctx: llm.Context[str], n: int) -> str:
        seen.append(ctx)
        return ctx.deps

    reply, _ = asked([look], ("look", {"n": 1}), deps="own")
    assert [one.value for one in (*reply.run_tools(), *reply.run_tools(deps="other"))] == ["own", "other"]
    assert seen[0].reply is reply
    assert seen[0].call == reply.tool_calls[0]
    assert seen[0].session == "s-1"


def test_a_call_functions_context_is_given_wherever_it_stands() -> None:
    model = ScriptedModel(["1", "2", "3", "4"])
    registry = llm.Registry()
    registry.add("test", model)

    @llm.call("test/m", registry=registry, deps="d")
    def ask(ctx: llm.Context[str], q: str, *, more: str = "") -> str:
        return f"{ctx.deps}{q}{more}"

    @llm.call("test/m", registry=registry, deps="d")
    def keyword(q: str, *, own: llm.Context[str] = llm.INJECTED) -> str:
        return f"{q}{own.deps}"

    loose: Any = ask
    loose("x", more="y")
    loose(q="x")
    ask(llm.Context(deps="mine"), "x")
    keyword.with_(deps="e")("x")
    assert [one["messages"][-1]["content"] for one in model.requests] == ["dxy", "dx", "minex", "xe"]

    class Slotted:
        __slots__ = ()
        __hash__ = None  # type: ignore[assignment]
        __name__ = "slotted"

        def __call__(self, q: str, ctx: llm.Context[str]) -> str:
            return f"{ctx.deps}{q}"

    odd: Any = llm.call("test/m", registry=registry, deps="d")(Slotted())
    assert odd.request("x")["messages"][-1]["content"] == "dx"

    with pytest.raises(llm.DefinitionError, match=r"ask2: Context in the wrong place"):

        @llm.call("test/m")
        def ask2(ctx: list[llm.Context[str]]) -> str:
            return ""


def test_a_tool_that_hangs_is_left_behind_and_the_others_are_answered(caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()
    cancelled = threading.Event()

    @llm.tool(timeout=0.05)
    def thread() -> None:
        stop.wait(20)

    @llm.tool
    async def task() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    @llm.tool(timeout=math.inf)
    def quick() -> str:
        return "ok"

    reply, model = asked([thread, task, quick], ("thread", {}), ("task", {}), ("quick", {}))
    try:
        with caplog.at_level(logging.WARNING):
            outcomes = reply.run_tools(timeout=0.06)
    finally:
        stop.set()
    assert [one.outcome for one in outcomes] == [
        llm.Failed("thread took longer than 0.05 s"),
        llm.Failed("task took longer than 0.06 s"),
        llm.Ok("ok"),
    ]
    assert cancelled.is_set()
    assert [one.getMessage() for one in caplog.records] == [
        "the tool thread runs on after its time, or its caller; its thread is left behind"
    ]
    reply.resume(outcomes)
    assert told(model)[0] == "Error: thread took longer than 0.05 s"


def test_a_program_ends_while_a_tool_hangs() -> None:
    program = """
import threading
from diptych.agents import llm
from diptych.agents.llm.testing.scripted import ScriptedModel, tool_call
registry = llm.Registry()
registry.add("test", ScriptedModel([tool_call("hang")]))
@llm.tool(timeout=0.05)
def hang() -> None:
    threading.Event().wait()
@llm.call("test/m", registry=registry, tools=[hang])
def ask() -> str:
    return "go"
print(ask().run_tools()[0].outcome)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, env=dict(os.environ)
    )
    assert done.stdout == "hang took longer than 0.05 s\n"


async def test_cancelling_the_caller_cancels_its_tools() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    @llm.tool
    async def wait() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    reply, _ = asked([wait], ("wait", {}))
    task = asyncio.create_task(reply.run_tools.aio())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_run_that_is_dropped_between_two_steps_ends_its_tools() -> None:
    ended = asyncio.Event()

    @llm.tool
    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    reply, _ = asked([wait], ("wait", {}))
    machine = reply.run_tools.machine()
    machine.send(await next(machine).perform())
    await asyncio.sleep(0)  # the tool begins
    machine.close()
    await asyncio.wait_for(ended.wait(), 5)


def test_runs_are_traced_with_what_they_call_below_them() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from diptych.agents.llm.tracing import Tracing

    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    model = ScriptedModel([Said(calls=(("plain", {}), ("waiting", {}), ("bad", {}))), "inner"])
    registry = llm.Registry(tracing=Tracing(tracer_provider=provider))
    registry.add("test", model)

    @llm.call("test/m", registry=registry)
    def inner() -> str:
        return "inner?"

    def plain() -> str:
        return inner().value

    async def waiting() -> llm.Retry:
        return llm.Retry("again")

    def bad() -> None:
        raise KeyError

    @llm.call("test/m", registry=registry, tools=[plain, waiting, bad])
    def ask() -> str:
        return "go"

    ask().run_tools()
    spans = {span.name: span for span in kept.get_finished_spans()}
    errors = {name: (span.attributes or {}).get("error.type") for name, span in spans.items() if "tool" in name}
    assert errors == {"execute_tool plain": None, "execute_tool waiting": "retry", "execute_tool bad": "KeyError"}
    parent = spans["call inner"].parent
    assert parent is not None
    assert parent.span_id == spans["execute_tool plain"].context.span_id


def test_what_a_tool_raises_is_told_without_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    def raises(kind: str) -> None:
        errors = {"key": KeyError("k"), "stop": StopIteration(), "exit": SystemExit(3), "long": ValueError("x" * 9000)}
        raise errors[kind]

    async def inner(kind: str) -> None:
        raise asyncio.CancelledError("mine") if kind == "cancel" else TimeoutError("mine")

    calls = [("raises", {"kind": kind}) for kind in ("key", "stop", "exit", "long")]
    reply, model = asked([raises, inner], *calls, ("inner", {"kind": "cancel"}), ("inner", {"kind": "time"}))
    outcomes = reply.run_tools()
    words = [one.outcome.message for one in outcomes]
    assert words[:3] == ["KeyError: 'k'", "StopIteration", "SystemExit: 3"]
    assert words[3].startswith("ValueError: xxx")
    assert len(words[3]) < 1200
    assert words[4:] == ["RuntimeError: cancelled within the tool: mine", "TimeoutError: mine"]
    assert all(one.is_error for one in outcomes)
    reply.resume(outcomes)
    assert all(text.startswith("Error: ") and "Traceback" not in text for text in told(model))
    assert "Traceback" in caplog.text  # the developer sees it


def test_errors_are_raised_where_that_is_asked_for_and_the_others_still_end() -> None:
    ran: list[int] = []

    def one() -> None:
        raise KeyError("k")

    def two() -> None:
        ran.append(1)

    def says() -> None:
        raise llm.Failed("on purpose")

    reply, _ = asked([one, two, says], ("one", {}), ("two", {}), ("says", {}))
    with pytest.raises(llm.ToolFailed, match=r"the tool one raised KeyError: 'k'") as caught:
        reply.run_tools(on_error="raise")
    assert caught.value.tool == "one"
    assert isinstance(caught.value.__cause__, KeyError)
    assert ran == [1]


def test_arguments_that_do_not_fit_are_told_field_by_field() -> None:
    class Item(BaseModel):
        count: int

    def take(items: list[Item], day: str = "") -> None: ...

    bad: list[Call] = [
        ("take", {"items": [{"count": 1}, {"count": "many"}], "dya": "x"}), ("take", {}), ("taek", {}),
    ]  # fmt: skip
    reply, _ = asked([take], *bad)
    fields, missing, unknown = (one.outcome.message for one in reply.run_tools())
    assert "/items/1/count: Input should be a valid integer" in fields
    assert 'found "many"' in fields
    assert "/dya: Extra inputs are not permitted" in fields
    assert "/items: Field required" in missing
    assert unknown == "There is no tool 'taek'; the tools are: take."


@pytest.mark.parametrize("text", ["[1]", '"x"', '{"n": 1', "{{{", "[" * 100_000, '{"n": 1} {"n": 2}', "\udcff"])
def test_broken_arguments_are_a_retry(text: str) -> None:
    from dataclasses import replace

    def take(n: int) -> None: ...

    reply, _ = asked([take], ("take", {}))
    call = replace(reply.tool_calls[0], text=text, arguments={})
    message = replace(reply.answer.message, parts=(call,))
    broken = replace(reply, answer=replace(reply.answer, message=message))
    (outcome,) = broken.run_tools()
    assert isinstance(outcome.outcome, llm.Retry)
    assert outcome.outcome.message.startswith("The arguments are not what this tool takes:\n- ")
    assert len(outcome.outcome.message) < 1000


def test_a_validator_that_raises_is_the_models_to_hear() -> None:
    def check(value: Any) -> Any:
        raise ZeroDivisionError("oh")

    def take(n: Annotated[int, BeforeValidator(check)]) -> None: ...

    reply, _ = asked([take], ("take", {"n": 1}))
    assert reply.run_tools()[0].outcome == llm.Retry("The arguments could not be read: ZeroDivisionError: oh")


def test_failures_in_a_row_are_bounded() -> None:
    @llm.tool(retries=1)
    def find(x: int) -> None:
        raise llm.Retry("not there")

    reply, model = asked([find], ("find", {"x": 1}), then=(tool_call("find", x=2), "I give up."))
    reply = reply.resume(reply.run_tools())
    reply = reply.resume(reply.run_tools())
    assert told(model) == [
        "not there\nCall again, with this put right.",
        "Error: not there\nThis failed 2 times in a row: do not call find again.",
    ]


def test_each_is_told_as_it_ends_in_the_callers_thread() -> None:
    gate = threading.Event()
    heard: list[tuple[str, bool]] = []
    ran: list[str] = []

    def slow() -> None:
        gate.wait(10)

    def quick() -> None: ...

    def hear(outcome: llm.ToolOutcome) -> None:
        heard.append((outcome.call.name, threading.current_thread() is threading.main_thread()))
        if outcome.call.name == "quick":
            gate.set()

    reply, _ = asked([slow, quick], ("slow", {}), ("quick", {}), ("none", {}))
    reply.draft.registry.hooks.on(ToolRan, lambda event: ran.append(event.call.name))
    outcomes = reply.run_tools(on_outcome=hear)
    assert heard == [("none", True), ("quick", True), ("slow", True)]
    assert ran == ["none", "quick", "slow"]
    assert [one.call.name for one in outcomes] == ["slow", "quick", "none"]


async def test_a_listener_that_raises_ends_the_run_and_its_tools() -> None:
    ended = asyncio.Event()

    @llm.tool
    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    @llm.tool
    async def quick() -> None: ...

    async def hear(outcome: llm.ToolOutcome) -> None:
        raise ZeroDivisionError

    reply, _ = asked([wait, quick], ("wait", {}), ("quick", {}))
    with pytest.raises(ZeroDivisionError):
        await reply.run_tools.aio(on_outcome=hear)
    await asyncio.wait_for(ended.wait(), 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"timeout": 0}, "timeout is a number above 0"),
        ({"at_once": True}, "at_once is a number above 0"),
        ({"at_once": 0.5}, "at_once is a whole number from 1 up"),
        ({"most_chars": math.inf}, "most_chars is a whole number from 1 up"),
        ({"most": 3}, "there is no argument 'most'"),
        ({"approved": ["x"]}, "approved is a dict by the calls' ids"),
        ({"done": [llm.Failed("x")]}, "done is a list of outcomes"),
        ({"on_outcome": 3}, "on_outcome is a function"),
        ({"on_error": "log"}, "on_error is tell or raise"),
    ],
)
def test_arguments_of_run_tools_are_looked_at(arguments: dict[str, Any], words: str) -> None:
    reply, _ = asked([], ("x", {}))
    with pytest.raises(llm.UsageError, match=words):
        reply.run_tools(**arguments)


def test_tools_may_make_calls_themselves_both_ways() -> None:
    model = ScriptedModel([Said(calls=(("sub", {}), ("asub", {}))), "inner", "inner", "outer"])
    registry = llm.Registry()
    registry.add("test", model)

    @llm.call("test/m", registry=registry)
    def inner() -> str:
        """Asks another model."""
        return "inner?"

    def sub() -> str:
        return inner().value

    async def asub() -> str:
        return (await inner.aio()).value

    @llm.call("test/m", registry=registry, tools=[sub, asub, inner])
    def outer() -> str:
        return "outer?"

    reply = outer()
    outcomes = reply.run_tools()
    assert [one.value for one in outcomes] == ["inner", "inner"]
    assert reply.resume(outcomes).value == "outer"


def test_a_call_is_a_tool_as_it_stands() -> None:
    model = ScriptedModel([tool_call("poem", about="rain"), "drip", "done"])
    registry = llm.Registry()
    registry.add("test", model)

    @llm.call("test/m", registry=registry)
    def poem(about: str) -> str:
        """Writes a poem."""
        return f"A poem about {about}."

    @llm.call("test/m", registry=registry, tools=[poem])
    def ask() -> str:
        return "go"

    reply = ask()
    reply.resume(reply.run_tools())
    assert model.requests[0]["tools"][0]["function"]["description"] == "Writes a poem."
    assert told(model) == ["drip"]


def test_a_plain_function_that_gives_an_awaitable_is_awaited() -> None:
    async def inner() -> int:
        return 5

    def outer() -> Awaitable[int]:
        return inner()

    reply, _ = asked([outer], ("outer", {}))
    assert reply.run_tools()[0].value == 5


def test_iterators_are_not_drained() -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        def numbers() -> Iterator[int]:
            while True:
                taken.append(1)
                yield 1

        return numbers()

    reply, _ = asked([endless], ("endless", {}))
    assert "returned a generator" in reply.run_tools()[0].outcome.message
    assert not taken

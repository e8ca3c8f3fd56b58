"""Traces of calls have the spans and names of OpenTelemetry's conventions, and no texts unless somebody wants them.

Guards against spans that never end, parents that are wrong, prompts in traces by default, work where nobody traces, and
costs that are 0 where nobody knows them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import BaseModel, field_validator

from diptych.agents import llm
from diptych.agents.llm.testing.scripted import Said, ScriptedModel, failure, tool_call
from diptych.agents.llm.tracing import agent_span
from diptych.agents.llm.usage import PriceList
from diptych.agents.llm.watch import Watch, watching
from diptych.protos.replies import Usage

FAST = llm.Retries(base_s=0.0, repair=False)


class Book(BaseModel):
    title: str


class Seen:
    """A provider, and what it has seen."""

    def __init__(self) -> None:
        self._kept = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._kept))

    def spans(self) -> dict[str, ReadableSpan]:
        """By their names, those that have ended."""
        return {span.name: span for span in self._kept.get_finished_spans()}

    def all(self) -> list[ReadableSpan]:
        """In the order of their ends."""
        return list(self._kept.get_finished_spans())


@pytest.fixture
def seen() -> Iterator[Seen]:
    found = Seen()
    yield found
    found.provider.shutdown()


def made(seen: Seen, *entries: Any, capture: bool = False, **settings: Any) -> tuple[llm.Registry, ScriptedModel]:
    tracing = llm.Tracing(capture_content=capture, tracer_provider=seen.provider)
    registry, model = llm.Registry(environ={}, tracing=tracing, **settings), ScriptedModel(list(entries))
    registry.add("test", model)
    return registry, model


def ask(registry: llm.Registry, **settings: Any) -> Any:
    @llm.call("test/m", registry=registry, **{"retries": FAST, **settings})
    def recommend(topic: str) -> list[Any]:
        return [llm.system("Be brief."), llm.user(f"A book about {topic}")]

    return recommend


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_call_and_its_attempts(seen: Seen, is_stream: bool) -> None:
    usage = Usage(input_tokens=9, output_tokens=4, cache_read_tokens=5)
    registry, model = made(seen, failure("overloaded", status=503), Said(text='{"title": "Emma"}', usage=usage))
    call = ask(registry, output=Book, temperature=0.5, max_tokens=9, session="s1", stop=["x"])
    if is_stream:
        await call.stream("love").reply.aio()
    else:
        await call.aio("love")
    failed, answered, whole = seen.all()
    assert (failed.name, answered.name, whole.name) == ("chat m", "chat m", "call recommend")
    assert parent(failed) == parent(answered) == whole.context.span_id
    assert answered.kind is trace.SpanKind.CLIENT
    words = told(answered)
    assert words["gen_ai.operation.name"] == "chat"
    assert words["gen_ai.provider.name"] == "diptych"
    assert words["gen_ai.request.model"] == "m"
    assert words["gen_ai.response.model"] == "scripted"
    assert words["gen_ai.response.finish_reasons"] == ("stop",)
    assert words["gen_ai.usage.input_tokens"] == 9
    assert words["gen_ai.usage.output_tokens"] == 4
    assert words["gen_ai.usage.cache_read.input_tokens"] == 5
    assert words["gen_ai.request.temperature"] == 0.5
    assert words["gen_ai.request.max_tokens"] == 9
    assert words["gen_ai.request.stop_sequences"] == ("x",)
    assert words["gen_ai.request.stream"] is is_stream
    assert words["gen_ai.output.type"] == "json"
    assert words["gen_ai.conversation.id"] == "s1"
    assert words["diptych.attempt"] == 2
    assert words["diptych.cause"] == "retry"
    assert "error.type" not in words
    assert told(failed)["error.type"] == "overloaded"
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert told(whole)["diptych.attempts"] == 2
    assert told(whole)["diptych.outcome"] == "answered"
    assert whole.status.status_code is trace.StatusCode.UNSET
    context = answered.context
    assert model.headers[-1]["traceparent"][:53] == f"00-{context.trace_id:032x}-{context.span_id:016x}-"
    assert model.headers[0]["traceparent"] != model.headers[1]["traceparent"]


def test_texts_are_told_where_they_are_wanted_alone(seen: Seen) -> None:
    registry, _ = made(seen, "the answer")
    ask(registry)("the topic")
    assert "the topic" not in "".join(span.to_json() for span in seen.all())
    assert "the answer" not in "".join(span.to_json() for span in seen.all())
    registry, _ = made(seen, "the answer", capture=True)
    ask(registry)("the topic")
    words = told(seen.spans()["chat m"])
    assert json.loads(words["gen_ai.system_instructions"]) == [{"type": "text", "content": "Be brief."}]
    (asked,) = json.loads(words["gen_ai.input.messages"])
    assert asked == {"role": "user", "parts": [{"type": "text", "content": "A book about the topic"}]}
    (said,) = json.loads(words["gen_ai.output.messages"])
    assert said["finish_reason"] == "stop"
    assert said["parts"] == [{"type": "text", "content": "the answer"}]


def test_an_invalid_answer_and_a_failed_call_are_errors_by_a_word(seen: Seen) -> None:
    registry, _ = made(seen, {"wrong": 1}, {"wrong": 1})
    with pytest.raises(llm.InvalidOutput):
        ask(registry, output=Book, retries=llm.Retries(attempts=2, repair=False))("x")
    first, second, whole = seen.all()
    for span in (first, second, whole):
        assert told(span)["error.type"] == "llm_invalid_output"
    assert told(whole)["diptych.attempts"] == 2
    assert told(first)["gen_ai.usage.input_tokens"] == 10


async def test_who_leaves_is_no_error_and_leaves_no_span_open(seen: Seen) -> None:
    registry, _ = made(seen, "a long answer that nobody reads")
    async with ask(registry).stream("x") as stream:
        async for _ in stream:
            break
    attempt, whole = seen.all()
    assert told(attempt)["diptych.outcome"] == told(whole)["diptych.outcome"] == "cancelled"
    assert "error.type" not in told(attempt)
    assert whole.status.status_code is trace.StatusCode.UNSET


def test_calls_are_below_the_span_that_is_current(seen: Seen) -> None:
    registry, _ = made(seen, "a")
    with seen.provider.get_tracer("program").start_as_current_span("program"):
        ask(registry)("x")
    spans = seen.spans()
    assert parent(spans["call recommend"]) == spans["program"].context.span_id


def test_a_validators_own_call_is_below_the_call_that_it_judges(seen: Seen) -> None:
    registry, _ = made(seen, {"title": "Emma"}, "yes")

    @llm.call("test/judge", registry=registry)
    def judge(title: str) -> str:
        return f"Is {title} a book?"

    class Judged(BaseModel):
        title: str

        @field_validator("title")
        @classmethod
        def is_a_book(cls, title: str) -> str:
            assert judge(title).text == "yes"
            return title

    ask(registry, output=Judged)("x")
    spans = seen.spans()
    assert parent(spans["call judge"]) == spans["call recommend"].context.span_id


@pytest.mark.parametrize("is_async", [False, True])
def test_tools_and_agents(seen: Seen, is_async: bool) -> None:
    registry, _ = made(seen, tool_call("search", query="x"), "inner", "done", capture=True)

    @llm.call("test/inner", registry=registry)
    def inner() -> str:
        return "inner"

    def plain(query: str) -> str:
        """Looks it up."""
        return inner().text

    async def waiting(query: str) -> str:
        """Looks it up."""
        return (await inner.aio()).text

    search = llm.tool(name="search")(waiting if is_async else plain)
    span = agent_span(registry, "librarian", session="s1")
    assert span is not None
    reply = ask(registry, tools=[search])("x")
    reply = replace(reply, draft=replace(reply.draft, trace=span.context))
    reply.resume(reply.run_tools())
    span.end()
    spans = seen.spans()
    agent, tool = spans["invoke_agent librarian"], spans["execute_tool search"]
    assert told(agent)["gen_ai.operation.name"] == "invoke_agent"
    assert told(agent)["gen_ai.agent.name"] == "librarian"
    assert told(agent)["gen_ai.conversation.id"] == "s1"
    assert parent(tool) == agent.context.span_id
    words = told(tool)
    assert (words["gen_ai.operation.name"], words["gen_ai.tool.name"]) == ("execute_tool", "search")
    assert words["gen_ai.tool.call.id"] == "call_0"
    assert json.loads(words["gen_ai.tool.call.arguments"]) == {"query": "x"}
    assert parent(spans["call inner"]) == tool.context.span_id


def test_a_tool_that_raises_is_an_error_of_its_span(seen: Seen) -> None:
    registry, _ = made(seen, tool_call("search"))

    @llm.tool
    def search() -> str:
        """Looks it up."""
        raise KeyError("x")

    ask(registry, tools=[search])("x").run_tools()
    assert told(seen.spans()["execute_tool search"])["error.type"] == "KeyError"


def test_nobody_traces_nothing_happens() -> None:
    """Also where OpenTelemetry is there and nothing is configured; a registry can be silent by itself, too."""
    registry, model = llm.Registry(environ={}), ScriptedModel(["a"])
    registry.add("test", model)
    draft = ask(registry)("x").draft
    assert type(watching(draft)) is Watch
    assert "traceparent" not in model.headers[0]


def test_a_silent_registry(seen: Seen) -> None:
    registry, _ = made(seen, "a")
    registry.tracing = llm.Tracing(is_on=False, tracer_provider=seen.provider)
    ask(registry)("x")
    assert seen.all() == []


def test_opentelemetry_is_not_imported_for_a_call() -> None:
    words = """
import sys
from diptych.agents import llm
from diptych.agents.llm.testing.scripted import ScriptedModel
r = llm.Registry(environ={})
r.add("test", ScriptedModel(["a"]))
@llm.call("test/m", registry=r)
def f(): return "x"
f()
print(sorted(n for n in sys.modules if n.startswith("opentelemetry")))
"""
    found = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_a_remote_parent_is_passed_on_without_any_sdk() -> None:
    """A program may hand a trace through although it records nothing itself."""
    registry, model = llm.Registry(environ={}), ScriptedModel(["a"])
    registry.add("test", model)
    far = trace.SpanContext(0x1234, 0x5678, is_remote=True, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(far)):
        ask(registry)("x")
    assert model.headers[0]["traceparent"] == f"00-{0x1234:032x}-{0x5678:016x}-01"


def test_prices_of_a_registry_come_before_all_others(seen: Seen) -> None:
    usage = Usage(input_tokens=1_000_000, output_tokens=500_000)
    for prices, dollars in (
        ({"test/m": (1.0, 4.0)}, Decimal(3)),
        ({"test/*": (0.5, 0.0), "test/other": (9, 9)}, Decimal("0.5")),
        ({"test/m": (0, 0)}, Decimal(0)),
        ({"test/m": {"input_per_mtok": 1, "output_per_mtok": 0, "per_request": 0.25}}, Decimal("1.25")),
    ):
        registry, _ = made(seen, Said(text="a", usage=usage), prices=prices)
        reply = ask(registry)("x")
        assert reply.cost == dollars
        assert reply.cost is not None


def test_a_price_that_nobody_knows_is_none_and_what_was_refused_is_free(seen: Seen) -> None:
    registry, _ = made(seen, failure("overloaded", status=503), Said(text="a", usage=Usage()))
    assert ask(registry)("x").cost is None
    registry, _ = made(seen, failure("rate_limited", status=429), "a", prices={"test/m": (1, 1)})
    reply = ask(registry)("x")
    assert [attempt.spent.dollars for attempt in reply.attempts] == [Decimal(0), Decimal("0.000015")]
    registry, _ = made(seen, failure("timeout_idle"), "a", prices={"test/m": (1, 1)})
    reply = ask(registry)("x")
    assert reply.attempts[0].spent.dollars is None  # it may have computed, and be paid for
    assert reply.cost is None


def test_public_prices_are_for_providers_and_not_for_own_clusters() -> None:
    usage = Usage(input_tokens=1_000_000, output_tokens=0)
    registry = llm.Registry(
        environ={}, keys={"openai": "sk-x"}, clusters={"anthropic": llm.Cluster("http://127.0.0.1:1")}
    )
    public, model = registry.resolve("openai/gpt-4.1")
    assert public.cost(model, usage) == Decimal(2)
    own, _ = registry.resolve("anthropic/claude-sonnet-4-5")
    assert own.cost("claude-sonnet-4-5", usage) is None
    assert public.cost("a-model-that-nobody-has-heard-of", usage) is None


@pytest.mark.parametrize(
    "prices",
    [
        {"m": (1, 1)},
        {"lab/": (1, 1)},
        {"lab/m": 1},
        {"lab/m": (1,)},
        {"lab/m": (-1, 1)},
        {"lab/m": (float("nan"), 1)},
        {"lab/m": {"input_per_mtok": 1}},
        {"lab/m": {"input_per_mtok": 1, "output_per_mtok": 1, "each": 1}},
        {"lab/m": ("1", 1)},
        {"lab/m": (True, 1)},
    ],
)
def test_a_price_that_cannot_be_is_named(prices: Any) -> None:
    with pytest.raises(llm.UsageError, match="prices"):
        PriceList(prices)

"""Spans of routed answers: one for the request, one below it for each attempt, and nothing in them that anybody said.

Guards against attempts that are nobody's children, spans that never end, keys and texts in traces, a trace that outside
providers are told of, and requests that pay for tracing which is off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from behaviours import BEHAVIOURS
from journeys import HELLO, gateway, read, run
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from scripted import Behaviour, Rig, Wire

from diptych.cluster.gateway import spans as spans_module
from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.ports import Context, Ports
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import Script, ScriptedTarget, Wait, fails
from diptych.cluster.observability.tracing import tracer_if_on
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.deltas import Content
from diptych.protos.errors import DiptychError, RateLimited
from diptych.protos.failures import FailureKind
from diptych.protos.replies import Began, Ended, Usage

TRACE, PARENT = "ab" * 16, "cd" * 8
CALLER = Context(traceparent=f"00-{TRACE}-{PARENT}-01")
SECRET = "sk-" + "s3cr3t" * 8
ANSWER: Script = [
    Began("answer", "scripted"),
    Content("word"),
    Usage(input_tokens=7, output_tokens=3, cache_read_tokens=5, reasoning_tokens=1),
    Ended("stop"),
]


class Traced:
    """A tracer, and what it has written."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False, **options)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("test")

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def split(self) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """The request's, which ended last, and the attempts' in their order."""
        request = next(span for span in self.spans if span.name == "gateway")
        attempts = [span for span in self.spans if span is not request]
        return request, sorted(attempts, key=lambda span: about(span)["diptych.attempt"])


def about(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def id_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_request_has_a_span_and_each_attempt_one_below_it(is_stream: bool) -> None:
    async def job(traced: Traced) -> list[str]:
        seen: list[str] = []

        class Pool(ScriptedTarget):
            async def stream(self, request: Any, terms: Any, record: Any) -> Any:
                seen.append(record.traceparent)
                async for event in ScriptedTarget.stream(self, request, terms, record):
                    yield event

        bad = ScriptedTarget("mistral/small", [[fails(FailureKind.OVERLOADED)]])
        own = Pool("pool/tiny", [ANSWER], is_own=True)
        gate = gateway(bad, own, ports={"tracer": traced.tracer})
        if is_stream:
            _, exc, _ = await read(gate, context=CALLER)
            assert exc is None
        else:
            await gate.chat("chat", HELLO, context=CALLER)
        return seen

    traced = Traced()
    (told,) = run(job(traced))
    request, (first, second) = traced.split()
    assert request.parent is not None
    assert (f"{request.parent.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, PARENT)
    assert [span.parent and f"{span.parent.span_id:016x}" for span in (first, second)] == [id_of(request)] * 2
    assert told == f"00-{TRACE}-{id_of(second)}-01"
    assert about(request) == {
        "diptych.model": "chat",
        "diptych.route": "chat",
        "diptych.stream": is_stream,
        "diptych.target": "pool/tiny",
        "diptych.outcome": "answered",
        "diptych.attempts": 2,
    }
    assert (first.name, first.kind, second.name, second.kind) == (
        "chat small",
        SpanKind.CLIENT,
        "chat tiny",
        SpanKind.INTERNAL,
    )
    assert about(first) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mistral_ai",
        "gen_ai.request.model": "small",
        "gen_ai.request.stream": is_stream,
        "diptych.target": "mistral/small",
        "diptych.group": "chat",
        "diptych.cause": "first",
        "diptych.attempt": 1,
        "diptych.outcome": "failed",
        "diptych.phase": "A",
        "error.type": "overloaded",
    }
    assert first.status.status_code is StatusCode.ERROR
    assert not first.status.description
    found = about(second)
    assert (found["gen_ai.provider.name"], found["diptych.cause"], found["diptych.outcome"]) == (
        "diptych",
        "retry",
        "answered",
    )
    assert [found.get(f"gen_ai.usage.{name}_tokens") for name in ("input", "output", "cache_read.input")] == [7, 3, 5]
    assert found["gen_ai.usage.reasoning.output_tokens"] == 1
    assert ("gen_ai.response.time_to_first_chunk" in found) is is_stream
    assert "error.type" not in found


def _left(scripts: Script) -> Callable[[Traced], Any]:
    async def job(traced: Traced) -> None:
        target = ScriptedTarget("p/a", [scripts])
        async with gateway(target, ports={"tracer": traced.tracer}).stream("chat", HELLO) as events:
            async for _ in events:
                break

    return job


async def _cancelled(traced: Traced) -> None:
    gate = gateway(ScriptedTarget("p/a", [[Wait(5.0), *ANSWER]]), ports={"tracer": traced.tracer})
    task = asyncio.create_task(gate.chat("chat", HELLO))
    await asyncio.sleep(1.0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _hedged(traced: Traced) -> None:
    slow = ScriptedTarget("p/a", [*[ANSWER] * 4, [Wait(50.0), *ANSWER]])
    quick = ScriptedTarget("p/b", [ANSWER])
    hedge = {"after": 0.5, "max_fraction": 0.5}
    gate = gateway(slow, quick, ports={"tracer": traced.tracer}, hedge=hedge)
    for _ in range(5):  # a part of the requests may be hedged
        traced.exporter.clear()
        await gate.chat("chat", HELLO)


async def _refused(traced: Traced) -> None:
    with pytest.raises(DiptychError):
        await gateway(ScriptedTarget("p/a", [[fails(FailureKind.BAD_REQUEST)]]), ports={"tracer": traced.tracer}).chat(
            "chat", HELLO
        )


def _over_budget(*, is_stream: bool) -> Callable[[Traced], Any]:
    class Spent:
        async def reserve(self, *asked: object) -> None:
            raise RateLimited("nothing is left", 1.0)

    async def job(traced: Traced) -> None:
        gate = gateway(ScriptedTarget("p/a", [ANSWER]), ports={"tracer": traced.tracer, "ledger": Spent()})
        if is_stream:
            assert isinstance((await read(gate))[1], RateLimited)
            return
        with pytest.raises(RateLimited):
            await gate.chat("chat", HELLO)

    return job


@pytest.mark.parametrize(
    ("job", "outcome", "attempts", "error"),
    [
        (_left([*ANSWER[:2], Wait(9.0), *ANSWER[2:]]), "cancelled", ["left"], None),
        (_cancelled, "cancelled", ["left"], None),
        (_hedged, "answered", ["lost", "answered"], None),
        (_refused, "invalid_request", ["failed"], "invalid_request"),
        (_over_budget(is_stream=True), "rate_limit_exceeded", [], "rate_limit_exceeded"),
        (_over_budget(is_stream=False), "rate_limit_exceeded", [], "rate_limit_exceeded"),
    ],
)
def test_however_a_request_ends_its_spans_do(
    job: Callable[[Traced], Any], outcome: str, attempts: list[str], error: str | None
) -> None:
    traced = Traced()
    run(job(traced))
    request, below = traced.split()
    told = about(request)
    assert (told["diptych.outcome"], told.get("error.type")) == (outcome, error)
    assert [about(span)["diptych.outcome"] for span in below] == attempts
    ends = [span.end_time for span in (*below, request)]
    assert all(ends)
    assert ends == sorted(ends, key=lambda end: end or 0)


async def test_neither_keys_nor_texts_nor_traces_reach_where_they_do_not_belong() -> None:
    """A provider that repeats key and prompt in its error, asked with a trace of the caller's."""

    async def act(wire: Wire) -> None:
        await wire.body(wire.dialect.error("server_error", f"{SECRET}: prompt-text"), "500 Internal Server Error")

    BEHAVIOURS["here"] = Behaviour(act, "refuses", "refuses")
    traced = Traced()
    try:
        async with Rig() as rig:
            place = rig.providers(1)["rig-openai.chat"] | {"api_key": "env:RIG_KEY", "auth": "bearer"}
            providers = {"rig-openai.chat": ProviderSettings.model_validate(place)}
            settings = GatewaySettings.model_validate(
                {"routes": {"chat": {"targets": ["rig-openai.chat/here"], "retries": 0}}}
            )
            ports = Ports(tracer=traced.tracer)
            async with Gateway(settings, Registry.load(providers, {"RIG_KEY": SECRET}, {}), ports=ports) as gate:
                message = [{"role": "user", "content": "prompt-text"}]
                with pytest.raises(DiptychError):
                    await gate.chat("chat", message, context=CALLER, user="somebody")
    finally:
        del BEHAVIOURS["here"]
    (head,) = rig.heads
    assert SECRET in head
    assert "traceparent" not in head.lower()
    assert TRACE not in head
    request, (attempt,) = traced.split()
    assert about(attempt)["http.response.status_code"] == 500
    written = "".join(span.to_json() for span in (request, attempt))
    for secret in (SECRET, "s3cr3t", "prompt-text", "somebody", "authorization"):
        assert secret not in written
    assert not request.events
    assert not attempt.events


def test_without_a_tracer_and_in_a_trace_that_is_not_sampled_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The own pool is still told of the caller's trace."""

    async def job(ports: dict[str, Any]) -> list[str]:
        target = ScriptedTarget("pool/tiny", [ANSWER], is_own=True)
        _, exc, record = await read(gateway(target, ports=ports), context=CALLER)
        assert exc is None
        return [attempt.traceparent for attempt in record.attempts]

    traced = Traced(sampler=ALWAYS_OFF)
    assert run(job({"tracer": traced.tracer})) == [CALLER.traceparent]
    assert traced.spans == ()
    monkeypatch.setattr(spans_module.time, "time_ns", None)  # nobody asks for the time
    assert run(job({})) == [CALLER.traceparent]


def test_there_is_a_tracer_only_where_spans_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    assert tracer_if_on("x") is None
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: TracerProvider(shutdown_on_exit=False))
    assert tracer_if_on("x") is not None

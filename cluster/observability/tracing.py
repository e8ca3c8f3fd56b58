"""Spans of the OpenTelemetry API, and the one place that configures the SDK: JSON lines, one file per process.

Without a trace file nothing is configured and every span is free of charge.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from diptych.protos.embedding import EmbedOrder, EmbedTimes
from diptych.protos.types import Finish, Role

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

_PROPAGATOR = TraceContextTextMapPropagator()


def configure_tracing(trace_file: Path | None, process: str) -> None:
    """Write this process's spans to `<stem>.<process>-<pid><suffix>` beside `trace_file`; None: no tracing."""
    if trace_file is None:
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    trace_file.parent.mkdir(parents=True, exist_ok=True)
    path = trace_file.with_name(f"{trace_file.stem}.{process}-{os.getpid()}{trace_file.suffix or '.jsonl'}")
    provider = TracerProvider(resource=Resource.create({"service.name": "diptych", "service.instance.id": process}))
    provider.add_span_processor(BatchSpanProcessor(json_lines(path), schedule_delay_millis=500))
    trace.set_tracer_provider(provider)


def json_lines(path: Path) -> ConsoleSpanExporter:
    """Appends one JSON object per span to a file that only its owner may read."""
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    out = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8", buffering=1)  # noqa: SIM115  the exporter's, for the life of the process
    return ConsoleSpanExporter(out=out, formatter=lambda span: span.to_json(indent=None) + "\n")


def flush_tracing() -> None:
    """Write what is still in memory; for the end of a process."""
    flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if flush is not None:
        flush(2000)


def tracer_if_on(name: str) -> trace.Tracer | None:
    """A tracer, where this process writes spans; None where making them would be for nothing."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return provider.get_tracer(name)


def context_from(traceparent: str) -> Context:
    """The context that a W3C traceparent names; an empty or malformed one gives a root."""
    return _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {})


def traceparent_of(span: trace.Span) -> str:
    """The header that makes another process's spans children of `span`; empty without a trace."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def record_phase(finish: Finish, traceparent: str, engine: str, started_ns: int, ended_ns: int) -> None:
    """The spans of one phase of a request in one engine, after its end: `prefill` or `decode` with its queue time, and
    `transfer` within. Wall clock nanoseconds.
    """
    tracer = trace.get_tracer("diptych.engine")
    span = tracer.start_span(finish.role.value, context=context_from(traceparent), start_time=started_ns)
    if span.is_recording():
        span.set_attributes(
            {
                "diptych.engine": engine,
                "diptych.transfer_id": str(finish.key),
                "diptych.finish": finish.reason.value,
                "diptych.tokens": finish.num_tokens,
                "diptych.cached_tokens": finish.cached_tokens,
                "diptych.queue_s": finish.times.queue,
            }
        )
        if finish.times.transfer > 0:
            _record_transfer(tracer, span, finish, started_ns, ended_ns)
    span.end(ended_ns)


def _record_transfer(tracer: trace.Tracer, phase: trace.Span, finish: Finish, started_ns: int, ended_ns: int) -> None:
    # The prefill engine sends last, the decode engine receives first.
    duration_ns = int(finish.times.transfer * 1e9)
    begin = max(started_ns, ended_ns - duration_ns) if finish.role is Role.PREFILL else started_ns
    span = tracer.start_span("transfer", context=trace.set_span_in_context(phase), start_time=begin)
    span.set_attributes({"diptych.transport": finish.transport, "diptych.bytes": finish.transfer_bytes})
    span.end(min(begin + duration_ns, ended_ns))


def record_texts(order: EmbedOrder, times: EmbedTimes, *, engine: str, started_ns: int, ended_ns: int) -> None:
    """The span of texts that an engine has computed. Wall clock nanoseconds."""
    tracer = trace.get_tracer("diptych.engine")
    span = tracer.start_span("embed", context=context_from(order.traceparent), start_time=started_ns)
    if span.is_recording():
        told = {"diptych.engine": engine, "diptych.kind": order.kind.value, "diptych.texts": len(order.rows)}
        span.set_attributes(told | {"diptych.tokens": order.num_tokens, "diptych.queue_s": times.queue})
    span.end(ended_ns)

"""Spans through the OpenTelemetry API. Without `configure` they cost next to nothing and only pass `traceparent` on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.propagate import inject
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()


def context_from(traceparent: str | None) -> Context | None:
    """The caller's trace; None when there is none or it is malformed."""
    return _PROPAGATOR.extract({"traceparent": traceparent}) if traceparent else None


def traceparent_of(span: trace.Span) -> str:
    """The header that makes another process's spans children of `span`; empty without a trace."""
    carrier: dict[str, str] = {}
    inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


class JsonLinesExporter(SpanExporter):
    """One line per span: name, trace, span, parent, start and end in Unix nanoseconds, attributes, status."""

    def __init__(self, file: Path) -> None:
        self._out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Append whole lines in one write, so that processes may share a file."""
        lines = "".join(json.dumps(_as_json(span), default=str) + "\n" for span in spans)
        os.write(self._out, lines.encode())
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Close the file; idempotent."""
        if self._out >= 0:
            os.close(self._out)
            self._out = -1


def _as_json(span: ReadableSpan) -> Mapping[str, object]:
    context = span.get_span_context()
    assert context is not None
    return {
        "name": span.name,
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
        "parent_id": f"{span.parent.span_id:016x}" if span.parent else None,
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "status": span.status.status_code.name,
        "attributes": dict(span.attributes or {}),
        "service": span.resource.attributes.get("service.name"),
    }


def configure(trace_file: Path | None, service: str) -> TracerProvider | None:
    """Write this process's spans to `trace_file`; called once, by a process's entry point. None: tracing stays off.

    The caller owns the provider and calls its `shutdown`, which writes what is buffered.
    """
    if trace_file is None:
        return None
    provider = TracerProvider(resource=Resource({"service.name": service}), shutdown_on_exit=True)
    provider.add_span_processor(BatchSpanProcessor(JsonLinesExporter(trace_file), schedule_delay_millis=500))
    trace.set_tracer_provider(provider)
    return provider

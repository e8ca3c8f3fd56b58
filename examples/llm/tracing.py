"""Traces: a call is a span, its attempts are spans below it. The library uses OpenTelemetry's API alone; a program
configures it as it does for the rest of itself, here with an exporter that prints.
"""

from __future__ import annotations

import os
import sys

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = ["Seven."]


def line(span: ReadableSpan) -> str:
    told = {name: value for name, value in (span.attributes or {}).items() if name.startswith("gen_ai.")}
    return f"{span.name}: {told}\n"


def main() -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=line)))
    default = llm.default_registry()
    default.tracing = llm.Tracing(tracer_provider=provider)  # without one, the process's own is used

    @llm.call(MODEL, max_tokens=10, session="demo")
    def days() -> str:
        return "How many days has a week? One word."

    print(days().text)
    default.tracing = llm.Tracing()
    provider.shutdown()


if __name__ == "__main__":
    main()

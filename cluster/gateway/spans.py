"""Spans of a routed answer: one for the request and, below it, one for each attempt.

gateway.py begins them, where it was given a tracer; exchange.py tells of attempts. They say names of the configuration,
numbers and words of ours: no text of a prompt, an answer or an error, no header, no key.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from diptych.protos.errors import DiptychError

from .record import AttemptRecord, ExchangeRecord
from .settings import OWN

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer
    from opentelemetry.util.types import AttributeValue

    from .planning import Plan

# OpenTelemetry's names of providers, where it has one that is not ours.
PROVIDERS: Final = {
    OWN: "diptych",
    "azure": "azure.ai.openai",
    "azure_responses": "azure.ai.openai",
    "bedrock": "aws.bedrock",
    "bedrock_anthropic": "aws.bedrock",
    "google": "gcp.gemini",
    "mistral": "mistral_ai",
    "openai_responses": "openai",
    "vertex": "gcp.vertex_ai",
    "vertex_anthropic": "gcp.vertex_ai",
    "xai": "x_ai",
}
TOKENS: Final = {
    "gen_ai.usage.input_tokens": "input_tokens",
    "gen_ai.usage.output_tokens": "output_tokens",
    "gen_ai.usage.cache_read.input_tokens": "cache_read_tokens",
    "gen_ai.usage.cache_creation.input_tokens": "cache_write_tokens",
    "gen_ai.usage.reasoning.output_tokens": "reasoning_tokens",
}
_WELL: Final = frozenset({"answered", "cached", "cancelled"})  # who leaves is no error of ours
_NS: Final = 1_000_000_000


class RequestSpans:
    """Of one request, entered while it is in work; without a tracer, or where the trace is not sampled, does nothing.
    `record`: what became of the request, as soon as there is one.
    """

    __slots__ = ("_is_stream", "_open", "_span", "_tracer", "record")

    def __init__(self, tracer: Tracer | None, plan: Plan, *, is_stream: bool) -> None:
        self.record: ExchangeRecord | None = None
        self._tracer = tracer
        self._is_stream = is_stream
        self._open: dict[int, Span] = {}  # of attempts under way, by the id of their record
        self._span: Span | None = None
        if tracer is not None:
            self._begin(tracer, plan)

    def _begin(self, tracer: Tracer, plan: Plan) -> None:
        from diptych.cluster.observability.tracing import context_from

        context = plan.context
        told: dict[str, AttributeValue] = {
            "diptych.model": plan.asked,
            "diptych.route": plan.request.model,
            "diptych.stream": self._is_stream,
        }
        if plan.rule:
            told["diptych.rule"] = plan.rule
        span = tracer.start_span(
            "gateway",
            context_from(context.traceparent),
            attributes=told,
            start_time=time.time_ns() - int(context.waited_s * _NS),
        )
        if span.is_recording():
            self._span = span

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        span, self._span = self._span, None
        if span is None:
            return
        record = self.record
        outcome = "running" if record is None else record.outcome
        if outcome == "running":  # it failed before anybody was asked
            outcome = exc.code if isinstance(exc, DiptychError) else "cancelled"
        told: dict[str, AttributeValue] = {"diptych.outcome": outcome}
        if record is not None:
            told["diptych.attempts"] = len(record.attempts)
            told |= {"diptych.target": record.target} if record.target else {}
            told |= {"diptych.cache": record.cache} if record.cache else {}
        _end(span, told, "" if outcome in _WELL else outcome)

    def began(self, attempt: AttemptRecord, number: int) -> None:
        """An attempt begins, the `number`th of the request; an own pool's spans will be below its span."""
        if self._span is None or self._tracer is None:
            return
        from opentelemetry.trace import SpanKind, set_span_in_context

        from diptych.cluster.observability.tracing import traceparent_of

        provider, _, model = attempt.target.partition("/")
        told: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": PROVIDERS.get(provider, provider),
            "gen_ai.request.model": model,
            "gen_ai.request.stream": self._is_stream,
            "diptych.target": attempt.target,
            "diptych.group": attempt.group,
            "diptych.cause": attempt.cause,
            "diptych.attempt": number,
        }
        span = self._open[id(attempt)] = self._tracer.start_span(
            f"chat {model}",
            set_span_in_context(self._span),
            kind=SpanKind.INTERNAL if provider == OWN else SpanKind.CLIENT,
            attributes=told,
        )
        attempt.traceparent = traceparent_of(span)

    def ended(self, attempt: AttemptRecord) -> None:
        """It is over, and all of it that will be known is known."""
        span = self._open.pop(id(attempt), None)
        if span is None:
            return
        told: dict[str, AttributeValue] = {"diptych.outcome": attempt.outcome, "diptych.phase": attempt.phase}
        told |= {name: n for name, ours in TOKENS.items() if (n := getattr(attempt.usage, ours)) is not None}
        if attempt.first_ms is not None and self._is_stream:
            told["gen_ai.response.time_to_first_chunk"] = (attempt.first_ms - attempt.began_ms) / 1000
        failure = attempt.failure
        status = (0 if attempt.http is None else attempt.http.status) or (0 if failure is None else failure.status or 0)
        if status:
            told["http.response.status_code"] = status
        _end(span, told, "" if failure is None else failure.kind.value)


def _end(span: Span, told: dict[str, AttributeValue], error: str) -> None:
    """`error`: a word for what went wrong, never what anybody said of it."""
    span.set_attributes(told)
    if error:
        from opentelemetry.trace import StatusCode

        span.set_attribute("error.type", error)
        span.set_status(StatusCode.ERROR)
    span.end()

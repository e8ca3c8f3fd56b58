"""Traces of calls by OpenTelemetry's API: a span of the call, below it one of each attempt; spans of tools and agents.

Nothing is exported here: a program that wants traces configures OpenTelemetry as it does for the rest of itself. Names
are those of its conventions for generative AI, as far as there are any. Texts are told only where `capture_content`
says so. watch.py, agents and runs of tools call it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from diptych.protos.messages import Media, Message, Reasoning, Refusal, Text, ToolCall, ToolResult

from .upstream import HttpUpstream

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer, TracerProvider
    from opentelemetry.util.types import AttributeValue

    from .attempts import Attempt
    from .draft import Draft, Encoded
    from .registry import Registry
    from .reply import Reply
    from .upstream import Wire

_SCOPE = "diptych.llm"
_PARAMS = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "max_tokens": "gen_ai.request.max_tokens",
    "seed": "gen_ai.request.seed",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "thinking": "gen_ai.request.reasoning.level",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracing:
    """Of a registry. `capture_content`: spans hold the texts of prompts, answers and tools; else numbers and names
    alone. `tracer_provider`: None is the one that the process has configured; where it has none, nothing is done.
    """

    is_on: bool = True
    capture_content: bool = False
    tracer_provider: TracerProvider | None = field(default=None, repr=False)


def _tracer(settings: Tracing) -> Tracer | None:
    """None where no span would be seen by anybody."""
    if not settings.is_on:
        return None
    if settings.tracer_provider is not None:
        return settings.tracer_provider.get_tracer(_SCOPE)
    if "opentelemetry.trace" not in sys.modules:  # nobody can have configured it
        return None
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    is_bare = isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider)
    if is_bare and not trace.get_current_span().get_span_context().is_valid:
        return None
    return provider.get_tracer(_SCOPE)


def begun(draft: Draft[Any], *, is_stream: bool = False) -> CallTrace | None:
    """The trace of a call that begins now; None where there is none."""
    tracer = _tracer(draft.registry.tracing)
    return None if tracer is None else CallTrace(tracer, draft, is_stream=is_stream)


class CallTrace:
    """The span of one call, and that of the attempt under way."""

    __slots__ = ("_attempt", "_captures", "_context", "_is_stream", "_span", "_tracer")

    def __init__(self, tracer: Tracer, draft: Draft[Any], *, is_stream: bool) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        told: dict[str, AttributeValue] = {"gen_ai.prompt.name": draft.name, "diptych.stream": is_stream}
        told |= {"diptych.version": draft.version} if draft.version else {}
        told |= _session(draft)
        self._tracer = tracer
        self._is_stream = is_stream
        self._captures = draft.registry.tracing.capture_content
        self._attempt: Span | None = None
        self._span = tracer.start_span(f"call {draft.name}", draft.trace, kind=SpanKind.INTERNAL, attributes=told)
        self._context = set_span_in_context(self._span, draft.trace)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Spans that begin in here are below the call's."""
        from opentelemetry import context

        token = context.attach(self._context)
        try:
            yield
        finally:
            context.detach(token)

    def asks(self, draft: Draft[Any], sent: Encoded, number: int, why: str) -> Encoded:
        """An attempt begins; a Diptych cluster is told of it, so that its spans are below this one."""
        from opentelemetry.trace import SpanKind

        self._end_attempt("cancelled")
        upstream = sent.upstream
        told: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": _provider_name(sent),
            "gen_ai.request.model": sent.model,
            "gen_ai.request.stream": self._is_stream,
            "gen_ai.output.type": "text" if draft.output is None else "json",
            "diptych.target": draft.model,
            "diptych.attempt": number,
            "diptych.cause": why,
            **_asked(draft),
            **_session(draft),
        }
        if isinstance(upstream, HttpUpstream):
            told |= upstream.server()
        if self._captures:
            told |= _content_of_request(sent)
        self._attempt = self._tracer.start_span(
            f"chat {sent.model}", self._context, kind=SpanKind.CLIENT, attributes=told
        )
        if not upstream.profile.is_own or not (traceparent := _traceparent(self._attempt)):
            return sent
        headers = {**sent.outgoing.headers, "traceparent": traceparent}
        return replace(sent, outgoing=replace(sent.outgoing, headers=headers))

    def tried(self, attempt: Attempt, wire: Wire) -> None:
        """It is over."""
        span = self._attempt
        if span is None:
            return
        told: dict[str, AttributeValue] = {}
        if (answer := attempt.answer) is not None:
            told |= _usage(answer.usage)
            told["gen_ai.response.finish_reasons"] = [answer.ended.finish]
            told |= {"gen_ai.response.id": answer.began.id} if answer.began.id else {}
            told |= {"gen_ai.response.model": answer.began.model} if answer.began.model else {}
            if self._captures:
                said = {**_message(answer.message), "finish_reason": answer.ended.finish}
                told["gen_ai.output.messages"] = _json([said])
        if wire.status:
            told["http.response.status_code"] = wire.status
        if self._is_stream and wire.first_token_s is not None:
            told["gen_ai.response.time_to_first_chunk"] = wire.first_token_s
        if attempt.spent.dollars is not None and attempt.answer is not None:
            told["diptych.dollars"] = float(attempt.spent.dollars)
        span.set_attributes(told)
        self._end_attempt("" if attempt.error is None else _word(attempt.error))

    def ended(self, reply: Reply[Any] | None, error: BaseException | None) -> None:
        """The call is over; neither reply nor error: its caller left."""
        is_left = reply is None and error is None
        self._end_attempt("cancelled")
        told: dict[str, AttributeValue] = {"diptych.outcome": "answered" if reply is not None else "failed"}
        attempts: Sequence[Attempt] = reply.attempts if reply is not None else getattr(error, "attempts", ())
        if is_left:
            told["diptych.outcome"] = "cancelled"
        else:
            told["diptych.attempts"] = len(attempts)
        if reply is not None and reply.attempts[-1].why == "cached":
            told["diptych.cache"] = "hit"
        self._span.set_attributes(told)
        _end(self._span, "" if error is None else _word(error))

    def _end_attempt(self, error: str) -> None:
        span, self._attempt = self._attempt, None
        if span is not None:
            if error == "cancelled":  # who leaves is no error of ours
                span.set_attribute("diptych.outcome", error)
                error = ""
            _end(span, error)


class Traced:
    """The span of a tool's run, or of an agent's. `context` goes into the `trace` of drafts that belong below it."""

    __slots__ = ("_captures", "_span", "context")

    def __init__(self, span: Span, context: Context, *, captures: bool) -> None:
        self._span = span
        self._captures = captures
        self.context = context

    def tell(self, attributes: Mapping[str, AttributeValue], content: Mapping[str, Any] | None = None) -> None:
        """More of it; `content` only where texts are wanted."""
        self._span.set_attributes(dict(attributes))
        if self._captures and content:
            self._span.set_attributes({name: _json(value) for name, value in content.items()})

    def end(self, error: BaseException | str | None = None) -> None:
        """It is over. `error`: what went wrong, or a word for it."""
        _end(self._span, error if isinstance(error, str) else "" if error is None else _word(error))


def agent_span(registry: Registry, name: str, *, session: str = "", parent: Context | None = None) -> Traced | None:
    """`invoke_agent NAME`, for the time of one run: `.end(error)` ends it; None where nobody traces. Drafts of the run
    get its `context` as their `trace`.
    """
    told: dict[str, AttributeValue] = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": name}
    told |= {"gen_ai.conversation.id": session} if session else {}
    return _started(registry, f"invoke_agent {name}", told, parent)


@contextmanager
def _tool_span(draft: Draft[Any], call: ToolCall, description: str) -> Iterator[Traced | None]:
    from opentelemetry import context

    told: dict[str, AttributeValue] = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": call.name,
        "gen_ai.tool.call.id": call.id,
        "gen_ai.tool.type": "function",
        **_session(draft),
    }
    told |= {"gen_ai.tool.description": description} if description else {}
    traced = _started(draft.registry, f"execute_tool {call.name}", told, draft.trace)
    assert traced is not None
    traced.tell({}, {"gen_ai.tool.call.arguments": call.arguments})
    token = context.attach(traced.context)
    try:
        yield traced
    except BaseException as exc:
        traced.end(exc)
        raise
    else:
        traced.end()
    finally:
        context.detach(token)


_NO_SPAN: AbstractContextManager[None] = nullcontext()


def tool_span(draft: Draft[Any], call: ToolCall, description: str = "") -> AbstractContextManager[Traced | None]:
    """`execute_tool NAME` around a tool's function, entered in the thread or task that runs it: calls that it makes are
    below. It gives None where nobody traces; else `.end("retry")` tells of an outcome that is no value by a word.
    """
    return _NO_SPAN if _tracer(draft.registry.tracing) is None else _tool_span(draft, call, description)


def _started(registry: Registry, name: str, told: dict[str, AttributeValue], parent: Context | None) -> Traced | None:
    tracer = _tracer(registry.tracing)
    if tracer is None:
        return None
    from opentelemetry.trace import SpanKind, set_span_in_context

    span = tracer.start_span(name, parent, kind=SpanKind.INTERNAL, attributes=told)
    return Traced(span, set_span_in_context(span, parent), captures=registry.tracing.capture_content)


def _end(span: Span, error: str) -> None:
    """`error`: a word for what went wrong, never what anybody said of it."""
    if not span.is_recording():  # ended before, or nobody wants it
        return
    if error:
        from opentelemetry.trace import StatusCode

        span.set_attribute("error.type", error)
        span.set_status(StatusCode.ERROR)
    span.end()


def _word(error: BaseException) -> str:
    from .errors import ProviderError

    if isinstance(error, ProviderError):
        return error.failure.kind.value
    return str(getattr(error, "code", "") or type(error).__name__)


def _traceparent(span: Span) -> str:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier.get("traceparent", "")


def _provider_name(sent: Encoded) -> str:
    from diptych.cluster.gateway.spans import PROVIDERS

    return "diptych" if sent.upstream.profile.is_own else PROVIDERS.get(sent.upstream.name, sent.upstream.name)


def _usage(usage: Any) -> dict[str, AttributeValue]:
    from diptych.cluster.gateway.spans import TOKENS

    return {name: count for name, ours in TOKENS.items() if (count := getattr(usage, ours)) is not None}


def _session(draft: Draft[Any]) -> dict[str, AttributeValue]:
    session = draft.params.get("session")
    return {"gen_ai.conversation.id": session} if session else {}


def _asked(draft: Draft[Any]) -> dict[str, AttributeValue]:
    params: Mapping[str, Any] = draft.params
    told: dict[str, AttributeValue] = {
        name: params[ours] for ours, name in _PARAMS.items() if params.get(ours) is not None
    }
    if stop := params.get("stop"):
        told["gen_ai.request.stop_sequences"] = [stop] if isinstance(stop, str) else list(stop)
    return told


def _content_of_request(sent: Encoded) -> dict[str, AttributeValue]:
    messages = sent.request.messages
    is_system = [message.role in ("system", "developer") for message in messages]
    system = [part for message, yes in zip(messages, is_system, strict=True) if yes for part in _parts(message)]
    told: dict[str, AttributeValue] = {
        "gen_ai.input.messages": _json(
            [_message(message) for message, yes in zip(messages, is_system, strict=True) if not yes]
        )
    }
    if system:
        told["gen_ai.system_instructions"] = _json(system)
    if tools := sent.outgoing.body.get("tools"):
        told["gen_ai.tool.definitions"] = _json(tools)
    return told


def _message(message: Message) -> dict[str, Any]:
    return {"role": message.role, "parts": _parts(message)}


def _parts(message: Message) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in message.parts:
        match part:
            case Text() | Refusal():
                found.append({"type": "text", "content": part.text})
            case Reasoning():
                found.append({"type": "reasoning", "content": "" if part.is_redacted else part.text})
            case Media():  # bytes have no place in a trace
                place = {"uri": part.url} if part.url and not part.url.startswith("data:") else {}
                kind = "uri" if place else "blob"
                found.append({"type": kind, "modality": part.kind, "mime_type": part.media_type, **place})
            case ToolCall():
                found.append({"type": "tool_call", "id": part.id, "name": part.name, "arguments": part.arguments})
            case ToolResult():
                words = "".join(inner.text for inner in part.parts if isinstance(inner, Text))
                found.append({"type": "tool_call_response", "id": part.call_id, "response": words})
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)

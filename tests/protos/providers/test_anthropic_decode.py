"""Answers and streams in Anthropic's format, from fixtures made by hand from its documentation.

Guards against events lost at the border of two blocks, extras of a provider that do not survive the way back, errors
that come as events, and streams that break off and look whole.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Extras, Reasoning, Signature
from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.messages import Message, Text, ToolCall
from diptych.protos.messages import Reasoning as ReasoningPart
from diptych.protos.openai import ChatRequest
from diptych.protos.providers.anthropic import MessagesCodec
from diptych.protos.providers.codec import Codec, ServerEvent
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Began, Ended, Event, Reply, ReplyBuilder, Usage

CODEC: Codec = MessagesCodec()
WAITING = (FailureKind.RATE_LIMITED, FailureKind.OVERLOADED, FailureKind.QUOTA, FailureKind.SERVER)
QUIRKS = Quirks(family="anthropic")
CITED = {"type": "page_location", "cited_text": "c", "document_index": 0, "start_page_number": 1, "end_page_number": 2}
SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "q"}}
FOUND = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}
WHOLE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-opus-5",
    "content": [
        {"type": "thinking", "thinking": "Hm.", "signature": "EqQB"},
        {"type": "redacted_thinking", "data": "EmwK"},
        SEARCH,
        FOUND,
        {"type": "text", "text": "It is "},
        {"type": "text", "text": "so.", "citations": [CITED]},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": [1, "\u00f6"]}},
        {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}, "caller": {"type": "direct"}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 10,
        "cache_creation_input_tokens": 3,
        "cache_creation": {"ephemeral_5m_input_tokens": 1, "ephemeral_1h_input_tokens": 2},
        "cache_read_input_tokens": 20,
        "server_tool_use": {"web_search_requests": 4, "web_fetch_requests": 7, "dream_requests": 1},
        "output_tokens": 30,
        "output_tokens_details": {"thinking_tokens": 12},
    },
}


def event(**told: Any) -> ServerEvent:
    return ServerEvent(json.dumps(told), told["type"])


def block(index: int, start: dict[str, Any], *deltas: dict[str, Any]) -> list[ServerEvent]:
    return [
        event(type="content_block_start", index=index, content_block=start),
        *(event(type="content_block_delta", index=index, delta=delta) for delta in deltas),
        event(type="content_block_stop", index=index),
    ]


def words(text: str) -> dict[str, Any]:
    return {"type": "text_delta", "text": text}


def arguments(text: str) -> dict[str, Any]:
    return {"type": "input_json_delta", "partial_json": text}


START = event(
    type="message_start",
    message={**WHOLE, "content": [], "stop_reason": None, "usage": {**WHOLE["usage"], "output_tokens": 1}},
)
END = event(type="message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None}, usage=WHOLE["usage"])
STOP = event(type="message_stop")
STREAM = [
    START,
    event(type="ping"),
    *block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "H"},
        {"type": "thinking_delta", "thinking": "m."},
        {"type": "signature_delta", "signature": "EqQB"},
    ),
    *block(1, {"type": "redacted_thinking", "data": "EmwK"}),
    *block(2, SEARCH | {"input": {}}, arguments(""), arguments('{"query"'), arguments(': "q"}')),
    *block(3, FOUND),
    *block(4, {"type": "text", "text": ""}, words("It "), words("is ")),
    *block(
        5, {"type": "text", "text": "", "citations": []}, words("so."), {"type": "citations_delta", "citation": CITED}
    ),
    *block(
        6,
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}},
        arguments('{"a":'),
        arguments('[1,"\u00f6"]}'),
    ),
    *block(
        7, {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}, "caller": {"type": "direct"}}, arguments("")
    ),
    END,
    STOP,
]


def told(*events: ServerEvent) -> list[Event]:
    decoder = CODEC.decoder(QUIRKS)
    return [made for given in events for made in decoder.feed(given)] + decoder.finish()


def built(events: list[Event]) -> Reply:
    builder = ReplyBuilder()
    for made in events:
        builder.add(made)
    return builder.reply()


def failure(*events: ServerEvent) -> FailureKind:
    with pytest.raises(ProviderFailure) as caught:
        told(*events)
    return caught.value.failure.kind


def test_a_whole_answer() -> None:
    reply = CODEC.reply(WHOLE, QUIRKS)
    assert reply.began == Began("msg_1", "claude-opus-5")
    assert reply.ended == Ended("tool_calls", "tool_use")
    assert reply.usage == Usage(
        input_tokens=33,
        output_tokens=30,
        cache_read_tokens=20,
        cache_write_tokens=3,
        reasoning_tokens=12,
        cache_write_1h_tokens=2,
        web_searches=4,
        other_tools=1,
    )
    assert reply.message.parts == (
        ReasoningPart("Hm.", "EqQB"),
        ReasoningPart("EmwK", is_redacted=True, provider_data={"anthropic": {"blocks": [SEARCH, FOUND]}}),
        Text("It is "),
        Text("so.", {"anthropic": {"citations": [CITED]}}),
        ToolCall(id="toolu_1", name="f", arguments={"a": [1, "\u00f6"]}, text='{"a":[1,"\u00f6"]}'),
        ToolCall(
            id="toolu_2",
            name="g",
            arguments={},
            text="{}",
            provider_data={"anthropic": {"caller": {"type": "direct"}}},
        ),
    )


def test_a_stream_says_the_same() -> None:
    events = told(*STREAM)
    assert built(events) == CODEC.reply(WHOLE, QUIRKS)
    assert events[:2] == [
        Began("msg_1", "claude-opus-5"),
        replace(built(events).usage, output_tokens=None, reasoning_tokens=None),
    ]
    assert events[2:5] == [Reasoning("H"), Reasoning("m."), Signature("EqQB")]
    at = events.index(CallBegin(0, "f", "toolu_1"))
    assert events[at + 1 : at + 4] == [CallArguments(0, '{"a":'), CallArguments(0, '[1,"\u00f6"]}'), CallEnd(0)]
    assert [type(made) for made in events[-2:]] == [Usage, Ended]


def test_what_came_goes_back_as_it_came() -> None:
    request = ChatRequest.model_construct(**{name: field.default for name, field in ChatRequest.model_fields.items()})
    messages = (
        Message(role="user", parts=(Text("a"),)),
        CODEC.reply(WHOLE, QUIRKS).message,
        Message(role="user", parts=(Text("b"),)),
    )
    sent = CODEC.encode(
        request.model_copy(update={"messages": messages}), model="claude-opus-5", stream=False, quirks=QUIRKS
    )
    assert sent.body["messages"][1]["content"] == WHOLE["content"]


@pytest.mark.parametrize(
    ("native", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("something_new", "stop"),
    ],
)
def test_how_an_answer_ends(native: str, finish: str) -> None:
    body = {**WHOLE, "content": [{"type": "text", "text": "a"}], "stop_reason": native, "stop_sequence": "x"}
    assert CODEC.reply(body, QUIRKS).ended == Ended(finish, native, "x")  # type: ignore[arg-type]
    end = event(type="message_delta", delta={"stop_reason": native, "stop_sequence": "x"}, usage={"output_tokens": 2})
    assert told(START, end, STOP)[-1] == Ended(finish, native, "x")  # type: ignore[arg-type]


def test_a_call_that_begins_twice_is_one() -> None:
    begin, *rest = block(0, {"type": "tool_use", "id": "t", "name": "f", "input": {}}, arguments("{}"))
    events = told(START, START, begin, begin, *rest, rest[-1], END, END, STOP, STOP)
    assert events[2:5] == [CallBegin(0, "f", "t"), CallArguments(0, "{}"), CallEnd(0)]
    assert len(events) == 7


def test_why_an_answer_was_refused_is_kept() -> None:
    details = {"type": "refusal", "category": "bio", "explanation": "no"}
    end = event(
        type="message_delta", delta={"stop_reason": "refusal", "stop_details": details}, usage={"output_tokens": 2}
    )
    assert Extras("anthropic", {"stop_details": details}) in told(START, end, STOP)


def test_third_parties_leave_things_out() -> None:
    """No message_start, no beginnings of texts, no ends of blocks, no message_stop, usage at the end alone."""
    events = told(
        event(type="content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "h"}),
        event(type="content_block_delta", index=1, delta=words("a")),
        event(
            type="content_block_start", index=2, content_block={"type": "tool_use", "id": "t", "name": "f", "input": {}}
        ),
        event(type="content_block_delta", index=2, delta=arguments("{}")),
        event(type="message_delta", delta={"stop_reason": "tool_use"}, usage={"input_tokens": 4, "output_tokens": 5}),
    )
    assert events == [
        Began(),
        Reasoning("h"),
        Content("a"),
        CallBegin(0, "f", "t"),
        CallArguments(0, "{}"),
        CallEnd(0),
        Usage(input_tokens=4, output_tokens=5),
        Ended("tool_calls", "tool_use"),
    ]


def test_events_that_are_not_known_are_passed_over_and_counted() -> None:
    decoder = CODEC.decoder(QUIRKS)
    given = [
        START,
        START,
        ServerEvent("{", ""),
        ServerEvent("[1]", ""),
        event(type="news"),
        event(type="ping"),
        END,
        STOP,
    ]
    assert [type(made) for one in [*given, STOP] for made in decoder.feed(one)] == [Began, Usage, Usage, Ended]
    assert decoder.skipped == 5
    assert decoder.finish() == []


def test_an_answer_that_breaks_off_is_a_failure() -> None:
    assert failure() is FailureKind.SERVER
    assert failure(START, *block(0, {"type": "text", "text": "a"})) is FailureKind.SERVER
    assert failure(START, event(type="content_block_delta", index=0, delta=arguments("{"))) is FailureKind.SERVER
    call = event(type="content_block_start", index=0, content_block={"type": "tool_use", "id": "t", "name": "f"})
    assert failure(START, call, ServerEvent('{"type": "content_block_delta", "del')) is FailureKind.SERVER
    for body in ({}, {"content": "x"}, {"content": [1]}, {"type": "message"}):
        with pytest.raises(ProviderFailure) as caught:
            CODEC.reply(body, QUIRKS)
        assert caught.value.failure.kind is FailureKind.SERVER


def test_an_error_within_an_answer() -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    assert failure(START, ServerEvent(json.dumps(error), "error")) is FailureKind.OVERLOADED
    assert (
        failure(ServerEvent(json.dumps({"error": {"type": "rate_limit_error", "message": "x"}})))
        is FailureKind.RATE_LIMITED
    )
    with pytest.raises(ProviderFailure) as caught:
        CODEC.reply(error, QUIRKS)
    assert (caught.value.failure.kind, caught.value.failure.code) == (FailureKind.OVERLOADED, "overloaded_error")


@pytest.mark.parametrize(
    ("status", "kind", "message", "wanted"),
    [
        (400, "invalid_request_error", "messages: Field required", FailureKind.BAD_REQUEST),
        (
            400,
            "invalid_request_error",
            "prompt is too long: 208310 tokens > 200000 maximum",
            FailureKind.CONTEXT_LENGTH,
        ),
        (
            400,
            "invalid_request_error",
            "input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000",
            FailureKind.CONTEXT_LENGTH,
        ),
        (
            400,
            "invalid_request_error",
            "Your credit balance is too low to access the Anthropic API.",
            FailureKind.QUOTA,
        ),
        (400, "invalid_request_error", "You have reached your specified API usage limits.", FailureKind.QUOTA),
        (400, "invalid_request_error", "Output blocked by content filtering policy", FailureKind.CONTENT_POLICY),
        (
            400,
            "invalid_request_error",
            "This model does not support assistant message prefill. The conversation must end with a user message.",
            FailureKind.UNSUPPORTED,
        ),
        (
            400,
            "invalid_request_error",
            '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive"',
            FailureKind.UNSUPPORTED,
        ),
        (401, "authentication_error", "invalid x-api-key", FailureKind.AUTH),
        (402, "billing_error", "pay", FailureKind.QUOTA),
        (403, "permission_error", "no", FailureKind.AUTH),
        (404, "not_found_error", "model: claude-9", FailureKind.NOT_FOUND),
        (413, "request_too_large", "Request exceeds the maximum size", FailureKind.BAD_REQUEST),
        (429, "rate_limit_error", "slow down", FailureKind.RATE_LIMITED),
        (500, "api_error", "Internal server error", FailureKind.SERVER),
        (504, "timeout_error", "late", FailureKind.SERVER),
        (529, "overloaded_error", "Overloaded", FailureKind.OVERLOADED),
        (502, "overloaded_error", "behind a proxy", FailureKind.OVERLOADED),
    ],
)
def test_errors_by_status_type_and_words(status: int, kind: str, message: str, wanted: FailureKind) -> None:
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    failed = CODEC.failure(status, {"retry-after": "7"}, json.dumps(body).encode())
    assert (failed.kind, failed.status, failed.code) == (wanted, status, kind)
    assert failed.message == message
    assert failed.retry_after_s == (7 if wanted in WAITING else None)


def test_errors_that_are_not_the_formats() -> None:
    for body in (b"", b"\x1f\x8b\x00rubbish", b"<html><body>Bad gateway</body></html>", b'"text"', b"[" * 100_000):
        failed = CODEC.failure(502, {}, body)
        assert (failed.kind, failed.status) == (FailureKind.SERVER, 502)
        assert 0 < len(failed.message) < 410
    assert CODEC.failure(404, {}, b'{"detail": "Not Found"}').message == "Not Found"
    assert CODEC.failure(400, {}, b'{"error": "words"}').message == "words"
    dated = {"retry-after": "Mon, 23 Nov 2026 10:00:30 GMT", "date": "Mon, 23 Nov 2026 10:00:00 GMT"}
    assert CODEC.failure(429, dated, b"").retry_after_s == 30
    assert CODEC.failure(429, {"retry-after-ms": "1500", "retry-after": "9"}, b"").retry_after_s == 1.5


def test_messages_of_errors_are_short_and_hold_no_keys() -> None:
    secret = "sk-ant-api03-" + "aB3_" * 20
    body = {"error": {"type": "authentication_error", "message": f"bad\nkey {secret} in Bearer abc " + "x " * 500}}
    failed = CODEC.failure(401, {}, json.dumps(body).encode())
    assert "sk-ant" not in failed.message
    assert "Bearer abc" not in failed.message
    assert failed.message.startswith("bad key [key] in [key] x x")
    assert len(failed.message) < 410

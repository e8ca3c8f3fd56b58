"""Converse's answers and streams, from fixtures made by hand from its documentation.

Guards against usage that comes behind the end and is lost, texts that begin without saying so, exceptions midway.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Extras, Reasoning, Signature
from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.messages import Message, Text, ToolCall
from diptych.protos.messages import Reasoning as ReasoningPart
from diptych.protos.openai import ChatRequest
from diptych.protos.providers.aws_stream import AwsEventStream, encoded_event
from diptych.protos.providers.bedrock import ConverseCodec
from diptych.protos.providers.codec import Codec, ServerEvent
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Began, Ended, Event, Reply, ReplyBuilder, Usage

CODEC: Codec = ConverseCodec()
WAITING = (FailureKind.RATE_LIMITED, FailureKind.OVERLOADED, FailureKind.QUOTA, FailureKind.SERVER)
QUIRKS = Quirks(family="bedrock")
CITATION = {"title": "t", "location": {"web": {"url": "https://a.b"}}}
SERVED = {"toolUse": {"toolUseId": "s", "name": "nova_grounding", "input": {"q": 1}, "type": "server_tool_use"}}
FOUND = {"toolResult": {"toolUseId": "s", "type": "nova_grounding_result", "content": [{"json": {"a": 1}}]}}
COUNTS = {
    "inputTokens": 10,
    "outputTokens": 30,
    "totalTokens": 63,
    "cacheReadInputTokens": 20,
    "cacheWriteInputTokens": 3,
    "cacheDetails": [{"ttl": "1h", "inputTokens": 2}, {"ttl": "5m", "inputTokens": 1}],
}
TRACE = {"guardrail": {"actionReason": "no"}}
WHOLE: dict[str, Any] = {
    "output": {
        "message": {
            "role": "assistant",
            "content": [
                {"reasoningContent": {"reasoningText": {"text": "Hm.", "signature": "EqQB"}}},
                {"reasoningContent": {"redactedContent": "EmwK"}},
                SERVED,
                FOUND,
                {"text": "It is "},
                {"citationsContent": {"content": [{"text": "so."}], "citations": [CITATION]}},
                {"toolUse": {"toolUseId": "t1", "name": "f", "input": {"a": [1, "\u00f6"]}}},
                {"toolUse": {"toolUseId": "t2", "name": "g", "input": {}}},
            ],
        }
    },
    "stopReason": "tool_use",
    "usage": COUNTS,
    "metrics": {"latencyMs": 5},
    "trace": TRACE,
}


def event(kind: str, **told: Any) -> ServerEvent:
    return ServerEvent(json.dumps({**told, "p": "abcdef"}), kind)  # `p` pads each event against listeners


def start(index: int, **told: Any) -> ServerEvent:
    return event("contentBlockStart", start=told, contentBlockIndex=index)


def delta(index: int, **told: Any) -> ServerEvent:
    return event("contentBlockDelta", delta=told, contentBlockIndex=index)


def stop(index: int) -> ServerEvent:
    return event("contentBlockStop", contentBlockIndex=index)


END = [
    event("messageStop", stopReason="tool_use"),
    event("metadata", usage=COUNTS, metrics={"latencyMs": 1}, trace=TRACE),
]
STREAM = [
    event("messageStart", role="assistant"),
    delta(0, reasoningContent={"text": "H"}),
    delta(0, reasoningContent={"text": "m."}),
    delta(0, reasoningContent={"signature": "EqQB"}),
    stop(0),
    delta(1, reasoningContent={"redactedContent": "EmwK"}),
    stop(1),
    start(2, toolUse={"toolUseId": "s", "name": "nova_grounding", "type": "server_tool_use"}),
    delta(2, toolUse={"input": '{"q":'}),
    delta(2, toolUse={"input": "1}"}),
    stop(2),
    start(3, toolResult={"toolUseId": "s", "type": "nova_grounding_result"}),
    delta(3, toolResult=[{"json": {"a": 1}}]),
    stop(3),
    delta(4, text="It "),
    delta(4, text="is "),
    stop(4),
    delta(5, text="so."),
    delta(5, citation=CITATION),
    stop(5),
    start(6, toolUse={"toolUseId": "t1", "name": "f"}),
    delta(6, toolUse={"input": '{"a":'}),
    delta(6, toolUse={"input": '[1,"\u00f6"]}'}),
    stop(6),
    start(7, toolUse={"toolUseId": "t2", "name": "g"}),
    delta(7, toolUse={"input": ""}),
    stop(7),
    *END,
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


def test_a_streamed_picture_is_kept_as_a_whole_one_is() -> None:
    """Its pieces were passed over, and nothing told of it."""
    words = [delta(0, text="Here."), stop(0)]
    pieces = [start(1, image={"format": "png"}), delta(1, image={"source": {"bytes": "iVA="}})]
    over = event("messageStop", stopReason="end_turn")
    reply = built(told(*words, *pieces, delta(1, image={"source": {"bytes": "TkcNCg=="}}), stop(1), over))
    picture = {"image": {"format": "png", "source": {"bytes": "iVBORw0K"}}}
    assert reply.message.parts == (Text("Here.", {"bedrock": {"blocks": [picture]}}),)
    body = {"output": {"message": {"role": "assistant", "content": [{"text": "Here."}, picture]}}}
    assert CODEC.reply({**body, "stopReason": "end_turn"}, QUIRKS).message == reply.message
    elsewhere = {"s3Location": {"uri": "s3://b/a.png"}}
    failed = delta(1, image={"error": {"message": "no"}})
    reply = built(told(*words, delta(1, image={"source": elsewhere}), failed, over))
    kept = {"image": {"source": elsewhere, "error": {"message": "no"}}}
    assert reply.message.parts[0] == Text("Here.", {"bedrock": {"blocks": [kept]}})
    assert failure(delta(1, image={"source": {"bytes": "?"}})) is FailureKind.SERVER


def test_a_whole_answer() -> None:
    reply = CODEC.reply(WHOLE, QUIRKS)
    assert reply.ended == Ended("tool_calls", "tool_use")
    assert reply.usage == Usage(
        input_tokens=33, output_tokens=30, cache_read_tokens=20, cache_write_tokens=3, cache_write_1h_tokens=2
    )
    assert reply.message.parts == (
        ReasoningPart("Hm.", "EqQB"),
        ReasoningPart("EmwK", is_redacted=True, provider_data={"bedrock": {"blocks": [SERVED, FOUND]}}),
        Text("It is "),
        Text("so.", {"bedrock": {"citations": [CITATION]}}),
        ToolCall(id="t1", name="f", arguments={"a": [1, "\u00f6"]}, text='{"a":[1,"\u00f6"]}'),
        ToolCall(id="t2", name="g", arguments={}, text="{}", provider_data={"bedrock": {"trace": TRACE}}),
    )


def test_a_stream_says_the_same() -> None:
    events = told(*STREAM)
    assert built(events) == CODEC.reply(WHOLE, QUIRKS)
    assert events[:4] == [Began(), Reasoning("H"), Reasoning("m."), Signature("EqQB")]
    at = events.index(CallBegin(0, "f", "t1"))
    assert events[at + 1 : at + 4] == [CallArguments(0, '{"a":'), CallArguments(0, '[1,"\u00f6"]}'), CallEnd(0)]
    assert [type(made) for made in events[-2:]] == [Usage, Ended]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4000), max_size=6))
def test_bytes_in_any_pieces_are_the_same(cuts: list[int]) -> None:
    sent = b"".join(encoded_event(one.event, one.data.encode()) for one in STREAM)
    ends = sorted(min(cut, len(sent)) for cut in cuts)
    framing, decoder = AwsEventStream(), CODEC.decoder(QUIRKS)
    found: list[Event] = []
    for first, last in zip([0, *ends], [*ends, len(sent)], strict=True):
        for one in framing.feed(sent[first:last]):
            found += decoder.feed(one)
    assert found + decoder.finish() == told(*STREAM)


def test_what_came_goes_back_as_it_came() -> None:
    user = Message(role="user", parts=(Text("a"),))
    messages = (user, CODEC.reply(WHOLE, QUIRKS).message, user)
    request = ChatRequest.model_construct(messages=messages, model="m")
    sent = CODEC.encode(request, model="anthropic.claude-opus-4-6-v1", stream=False, quirks=QUIRKS)
    assert sent.body["messages"][1] == WHOLE["output"]["message"]


@pytest.mark.parametrize(
    ("native", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("guardrail_intervened", "content_filter"),
        ("content_filtered", "content_filter"),
        ("something_new", "stop"),
    ],
)
def test_how_an_answer_ends(native: str, finish: str) -> None:
    told_of_stop = {"stopReason": native, "additionalModelResponseFields": {"stop_sequence": "x"}}
    ended = Ended(finish, native, "x")  # type: ignore[arg-type]
    body = {"output": {"message": {"role": "assistant", "content": [{"text": "a"}]}}, **told_of_stop}
    assert CODEC.reply(body, QUIRKS).ended == ended
    assert told(delta(0, text="a"), event("messageStop", **told_of_stop)) == [Began(), Content("a"), Usage(), ended]


def test_a_call_that_begins_twice_is_one() -> None:
    begin = start(0, toolUse={"toolUseId": "t", "name": "f"})
    events = told(begin, begin, delta(0, toolUse={"input": "{}"}), stop(0), stop(0), *END[:1])
    assert events[1:4] == [CallBegin(0, "f", "t"), CallArguments(0, "{}"), CallEnd(0)]


def test_texts_of_two_blocks_are_two_parts() -> None:
    events = told(delta(0, text="a"), stop(0), delta(1, text="b"), *END[:1])
    assert events[1:4] == [Content("a"), Extras(""), Content("b")]
    assert list(built(events).message.parts) == [Text("a"), Text("b")]


def test_an_answer_that_breaks_off_is_a_failure() -> None:
    assert failure() is FailureKind.SERVER
    assert failure(delta(0, text="a")) is FailureKind.SERVER
    assert failure(delta(0, toolUse={"input": "{"})) is FailureKind.SERVER
    assert (
        failure(start(0, toolUse={"toolUseId": "t", "name": "f"}), ServerEvent("{", "contentBlockDelta"))
        is FailureKind.SERVER
    )
    assert failure(event("messageStop", stopReason="malformed_tool_use")) is FailureKind.SERVER
    for body in (
        {},
        {"output": 1},
        {"output": {"message": {"content": [1]}}},
        {**WHOLE, "stopReason": "malformed_model_output"},
    ):
        with pytest.raises(ProviderFailure):
            CODEC.reply(body, QUIRKS)


def test_events_that_are_not_known_are_passed_over_and_counted() -> None:
    decoder = CODEC.decoder(QUIRKS)
    given = [ServerEvent("{", ""), event("news"), delta(0, hologram={"a": 1}), *END, *END]
    assert [type(made) for one in given for made in decoder.feed(one)] == [Began, Extras, Usage, Ended]
    assert decoder.skipped == 5


@pytest.mark.parametrize(
    ("kind", "message", "wanted"),
    [
        ("throttlingException", "slow down", FailureKind.RATE_LIMITED),
        ("serviceUnavailableException", "", FailureKind.OVERLOADED),
        ("modelStreamErrorException", "bad", FailureKind.SERVER),
        ("internalServerException", "bad", FailureKind.SERVER),
        ("validationException", "Input is too long for requested model.", FailureKind.CONTEXT_LENGTH),
        ("validationException", "bad", FailureKind.BAD_REQUEST),
        ("newException", "bad", FailureKind.SERVER),
        ("error", "bad", FailureKind.SERVER),
    ],
)
def test_exceptions_amid_a_stream(kind: str, message: str, wanted: FailureKind) -> None:
    assert failure(delta(0, text="a"), event(kind, message=message)) is wanted
    assert failure(ServerEvent("", "throttlingException")) is FailureKind.RATE_LIMITED


@pytest.mark.parametrize(
    ("status", "kind", "message", "wanted"),
    [
        (400, "ValidationException", "malformed", FailureKind.BAD_REQUEST),
        (
            400,
            "ValidationException",
            "The model returned the following errors: prompt is too long: 200049 tokens > 200000 maximum",
            FailureKind.CONTEXT_LENGTH,
        ),
        (400, "ValidationException", "Too many input tokens. Max input tokens: 8192", FailureKind.CONTEXT_LENGTH),
        (400, "ValidationException", "The provided model identifier is invalid.", FailureKind.NOT_FOUND),
        (
            400,
            "ValidationException",
            "Invocation of model ID x with on-demand throughput isn\u2019t supported.",
            FailureKind.NOT_FOUND,
        ),
        (400, "ValidationException", "This model doesn't support tool use.", FailureKind.UNSUPPORTED),
        (400, "ServiceQuotaExceededException", "quota", FailureKind.QUOTA),
        (403, "AccessDeniedException", "You don't have access to the model", FailureKind.AUTH),
        (403, "UnrecognizedClientException", "The security token is invalid", FailureKind.AUTH),
        (404, "ResourceNotFoundException", "gone", FailureKind.NOT_FOUND),
        (408, "ModelTimeoutException", "late", FailureKind.SERVER),
        (424, "ModelErrorException", "bad", FailureKind.SERVER),
        (429, "ThrottlingException", "Too many requests", FailureKind.RATE_LIMITED),
        (429, "ThrottlingException", "Too many tokens per day, please wait", FailureKind.QUOTA),
        (429, "ModelNotReadyException", "not yet", FailureKind.OVERLOADED),
        (500, "InternalServerException", "bad", FailureKind.SERVER),
        (503, "ServiceUnavailableException", "busy", FailureKind.OVERLOADED),
    ],
)
def test_errors_by_type_and_words(status: int, kind: str, message: str, wanted: FailureKind) -> None:
    body = json.dumps({"message": message}).encode()
    failed = CODEC.failure(
        status, {"x-amzn-errortype": f"{kind}:http://internal.amazon.com/", "retry-after": "2"}, body
    )
    assert (failed.kind, failed.status, failed.code, failed.message) == (wanted, status, kind, message)
    assert failed.retry_after_s == (2 if wanted in WAITING else None)
    inner = json.dumps({"__type": f"com.amazon.coral.service#{kind}", "Message": message}).encode()
    assert CODEC.failure(status, {}, inner).kind is wanted


def test_errors_that_are_not_the_formats() -> None:
    for body in (b"", b"<html>", b"[]", b"\xff"):
        failed = CODEC.failure(503, {}, body)
        assert (failed.kind, failed.status) == (FailureKind.OVERLOADED, 503)
        assert failed.message
    with pytest.raises(ProviderFailure) as caught:
        CODEC.reply({"__type": "ThrottlingException", "message": "slow"}, QUIRKS)
    assert caught.value.failure.kind is FailureKind.RATE_LIMITED

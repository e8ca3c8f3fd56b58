"""Gemini's answers, streams and errors: what they become, whatever pieces they come in.

Guards against a signature that is lost, thoughts counted twice or not at all, calls without an id or with one that
changes, an answer that was filtered or broken and looks whole, and a limit of a day that is taken for one of a minute.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.protos.deltas import Content, Reasoning
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.messages import Message, Text, ToolCall, ToolResult
from diptych.protos.openai import parse_chat
from diptych.protos.providers.codec import ServerEvent
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.event_stream import EventStream
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Began, Ended, Event, Reply, ReplyBuilder, Usage

CODEC = by_name("gemini.generate")
GOOGLE = Quirks(family="google")
USAGE = {
    "promptTokenCount": 20,
    "candidatesTokenCount": 7,
    "thoughtsTokenCount": 30,
    "toolUsePromptTokenCount": 2,
    "cachedContentTokenCount": 16,
    "totalTokenCount": 59,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 15}, {"modality": "AUDIO", "tokenCount": 5}],
}


def chunk(*parts: Any, reason: str = "", usage: Any = None, **more: Any) -> dict[str, Any]:
    candidate: dict[str, Any] = {"index": 0, **more}
    if parts:
        candidate["content"] = {"role": "model", "parts": list(parts)}
    if reason:
        candidate["finishReason"] = reason
    told = {"candidates": [candidate], "modelVersion": "gemini-3.5-flash", "responseId": "r1"}
    return told | ({"usageMetadata": usage} if usage else {})


THOUGHT = {"text": "Two cities.", "thought": True}
CALL = {"functionCall": {"name": "weather", "args": {"city": "Oslo"}}, "thoughtSignature": "c2ln"}
OTHER = {"functionCall": {"name": "weather", "args": {"city": "Rom"}, "id": "own"}}
CODE = {"executableCode": {"language": "PYTHON", "code": "1+1"}}
SEAL = {"text": "", "thoughtSignature": "ZW5k"}
STREAM = [
    chunk({"text": "Two ", "thought": True}, usage={"promptTokenCount": 20, "thoughtsTokenCount": 9}),
    chunk({"text": "cities.", "thought": True}),
    chunk({"text": "I "}, {"text": "ask."}),
    chunk(CODE),
    chunk(CALL, OTHER),
    chunk(SEAL, reason="STOP", usage=USAGE),
]
WHOLE = chunk(THOUGHT, {"text": "I ask."}, CODE, CALL, OTHER, SEAL, reason="STOP", usage=USAGE)


def whole(body: dict[str, Any]) -> Reply:
    return CODEC.reply(body, GOOGLE)


def decoded(*chunks: Any, ends: bool = True) -> list[Event]:
    decoder = CODEC.decoder(GOOGLE)
    events = [event for told in chunks for event in decoder.feed(ServerEvent(json.dumps(told)))]
    return events + (decoder.finish() if ends else [])


def built(events: list[Event]) -> Reply:
    builder = ReplyBuilder()
    for event in events:
        builder.add(event)
    return builder.reply()


def test_a_whole_answer() -> None:
    reply = whole(WHOLE)
    _, text, first, second = reply.message.parts
    assert (reply.message.reasoning_content, reply.message.content) == ("Two cities.", "I ask.")
    assert isinstance(first, ToolCall)
    assert isinstance(second, ToolCall)
    assert isinstance(text, Text)
    assert text.provider_data == {"google": {"after": [CODE]}}
    assert (first.name, first.arguments, first.provider_data) == (
        "weather",
        {"city": "Oslo"},
        {"google": {"thoughtSignature": "c2ln"}},
    )
    assert (second.id, second.provider_data) == ("own", {"google": {"after": [SEAL]}})
    assert reply.ended == Ended("tool_calls", "STOP")
    assert reply.began == Began("r1", "gemini-3.5-flash")
    assert reply.usage == Usage(
        input_tokens=22, output_tokens=37, cache_read_tokens=16, reasoning_tokens=30, input_audio_tokens=5
    )


def test_a_stream_is_the_same_answer_and_ends_once() -> None:
    events = decoded(*STREAM)
    assert built(events) == whole(WHOLE)
    assert (events[0], events[-1]) == (Began("r1", "gemini-3.5-flash"), Ended("tool_calls", "STOP"))
    assert sum(isinstance(event, Ended | Began) for event in events) == 2
    assert built(whole(WHOLE).events()) == whole(WHOLE)


def test_a_call_without_an_id_gets_one_that_lasts() -> None:
    """Read again, the same call has the same id; a call of another answer has another one."""
    first = whole(WHOLE).message.tool_calls[0].id
    assert first.startswith("call_")
    assert (
        first == whole(WHOLE).message.tool_calls[0].id != whole(WHOLE | {"responseId": "r2"}).message.tool_calls[0].id
    )


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_pieces_of_the_bytes_give_the_same_events(data: st.DataObject) -> None:
    text = "".join(f"data: {json.dumps(told)}\r\n\r\n" for told in STREAM).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    stream, decoder = EventStream(), CODEC.decoder(GOOGLE)
    events: list[Event] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        for event in stream.feed(text[start:end]):
            events += decoder.feed(event)
    assert events + decoder.finish() == decoded(*STREAM)


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("CONTINUATION", "length"),
        ("SAFETY", "content_filter"),
        ("RECITATION", "content_filter"),
        ("PROHIBITED_CONTENT", "content_filter"),
        ("SPII", "content_filter"),
        ("OTHER", "stop"),
        ("SOMETHING_NEW", "stop"),
    ],
)
def test_finish_reasons(reason: str, finish: str) -> None:
    assert decoded(chunk({"text": "a"}, reason=reason))[-1] == Ended(finish, reason)  # type: ignore[arg-type]


def test_an_answer_ends_with_its_stream_and_not_at_the_first_word_of_an_end() -> None:
    """Every chunk of older models says STOP: who believed the first one told half an answer. The last word counts."""
    said = [chunk({"text": text}, reason="STOP") for text in ("one, ", "two, ")]
    events = decoded(*said, chunk({"text": "three"}, reason="MAX_TOKENS"))
    assert built(events).message.content == "one, two, three"
    assert [event for event in events if isinstance(event, Ended)] == [Ended("length", "MAX_TOKENS")]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (chunk(reason="MALFORMED_FUNCTION_CALL", finishMessage="Malformed: f("), FailureKind.SERVER),
        (chunk({"text": "a"}, reason="UNEXPECTED_TOOL_CALL"), FailureKind.SERVER),
        (chunk(reason="OTHER"), FailureKind.SERVER),
        (chunk(reason="IMAGE_OTHER"), FailureKind.SERVER),
        (chunk(reason="MISSING_THOUGHT_SIGNATURE"), FailureKind.UNSUPPORTED),
        (chunk({"text": "a"}), FailureKind.SERVER),
        ({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}, FailureKind.CONTENT_POLICY),
        ({"candidates": [], "usageMetadata": USAGE}, FailureKind.SERVER),
        ({}, FailureKind.SERVER),
        ({"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}, FailureKind.OVERLOADED),
        (chunk({"functionCall": {"name": "f", "willContinue": True}}, reason="STOP"), FailureKind.SERVER),
    ],
)
def test_an_answer_that_is_none_is_a_failure(body: dict[str, Any], kind: FailureKind) -> None:
    """Whole and streamed."""
    with pytest.raises(ProviderFailure) as told:
        whole(body)
    assert told.value.failure.kind is kind
    with pytest.raises(ProviderFailure) as streamed:
        decoded(body)
    assert streamed.value.failure.kind is kind


def test_an_answer_that_the_filter_left_empty_or_that_thinking_used_up_is_told_as_it_is() -> None:
    assert built(decoded(chunk(reason="SAFETY"))).ended == Ended("content_filter", "SAFETY")
    assert whole(chunk(reason="MAX_TOKENS", usage=USAGE)).ended == Ended("length", "MAX_TOKENS")


def test_an_error_in_the_midst_of_a_stream_and_lines_that_are_no_json() -> None:
    decoder = CODEC.decoder(GOOGLE)
    assert decoder.feed(ServerEvent(json.dumps(STREAM[2])))[1:3] == [Content("I "), Content("ask.")]
    assert decoder.feed(ServerEvent('{"candidates": [')) == []
    assert decoder.feed(ServerEvent("[DONE]")) == []
    assert decoder.skipped == 1
    error = {"error": {"code": 429, "message": "slow down", "status": "RESOURCE_EXHAUSTED"}}
    with pytest.raises(ProviderFailure) as told:
        decoder.feed(ServerEvent(json.dumps(error)))
    assert told.value.failure.kind is FailureKind.RATE_LIMITED


def test_a_call_that_was_lost_or_came_twice() -> None:
    """A call that comes again with its id is the same; one in a broken line is never left out in silence."""
    assert built(decoded(*STREAM[:4], chunk(CALL, OTHER), chunk(OTHER), STREAM[5])) == whole(WHOLE)
    with pytest.raises(ProviderFailure, match="no JSON"):
        CODEC.decoder(GOOGLE).feed(ServerEvent(json.dumps(STREAM[4])[:-3]))


def test_sources_are_kept_beside_the_answer() -> None:
    sources = {"groundingChunks": [{"web": {"uri": "https://x.test"}}]}
    reply = whole(chunk({"text": "a"}, reason="STOP", groundingMetadata=sources))
    assert reply.message.parts == (Text("a", {"google": {"groundingMetadata": sources}}),)


def test_reasoning_alone_is_told_as_it_comes() -> None:
    events = decoded(STREAM[0], ends=False)
    assert events[1] == Reasoning("Two ")
    assert events[2] == Usage(input_tokens=20, output_tokens=9, reasoning_tokens=9)


def failure(status: int, message: str, name: str, *details: Any) -> Failure:
    error = {"code": status, "message": message, "status": name, "details": list(details)}
    return CODEC.failure(status, {"retry-after": "9"}, json.dumps({"error": error}).encode())


KEY = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "38.5s"}
PER_DAY = {"violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}
FIELD = {"fieldViolations": [{"field": "contents[0].parts", "description": "must not be empty"}]}
TOO_LONG = "The input token count (2551556) exceeds the maximum number of tokens allowed (1048576)."


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        (failure(400, "API key not valid. Please pass a valid API key.", "INVALID_ARGUMENT", KEY), FailureKind.AUTH),
        (failure(403, "Permission denied.", "PERMISSION_DENIED"), FailureKind.AUTH),
        (failure(400, TOO_LONG, "INVALID_ARGUMENT"), FailureKind.CONTEXT_LENGTH),
        (failure(400, "Request contains an invalid argument.", "INVALID_ARGUMENT", FIELD), FailureKind.BAD_REQUEST),
        (
            failure(400, "Function call is missing a thought_signature in functionCall parts.", "INVALID_ARGUMENT"),
            FailureKind.UNSUPPORTED,
        ),
        (failure(404, "models/x is not found for API version v1beta.", "NOT_FOUND"), FailureKind.NOT_FOUND),
        (failure(429, "Resource has been exhausted.", "RESOURCE_EXHAUSTED", RETRY), FailureKind.RATE_LIMITED),
        (failure(429, "You exceeded your current quota.", "RESOURCE_EXHAUSTED", PER_DAY, RETRY), FailureKind.QUOTA),
        (failure(429, "Your prepayment credits are depleted.", "RESOURCE_EXHAUSTED"), FailureKind.QUOTA),
        (failure(400, "Enable billing on your project.", "FAILED_PRECONDITION"), FailureKind.QUOTA),
        (failure(500, "An internal error has occurred.", "INTERNAL"), FailureKind.SERVER),
        (failure(503, "The model is overloaded.", "UNAVAILABLE"), FailureKind.OVERLOADED),
        (failure(504, "Deadline expired.", "DEADLINE_EXCEEDED"), FailureKind.SERVER),
    ],
)
def test_errors_by_their_words(told: Failure, kind: FailureKind) -> None:
    assert told.kind is kind


def test_what_an_error_says_besides() -> None:
    assert failure(429, "Slow.", "RESOURCE_EXHAUSTED", RETRY).retry_after_s == 9
    assert (
        CODEC.failure(
            429, {}, json.dumps({"error": {"status": "RESOURCE_EXHAUSTED", "details": [RETRY]}}).encode()
        ).retry_after_s
        == 38.5
    )
    assert failure(400, "No.", "INVALID_ARGUMENT", FIELD).param == "contents[0].parts"
    leaky = failure(
        403, "Consumer 'api_key:AIzaSyA1234567890abcdefghijklmnopqrstuv' is suspended.", "PERMISSION_DENIED"
    )
    assert "AIzaSy" not in leaky.message
    listed = CODEC.failure(
        400, {}, json.dumps([{"error": {"code": 400, "message": TOO_LONG, "status": "INVALID_ARGUMENT"}}]).encode()
    )
    assert (listed.kind, listed.code, listed.status) == (FailureKind.CONTEXT_LENGTH, "INVALID_ARGUMENT", 400)


@pytest.mark.parametrize(
    "body", [b"", b"<html><title>502</title>", b"\x1f\x8b\x00\xff", b"[]", b"null", b'{"error": "x"}']
)
def test_errors_that_are_no_google_errors(body: bytes) -> None:
    assert CODEC.failure(502, {}, body).kind is FailureKind.SERVER
    assert CODEC.failure(429, {}, body).kind is FailureKind.RATE_LIMITED


leaves: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just([]) | st.just({}) | st.just([{}])
)


@st.composite
def spoiled(draw: st.DrawFn, value: Any) -> Any:
    """`value` with something else in one place."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(leaves)
    if isinstance(value, list):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(spoiled(value[at])), *value[at + 1 :]]
    name = draw(st.sampled_from(sorted(value)))
    return value | {name: draw(spoiled(value[name]))}


ERROR = {
    "error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED", "details": [RETRY, PER_DAY, FIELD, KEY]}
}


@given(st.lists(st.sampled_from([*STREAM, WHOLE, ERROR]).flatmap(spoiled), max_size=3))
@settings(max_examples=100, deadline=None)
def test_rubbish_raises_nothing_but_a_failure(chunks: list[Any]) -> None:
    for told in chunks:
        CODEC.failure(500, {}, json.dumps(told).encode())
    try:
        events = decoded(*chunks)
    except ProviderFailure:
        return
    built(events)


def test_an_answer_goes_back_as_it_came() -> None:
    """But for its thoughts, which Gemini does not read; calls get the ids by which their results are known."""
    message = whole(WHOLE).message
    asked = parse_chat(b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}')
    calls = message.tool_calls
    results = [
        Message(role="tool", parts=(ToolResult(call_id=call.id, name=call.name, parts=(Text("rain"),)),))
        for call in calls
    ]
    request = asked.model_copy(update={"messages": (*asked.messages, message, *results)})
    body = CODEC.encode(request, model="gemini-3.5-flash", stream=True, quirks=GOOGLE).body
    first, other = json.loads(json.dumps([CALL, OTHER]))
    first["functionCall"]["id"] = calls[0].id
    assert body["contents"][1] == {"role": "model", "parts": [{"text": "I ask."}, CODE, first, other, SEAL]}
    assert [part["functionResponse"]["id"] for part in body["contents"][2]["parts"]] == [call.id for call in calls]


def test_the_fixtures_are_google_answers() -> None:
    types = pytest.importorskip("google.genai.types")
    for told in (WHOLE, *STREAM, {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}):
        types.GenerateContentResponse.model_validate(told)

"""Answers of a provider's /v1/responses, whole and streamed, and its errors: what they become.

Guards against items that come interleaved and make calls that lie in one another, seals and phases that are lost,
text that is told twice by a `done` event or not at all, and an answer that failed or was cut off and looks whole.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Extras, Reasoning, Refusal
from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.messages import Refusal as RefusalPart
from diptych.protos.messages import Text
from diptych.protos.openai import parse_chat
from diptych.protos.providers.codec import ServerEvent
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.event_stream import EventStream
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Began, Ended, Event, Reply, ReplyBuilder, Usage
from diptych.protos.responses_items import ItemIds
from diptych.protos.responses_replies import ResponseWriter

CODEC = by_name("openai.responses")
PLAIN = Quirks(family="openai")
USAGE = {
    "input_tokens": 20,
    "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 4},
    "output_tokens": 37,
    "output_tokens_details": {"reasoning_tokens": 30},
    "total_tokens": 57,
}
THOUGHT: dict[str, Any] = {
    "id": "rs_1",
    "type": "reasoning",
    "summary": [{"type": "summary_text", "text": text} for text in ("First.", "Then.")],
    "encrypted_content": "gAAA",
}
SEARCH = {"id": "ws_1", "type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "q"}}
NOTE = {"type": "url_citation", "url": "https://x.test", "title": "x", "start_index": 0, "end_index": 1}
TEXT = {"type": "output_text", "text": "I look.", "annotations": [NOTE], "logprobs": []}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "phase": "commentary",
    "content": [TEXT],
}


def call(number: int, arguments: str) -> dict[str, Any]:
    head = {"id": f"fc_{number}", "type": "function_call", "status": "completed", "call_id": f"call_{number}"}
    return head | {"name": "weather", "arguments": arguments}


OUTPUT = [THOUGHT, SEARCH, MESSAGE, call(1, '{"city":"Oslo"}'), call(2, '{"city":"Rom"}')]


def body(output: Any = (), status: str = "completed", **more: Any) -> dict[str, Any]:
    told = {"id": "resp_1", "object": "response", "created_at": 1, "model": "gpt-5.5", "status": status}
    settled = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None, "usage": USAGE}
    return told | settled | {"incomplete_details": None, "output": list(output), **more}


def told(kind: str, at: int | None = None, **fields: Any) -> dict[str, Any]:
    where = {} if at is None else {"output_index": at, "item_id": f"item_{at}"}
    return {"type": f"response.{kind}", "sequence_number": 0, **where, **fields}


def pieces(kind: str, at: int, *texts: str, **fields: Any) -> list[dict[str, Any]]:
    return [told(f"{kind}.delta", at, delta=text, **fields) for text in texts]


def added(at: int, item: Any, **blank: Any) -> dict[str, Any]:
    return told("output_item.added", at, item=item | {"status": "in_progress"} | blank)


def done(at: int) -> dict[str, Any]:
    return told("output_item.done", at, item=OUTPUT[at])


SUMMARY = "reasoning_summary_text"
ARGUMENTS = "function_call_arguments"
TALK = [
    told("created", response=body(status="in_progress", usage=None)),
    told("in_progress", response=body(status="in_progress", usage=None)),
    added(0, THOUGHT, summary=[], encrypted_content="part"),
    told("reasoning_summary_part.added", 0, summary_index=0, part={"type": "summary_text", "text": ""}),
    *pieces(SUMMARY, 0, "Fir", "st.", summary_index=0),
    told(f"{SUMMARY}.done", 0, summary_index=0, text="First."),
    *pieces(SUMMARY, 0, "Then.", summary_index=1),
    done(0),
    added(1, SEARCH),
    told("web_search_call.searching", 1),
    done(1),
    added(2, MESSAGE, content=[]),
    told("content_part.added", 2, content_index=0, part=TEXT | {"text": "", "annotations": []}),
    *pieces("output_text", 2, "I ", "look.", content_index=0, logprobs=[]),
    told("output_text.annotation.added", 2, content_index=0, annotation_index=0, annotation=NOTE),
    told("output_text.done", 2, content_index=0, text="I look.", logprobs=[]),
    told("content_part.done", 2, content_index=0, part=TEXT),
    done(2),
]
FIRST = [added(3, OUTPUT[3], arguments=""), *pieces(ARGUMENTS, 3, '{"city":', '"Oslo"}')]
FIRST += [told(f"{ARGUMENTS}.done", 3, arguments='{"city":"Oslo"}', name="weather"), done(3)]
SECOND = [added(4, OUTPUT[4], arguments=""), *pieces(ARGUMENTS, 4, '{"city":"Rom"}'), done(4)]
END = told("completed", response=body(OUTPUT))
STREAM = [*TALK, *FIRST, *SECOND, END]
EVENTS: Any = TypeAdapter(ResponseStreamEvent)


def whole(response: dict[str, Any]) -> Reply:
    return CODEC.reply(response, PLAIN)


def decoded(*events: Any, ends: bool = True) -> list[Event]:
    decoder = CODEC.decoder(PLAIN)
    found = [event for said in events for event in decoder.feed(ServerEvent(json.dumps(said)))]
    return found + (decoder.finish() if ends else [])


def built(events: list[Event]) -> Reply:
    builder = ReplyBuilder()
    for event in events:
        builder.add(event)
    return builder.reply()


def test_a_whole_answer() -> None:
    reply = whole(body(OUTPUT))
    thought, text, first, _ = reply.message.parts
    assert (reply.message.reasoning_content, reply.message.content) == ("First.\n\nThen.", "I look.")
    seal = {name: value for name, value in THOUGHT.items() if name != "type"}
    assert thought.provider_data == {"openai": {"item": seal, "after": [SEARCH]}}  # type: ignore[union-attr]
    head = {"id": "msg_1", "phase": "commentary", "annotations": [NOTE]}
    assert text == Text("I look.", {"openai": {"item": head}})
    assert [(c.id, c.arguments) for c in reply.message.tool_calls] == [
        ("call_1", {"city": "Oslo"}),
        ("call_2", {"city": "Rom"}),
    ]
    assert first.provider_data == {"openai": {"item": {"id": "fc_1"}}}  # type: ignore[union-attr]
    assert (reply.began, reply.ended) == (Began("resp_1", "gpt-5.5"), Ended("tool_calls", "completed"))
    assert reply.usage == Usage(
        input_tokens=20, output_tokens=37, cache_read_tokens=16, cache_write_tokens=4, reasoning_tokens=30
    )


def test_a_stream_is_the_same_answer_piece_by_piece() -> None:
    events = decoded(*STREAM)
    assert built(events) == whole(body(OUTPUT))
    assert events[:4] == [Began("resp_1", "gpt-5.5"), Reasoning("Fir"), Reasoning("st."), Reasoning("\n\n")]
    assert [event for event in events if isinstance(event, Content)] == [Content("I "), Content("look.")]
    assert events[-1] == Ended("tool_calls", "completed")
    assert built(whole(body(OUTPUT)).events()) == whole(body(OUTPUT))


def test_an_answer_goes_back_as_it_came() -> None:
    """In a conversation with the same provider; but for logprobs, which it does not take."""
    asked = parse_chat(b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}')
    messages = (*asked.messages, whole(body(OUTPUT)).message, *asked.messages)
    request = asked.model_copy(update={"messages": messages})
    sent = CODEC.encode(request, model="gpt-5.5", stream=False, quirks=PLAIN).body["input"][1:-1]
    said = MESSAGE | {"content": [{"type": "output_text", "text": "I look.", "annotations": [NOTE]}]}
    calls = [{name: value for name, value in item.items() if name != "status"} for item in OUTPUT[3:]]
    assert sent == [THOUGHT, SEARCH, said, *calls]


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_calls_that_come_interleaved_are_told_one_after_the_other(data: st.DataObject) -> None:
    first, second, mixed = list(FIRST), list(SECOND), [FIRST[0]]
    del first[0]
    while first or second:
        source = first if first and (not second or data.draw(st.booleans())) else second
        mixed.append(source.pop(0))
    events = decoded(*TALK, *mixed, END)
    assert built(events) == whole(body(OUTPUT))
    calls = [event for event in events if isinstance(event, CallBegin | CallArguments | CallEnd)]
    assert [event.index for event in calls] == sorted(event.index for event in calls)


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_any_pieces_of_the_bytes_give_the_same_events(data: st.DataObject) -> None:
    text = "".join(f"event: {said['type']}\ndata: {json.dumps(said)}\n\n" for said in STREAM).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    stream, decoder = EventStream(), CODEC.decoder(PLAIN)
    events: list[Event] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        for event in stream.feed(text[start:end]):
            events += decoder.feed(event)
    assert events + decoder.finish() == decoded(*STREAM)


@pytest.mark.parametrize(
    "events",
    [
        [said for said in STREAM if not said["type"].endswith("delta")],
        [said for said in STREAM if "delta" in said["type"] or "item" in said["type"] or said is END],
        [END],
        [{name: value for name, value in said.items() if name != "output_index"} for said in STREAM[-6:-1]]
        + [told("completed", response=body([]))],
    ],
    ids=["no deltas", "no parts", "the end alone", "no places"],
)
def test_streams_that_say_less(events: list[Any]) -> None:
    """Each piece of the answer is told once, by whatever tells it first."""
    found = built(decoded(*events))
    wanted = whole(body(OUTPUT))
    assert found.message.tool_calls[-1].arguments == {"city": "Rom"}
    if len(events) != 6:
        assert (found.message.content, found.message.reasoning_content) == ("I look.", "First.\n\nThen.")
        assert [c.text for c in found.message.tool_calls] == [c.text for c in wanted.message.tool_calls]
    assert found.ended == wanted.ended


def test_what_this_server_streams_is_read() -> None:
    """Our own writer of /v1/responses, which knows nothing of the decoder."""
    writer = ResponseWriter(body(), ItemIds("resp_" + "0" * 24), seal=lambda text: f"!{text}")
    events = [*writer.created(), *writer.think("hm"), *writer.say("Let "), *writer.say("me."), *writer.call("c1", "f")]
    events += [*writer.argue('{"a":'), *writer.argue("1}"), *writer.end_call()]
    events += writer.finish("completed", use=USAGE, ended_at=2)
    reply = built(decoded(*events))
    assert (reply.message.reasoning_content, reply.message.content) == ("hm", "Let me.")
    assert reply.message.tool_calls[0].arguments == {"a": 1}
    assert reply == whole(writer.body)


def test_refusals_and_reasoning_that_cannot_be_read() -> None:
    hidden = {"id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": "gAAA"}
    refused = MESSAGE | {"content": [{"type": "refusal", "refusal": "No."}]}
    reply = whole(body([hidden, refused]))
    assert reply.message.parts == (RefusalPart("No."),)
    assert reply.message.provider_data == {"openai": {"after": [hidden]}}
    events = decoded(
        *pieces("refusal", 0, "N", "o."), told("refusal.done", 0, refusal="No."), END | {"response": body()}
    )
    assert [event for event in events if isinstance(event, Refusal)] == [Refusal("N"), Refusal("o.")]


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("max_output_tokens", "length"), ("content_filter", "content_filter"), ("something_new", "length")],
)
def test_answers_that_are_not_whole(reason: str, finish: str) -> None:
    cut = body(
        [MESSAGE, call(1, '{"ci') | {"status": "incomplete"}], "incomplete", incomplete_details={"reason": reason}
    )
    assert whole(cut).ended == Ended(finish, reason)  # type: ignore[arg-type]
    open_call = [added(0, call(1, ""), arguments=""), *pieces(ARGUMENTS, 0, '{"ci')]
    events = decoded(*open_call, told("incomplete", response=cut | {"output": []}))
    assert [type(event) for event in events] == [Began, CallBegin, CallArguments, CallEnd, Extras, Usage, Ended]


def failed(code: str, message: str = "m") -> dict[str, Any]:
    return {"code": code, "message": message}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (failed("server_error"), FailureKind.SERVER),
        (failed("rate_limit_exceeded"), FailureKind.RATE_LIMITED),
        (failed("insufficient_quota"), FailureKind.QUOTA),
        (failed("invalid_prompt"), FailureKind.CONTENT_POLICY),
        (failed("image_content_policy_violation"), FailureKind.CONTENT_POLICY),
        (failed("bio_policy"), FailureKind.CONTENT_POLICY),
        (failed("invalid_image_format"), FailureKind.BAD_REQUEST),
        (failed("context_length_exceeded"), FailureKind.CONTEXT_LENGTH),
        (failed("x", "Your input exceeds the context window of this model."), FailureKind.CONTEXT_LENGTH),
        (failed("", ""), FailureKind.SERVER),
    ],
)
def test_errors_within_an_answer(error: dict[str, Any], kind: FailureKind) -> None:
    """In a whole one, as the end of a stream, and in the two shapes of an `error` event."""
    ends = [
        [told("failed", response=body(status="failed", error=error))],
        [{"type": "error", "sequence_number": 1, "param": None, **error}],
        [{"type": "error", "error": {"type": "x", **error}}],
        [{"error": error}],
    ]
    for events in ends:
        with pytest.raises(ProviderFailure) as told_:
            decoded(*TALK, *events)
        assert told_.value.failure.kind is kind
    with pytest.raises(ProviderFailure) as of_whole:
        whole(body(status="failed", error=error))
    assert of_whole.value.failure.kind is kind


def test_streams_and_answers_that_are_none() -> None:
    for events in ([], TALK, [told("cancelled", response=body(status="cancelled"))]):
        with pytest.raises(ProviderFailure) as cut:
            decoded(*events)
        assert cut.value.failure.kind is FailureKind.SERVER
    for response in ({}, {"output": None}, body(status="in_progress"), body(status="cancelled"), {"detail": "x"}):
        with pytest.raises(ProviderFailure):
            whole(response)


def test_a_piece_of_a_call_that_was_lost_or_came_twice() -> None:
    """What can be mended is; arguments with a hole in them never reach a tool."""
    start, first, last, whole_, end = FIRST
    assert built(decoded(*TALK, start, first, end, *SECOND, END)) == whole(body(OUTPUT))
    with pytest.raises(ProviderFailure, match="lost on the way"):
        decoded(*TALK, start, last, end, *SECOND, END)
    numbered = [said | {"sequence_number": number} for number, said in enumerate(STREAM)]
    assert decoded(*(said for said in numbered for _ in range(2))) == decoded(*STREAM)
    assert built(decoded(*TALK, start, first, last, whole_, *SECOND, END)) == whole(body(OUTPUT))


def test_lines_that_are_no_json_are_counted_and_what_is_new_is_passed_over() -> None:
    decoder = CODEC.decoder(PLAIN)
    for data in ('{"type": "resp', "[1]", '{"type": "keepalive"}', "[DONE]"):
        assert decoder.feed(ServerEvent(data)) == []
    assert decoder.skipped == 3
    assert decoder.feed(ServerEvent(json.dumps(told("new.thing")))) == [Began()]
    told_by_name = {name: value for name, value in pieces("output_text", 0, "a")[0].items() if name != "type"}
    assert decoder.feed(ServerEvent(json.dumps(told_by_name), "response.output_text.delta")) == [Content("a")]


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, {"message": "Encrypted content is not supported with this model.", "param": "include"}, "unsupported"),
        (401, {"message": "Incorrect API key provided: sk-abcdefghij0123456789.", "code": "invalid_api_key"}, "auth"),
        (429, {"message": "You exceeded your current quota.", "code": "insufficient_quota"}, "quota"),
        (500, {"message": "The server had an error."}, "server"),
    ],
)
def test_errors_by_their_status(status: int, error: dict[str, Any], kind: str) -> None:
    found = CODEC.failure(status, {"retry-after": "3"}, json.dumps({"error": error}).encode())
    assert (found.kind, found.status) == (kind, status)
    assert "sk-abc" not in found.message


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


@given(st.lists(st.sampled_from(STREAM).flatmap(spoiled) | st.sampled_from(STREAM), max_size=12))
@settings(max_examples=100, deadline=None)
def test_rubbish_raises_nothing_but_a_failure(events: list[Any]) -> None:
    try:
        found = decoded(*events)
        for said in events:
            if isinstance(said, dict) and isinstance(said.get("response"), dict):
                whole(said["response"])
    except ProviderFailure:
        return
    built(found)


def test_the_fixtures_are_openai_answers() -> None:
    Response.model_validate(body(OUTPUT))
    for said in STREAM:
        EVENTS.validate_python(said)

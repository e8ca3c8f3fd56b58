"""Answers in OpenAI's chat format, whole and streamed, with the accents of many providers, as events.

Guards against calls that run into one another or come twice, an answer that broke off and counts as ended, an error
within a stream that is taken for its end, reasoning in a field that nobody reads, tokens that are counted twice.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Extras, Refusal, Structured
from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.messages import Reasoning, Text
from diptych.protos.providers.codec import ServerEvent
from diptych.protos.providers.codecs import CODECS, by_name
from diptych.protos.providers.event_stream import EventStream
from diptych.protos.providers.openai_chat import ChatCodec
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Began, Ended, Event, Reply, ReplyBuilder, Usage

CODEC = ChatCodec()
FAMILY = Quirks(family="fam")


def a_chunk(delta: Any = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {} if delta is None else delta, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m-1", "choices": [choice], **more}


def a_call(
    index: int | None, text: Any = None, name: str | None = None, call_id: str | None = None, **more: Any
) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "function", "function": {}, **more}
    if index is not None:
        entry["index"] = index
    if call_id is not None:
        entry["id"] = call_id
    if name is not None:
        entry["function"]["name"] = name
    if text is not None:
        entry["function"]["arguments"] = text
    return entry


def calls(*entries: dict[str, Any]) -> dict[str, Any]:
    return a_chunk({"tool_calls": list(entries)})


def read(*chunks: Any, quirks: Quirks = FAMILY, ends: bool = True) -> list[Event]:
    decoder = CODEC.decoder(quirks)
    found: list[Event] = []
    for chunk in chunks:
        found += decoder.feed(ServerEvent(chunk if isinstance(chunk, str) else json.dumps(chunk)))
    return [*found, *decoder.finish()] if ends else found


def reply_of(events: list[Event]) -> Reply:
    builder = ReplyBuilder()
    for event in events:
        builder.add(event)
    return builder.reply()


def told_calls(*chunks: Any) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each call, after a look at the order of the events."""
    events = read(*chunks, a_chunk(finish="tool_calls"))
    is_open = -1
    for event in events:
        match event:
            case CallBegin(index):
                assert is_open == -1
                is_open = index
            case CallArguments(index) | CallEnd(index):
                assert is_open == index
                is_open = -1 if isinstance(event, CallEnd) else index
            case Content() | Ended():
                assert is_open == -1
    return [(call.id, call.name, call.text) for call in reply_of(events).message.tool_calls]


def failed(*chunks: Any, **more: Any) -> tuple[FailureKind, str]:
    with pytest.raises(ProviderFailure) as caught:
        read(*chunks, **more)
    return caught.value.failure.kind, caught.value.failure.message


TEXT = [a_chunk({"role": "assistant", "content": ""}), a_chunk({"content": "Hel"}), a_chunk({"content": "lo"})]
STOP = a_chunk(finish="stop")
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 5,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 2, "audio_tokens": 0},
}
COUNTS = Usage(
    input_tokens=9,
    output_tokens=5,
    cache_read_tokens=4,
    reasoning_tokens=2,
    input_audio_tokens=1,
    output_audio_tokens=0,
)


def test_a_stream_as_its_maker_sends_it() -> None:
    chunks = [*TEXT, STOP, a_chunk() | {"choices": [], "usage": USAGE}]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    events = read(*chunks, "[DONE]", "[DONE]", a_chunk({"content": "too late"}))
    assert events == [Began("c-1", "m-1"), Content("Hel"), Content("lo"), COUNTS, Ended("stop", "stop")]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2000), max_size=12), st.sampled_from(["\n", "\r\n"]))
def test_any_cut_of_the_bytes_gives_the_same_events(cuts: list[int], end: str) -> None:
    chunks = [*TEXT, calls(a_call(0, "", "f", "a")), calls(a_call(0, '{"x": "\u00e9"}')), a_chunk(finish="tool_calls")]
    body = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}{end}{end}" for chunk in chunks).encode()
    stream, decoder = EventStream(), CODEC.decoder(FAMILY)
    found: list[Event] = []
    for a, b in pairwise(sorted({0, len(body), *(min(cut, len(body)) for cut in cuts)})):
        for event in stream.feed(body[a:b]):
            found += decoder.feed(event)
    assert [*found, *decoder.finish()] == read(*chunks)


MESSAGE = {"role": "assistant", "content": "Hello", "refusal": None}


def a_body(message: dict[str, Any], finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    return {
        "id": "c-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m-1",
        "choices": [choice],
        "usage": USAGE,
        **more,
    }


@pytest.mark.parametrize(
    ("message", "finish"),
    [
        (MESSAGE, "stop"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "stop"),
        (
            {
                "role": "assistant",
                "content": "x",
                "tool_calls": [a_call(None, '{"a": 1}', "f", "a")],
            },
            "tool_calls",
        ),
        ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
        ({"role": "assistant", "content": "x", "annotations": []}, "length"),
        ({"role": "assistant", "content": ""}, "content_filter"),
    ],
)
def test_a_whole_answer_is_the_answer_that_its_stream_is(message: dict[str, Any], finish: str) -> None:
    body = a_body(message, finish)
    ChatCompletion.model_validate(body)
    reply = CODEC.reply(body, FAMILY)
    assert reply == reply_of(
        read(a_chunk(message), a_chunk(finish=finish), a_chunk() | {"choices": [], "usage": USAGE})
    )
    assert (reply.began, reply.usage, reply.ended.native) == (Began("c-1", "m-1"), COUNTS, finish)


@pytest.mark.parametrize(
    "body", [{}, {"choices": []}, {"choices": [{}]}, {"choices": "x"}, {"id": "x", "choices": [None]}], ids=str
)
def test_an_answer_without_an_answer_is_the_providers_fault(body: dict[str, Any]) -> None:
    with pytest.raises(ProviderFailure) as caught:
        CODEC.reply(body, FAMILY)
    assert caught.value.failure.kind is FailureKind.SERVER


def test_a_whole_answer_without_a_reason_to_end_has_ended() -> None:
    assert CODEC.reply(a_body(MESSAGE, None), FAMILY).ended == Ended("stop", "stop")


@pytest.mark.parametrize(
    ("told", "finish"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("model_length", "length"),
        ("max_tokens", "length"),
        ("content_filter", "content_filter"),
        ("SAFETY", "content_filter"),
        ("eos", "stop"),
        ("a word of tomorrow", "stop"),
    ],
)
def test_reasons_to_end_are_told_in_our_words_and_theirs(told: str, finish: str) -> None:
    assert read(*TEXT, a_chunk(finish=told))[-1] == Ended(finish, told)  # type: ignore[arg-type]
    with_call = read(calls(a_call(0, "{}", "f", "a")), a_chunk(finish=told))[-1]
    assert with_call == Ended("tool_calls" if finish == "stop" else finish, told)  # type: ignore[arg-type]


def test_the_stop_string_that_ended_it_is_told_where_it_is() -> None:
    chunk = a_chunk(finish="stop")
    chunk["choices"][0]["stop_reason"] = "END"
    assert read(*TEXT, chunk)[-1] == Ended("stop", "stop", "END")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thoughts"])
def test_reasoning_is_read_from_whatever_field_it_comes_in(name: str) -> None:
    events = read(
        a_chunk({name: "h"}),
        a_chunk({name: "m", "content": None}),
        a_chunk({"content": "x"}),
        STOP,
        quirks=Quirks(reasoning_field=name),
    )
    reply = reply_of(events)
    assert (reply.message.reasoning_content, reply.message.content) == ("hm", "x")


def test_reasoning_in_two_fields_is_one() -> None:
    assert reply_of(read(a_chunk({"reasoning": "h", "reasoning_content": "h"}), STOP)).message.reasoning_content == "h"


def test_contents_of_parts_are_texts_and_thoughts() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "x"}]
    reply = CODEC.reply(a_body({"role": "assistant", "content": parts}), FAMILY)
    assert (reply.message.reasoning_content, reply.message.content) == ("hm", "x")


def test_details_of_reasoning_are_kept_whole_with_it() -> None:
    text = {"type": "reasoning.text", "index": 0, "format": "f"}
    chunks = [
        a_chunk({"reasoning": "h", "reasoning_details": [{**text, "text": "h"}]}),
        a_chunk({"reasoning": "m", "reasoning_details": [{**text, "text": "m", "signature": None}]}),
        a_chunk({"reasoning_details": [{**text, "signature": "s"}]}),
        a_chunk({"content": "x"}),
        a_chunk({"reasoning_details": [{"type": "reasoning.encrypted", "data": "z", "index": 1}]}),
    ]
    thought, said = reply_of(read(*chunks, STOP)).message.parts
    assert isinstance(thought, Reasoning)
    assert (thought.text, thought.provider_data) == (
        "hm",
        {"fam": {"reasoning_details": [{**text, "text": "hm", "signature": "s"}]}},
    )
    assert said == Text("x", {"fam": {"reasoning_details": [{"type": "reasoning.encrypted", "data": "z", "index": 1}]}})


def test_details_alone_are_reasoning_that_can_be_read() -> None:
    detail = {"type": "reasoning.summary", "summary": "sum"}
    assert reply_of(read(a_chunk({"reasoning_details": [detail]}), STOP)).message.reasoning_content == "sum"


def test_a_refusal_and_sources_are_no_text() -> None:
    events = read(
        a_chunk({"content": "x", "annotations": [{"a": 1}]}),
        a_chunk({"annotations": [{"b": 2}]}),
        STOP | {"citations": ["u"]},
    )
    assert Extras("fam", {"annotations": [{"a": 1}, {"b": 2}], "citations": ["u"]}) in events
    assert Refusal("No.") in read(a_chunk({"refusal": "No."}), STOP)


A, B = ("a", "f", '{"x": 1}'), ("b", "g", '{"y": 2}')


@pytest.mark.parametrize(
    "chunks",
    [
        [calls(a_call(0, '{"x": 1}', "f", "a"), a_call(1, '{"y": 2}', "g", "b"))],
        [
            calls(a_call(0, "", "f", "a")),
            calls(a_call(0, '{"x"')),
            calls(a_call(0, ": 1}")),
            calls(a_call(1, '{"y": 2}', "g", "b")),
        ],
        # one within the other
        [calls(a_call(0, '{"x"', "f", "a"), a_call(1, '{"y"', "g", "b")), calls(a_call(0, ": 1}"), a_call(1, ": 2}"))],
        [
            calls(a_call(0, "", "f", "a"), a_call(1, "", "g", "b")),
            calls(a_call(1, '{"y": 2}')),
            calls(a_call(0, '{"x": 1}')),
        ],
        # no index
        [calls(a_call(None, '{"x": 1}', "f", "a")), calls(a_call(None, '{"y": 2}', "g", "b"))],
        [
            calls(a_call(None, '{"x"', "f", "a")),
            calls(a_call(None, ": 1}")),
            calls(a_call(None, '{"y"', "g", "b")),
            calls(a_call(None, ": 2}")),
        ],
        # one index for all
        [calls(a_call(0, '{"x": 1}', "f", "a")), calls(a_call(0, '{"y": 2}', "g", "b"))],
        # the same id and name with every piece
        [
            calls(a_call(0, '{"x"', "f", "a")),
            calls(a_call(0, ": 1}", "f", "a")),
            calls(a_call(1, '{"y"', "g", "b")),
            calls(a_call(1, ": 2}", "g", "b")),
        ],
        # empty ones with every later piece
        [
            calls(a_call(0, '{"x"', "f", "a")),
            calls(a_call(0, ": 1}", "", "")),
            calls(a_call(1, '{"y": 2}', "g", "b"), a_call(1, "", "", "")),
        ],
        # a new id with every piece
        [
            calls(a_call(0, '{"x"', "f", "a")),
            calls(a_call(0, ": 1}", "f", "a2")),
            calls(a_call(1, '{"y": 2}', "g", "b")),
        ],
        # the whole once more at the end
        [
            calls(a_call(0, '{"x"', "f", "a")),
            calls(a_call(0, ": 1}")),
            calls(a_call(0, '{"x": 1}', "f", "a"), a_call(1, '{"y": 2}', "g", "b")),
        ],
        # an object in place of its text
        [calls(a_call(0, {"x": 1}, "f", "a"), a_call(1, {"y": 2}, "g", "b"))],
        # text between them, and white space behind
        [
            calls(a_call(0, '{"x": 1}', "f", "a")),
            a_chunk({"content": "\n"}),
            calls(a_call(1, '{"y": 2}', "g", "b")),
            calls(a_call(0, "\n")),
        ],
        # the name comes late
        [calls(a_call(0, "", None, "a")), calls(a_call(0, '{"x": 1}', "f")), calls(a_call(1, '{"y": 2}', "g", "b"))],
    ],
)
def test_calls_come_in_order_whatever_the_provider_does(chunks: list[Any]) -> None:
    told = told_calls(*chunks)
    assert [(call_id, name, json.loads(text)) for call_id, name, text in told] == [
        (call_id, name, json.loads(text)) for call_id, name, text in (A, B)
    ]


def test_calls_without_ids_are_told_apart_by_what_is_complete() -> None:
    one = calls(a_call(0, '{"q": 1}', "f", ""))
    assert told_calls(one, calls(a_call(0, '{"q": 2}', "f", ""))) == [("", "f", '{"q": 1}'), ("", "f", '{"q": 2}')]
    no_index = [calls(a_call(None, '{"q": 1}', "f")), calls(a_call(None, '{"q": 2}', "f"))]
    assert told_calls(*no_index) == [("", "f", '{"q": 1}'), ("", "f", '{"q": 2}')]


def test_calls_without_arguments_are_calls() -> None:
    assert told_calls(calls(a_call(0, "", "f", "a")), calls(a_call(1, "", "g", "b"))) == [
        ("a", "f", ""),
        ("b", "g", ""),
    ]
    assert told_calls(a_chunk({"function_call": {"name": "f", "arguments": ""}})) == [("", "f", "")]


def test_a_call_is_told_as_it_comes() -> None:
    """Else a client waits for the end of a long call that it could have read."""
    decoder = CODEC.decoder(FAMILY)
    decoder.read(calls(a_call(0, "", "f", "a")))
    assert decoder.read(calls(a_call(0, '{"x'))) == [CallArguments(0, '{"x')]


def test_what_only_the_provider_knows_of_a_call_stays_with_it() -> None:
    signed = a_call(0, "{}", "f", "a", extra_content={"google": {"thought_signature": "s"}})
    call = reply_of(read(calls(signed), a_chunk(finish="stop"))).message.tool_calls[0]
    assert call.provider_data == {"fam": {"extra_content": {"google": {"thought_signature": "s"}}}}


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([calls(a_call(0, "{}", None, "a"))], "without saying of what function"),
        ([calls(a_call(0, "{}", "f", "a")), calls(a_call(1, "{}", "g", "b")), calls(a_call(0, "x"))], "was over"),
        ([calls(a_call(0, '{"a"', "f", "a")), '{"choices": [{"delta"'], "lost a piece of a call"),
        ([calls(*(a_call(i, "{}", "f", f"c{i}") for i in range(129)))], "more than 128 calls"),
    ],
)
def test_calls_that_cannot_be_whole_are_a_failure(chunks: list[Any], words: str) -> None:
    kind, message = failed(*chunks, a_chunk(finish="tool_calls"))
    assert kind is FailureKind.SERVER
    assert words in message


def test_a_line_that_is_no_json_is_counted_and_left_out() -> None:
    decoder = CODEC.decoder(FAMILY)
    for data in (json.dumps(TEXT[1]), "{oops", "[]", "7", "", json.dumps(STOP)):
        decoder.feed(ServerEvent(data))
    assert decoder.skipped == 3
    assert isinstance(decoder.finish()[-1], Ended)


@pytest.mark.parametrize(
    "chunks", [[], TEXT[:1], TEXT, [*TEXT, "[DONE]"], [a_chunk() | {"choices": [], "usage": USAGE}]]
)
def test_a_stream_that_never_says_why_it_ends_has_broken_off(chunks: list[Any]) -> None:
    kind, message = failed(*chunks)
    assert kind is FailureKind.SERVER
    assert ("broke off" if chunks[:2] == TEXT[:2] else "before it said anything") in message


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"error": {"message": "Too Many Requests", "code": "too_many_requests"}}, FailureKind.RATE_LIMITED),
        ({"error": {"message": "no", "code": 429}}, FailureKind.RATE_LIMITED),
        ({"error": "upstream connect error"}, FailureKind.SERVER),
        (
            {"object": "error", "message": "maximum context length is 5", "type": "BadRequestError", "code": 400},
            FailureKind.CONTEXT_LENGTH,
        ),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, FailureKind.OVERLOADED),
        ({"detail": "Internal error"}, FailureKind.SERVER),
        ({"message": "model is overloaded", "status": 503}, FailureKind.OVERLOADED),
        (
            [{"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}],
            FailureKind.OVERLOADED,
        ),
        (a_chunk(finish="error") | {"error": {"code": 502, "message": "Provider disconnected"}}, FailureKind.SERVER),
        (
            {"id": "x", "choices": [{"index": 0, "delta": {}, "error": {"code": 429, "message": "slow"}}]},
            FailureKind.RATE_LIMITED,
        ),
        (a_chunk(finish="error"), FailureKind.SERVER),
        (a_chunk(finish="abort"), FailureKind.SERVER),
        (a_chunk(finish="insufficient_system_resource"), FailureKind.OVERLOADED),
        ("error: out of memory", FailureKind.SERVER),
    ],
    ids=str,
)
def test_an_error_within_a_stream_is_a_failure_of_its_kind(event: Any, kind: FailureKind) -> None:
    assert failed(*TEXT, event)[0] is kind
    if isinstance(event, dict) and "choices" not in event:
        with pytest.raises(ProviderFailure):
            CODEC.reply(event, FAMILY)


def test_the_name_of_an_event_can_say_that_it_is_an_error() -> None:
    with pytest.raises(ProviderFailure, match="boom"):
        CODEC.decoder(FAMILY).feed(ServerEvent('{"reason": "boom", "id": "x"}', "error"))
    assert read(*TEXT, STOP | {"error": None})[-1] == Ended("stop", "stop")


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        (USAGE, COUNTS),
        (
            {"prompt_tokens": 9, "completion_tokens": 5, "prompt_cache_hit_tokens": 3},
            Usage(input_tokens=9, output_tokens=5, cache_read_tokens=3),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 5, "cached_tokens": 3},
            Usage(input_tokens=9, output_tokens=5, cache_read_tokens=3),
        ),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 5,
                "total_tokens": 21,
                "completion_tokens_details": {"reasoning_tokens": 7},
            },
            Usage(input_tokens=9, output_tokens=12, reasoning_tokens=7),
        ),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 5,
                "prompt_tokens_details": {"cache_write_tokens": 2, "cached_tokens": None},
            },
            Usage(input_tokens=9, output_tokens=5, cache_write_tokens=2),
        ),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 5,
                "cache_creation_input_tokens": 4,
                "prompt_tokens_details": {"cache_creation_token_details": {"ephemeral_1h_input_tokens": 3}},
                "server_tool_use": {"web_search_requests": 2},
            },
            Usage(input_tokens=9, output_tokens=5, cache_write_tokens=4, cache_write_1h_tokens=3, web_searches=2),
        ),
        ({"prompt_tokens": -1, "completion_tokens": "5", "prompt_tokens_details": 3}, Usage()),
    ],
)
def test_counts_are_read_by_all_their_names(usage: dict[str, Any], counts: Usage) -> None:
    assert CODEC.reply(a_body(MESSAGE) | {"usage": usage}, FAMILY).usage == counts


def test_counts_in_every_chunk_are_told_once_and_are_the_last() -> None:
    growing = [chunk | {"usage": {"prompt_tokens": 9, "completion_tokens": i}} for i, chunk in enumerate(TEXT)]
    events = read(*growing, STOP | {"usage": {"prompt_tokens": 9, "completion_tokens": 8}})
    assert [event for event in events if isinstance(event, Usage)] == [Usage(input_tokens=9, output_tokens=8)]


def test_counts_stand_where_the_provider_puts_them() -> None:
    aside = STOP | {"x_groq": {"id": "r", "usage": USAGE}}
    within = a_chunk(finish="stop")
    within["choices"][0]["usage"] = USAGE
    assert COUNTS in read(*TEXT, aside)
    assert COUNTS in read(*TEXT, within)


def test_other_choices_are_not_ours() -> None:
    other = a_chunk({"content": "other"}, "length")
    other["choices"][0]["index"] = 1
    assert read(*TEXT, other, STOP)[1:] == [Content("Hel"), Content("lo"), Ended("stop", "stop")]


def test_a_first_chunk_that_says_nothing_does_not_begin_the_answer() -> None:
    """Azure's: what its filters thought of the prompt, with an empty id."""
    filters = {"id": "", "model": "", "choices": [], "prompt_filter_results": [{}]}
    assert read(filters, *TEXT, STOP)[0] == Began("c-1", "m-1")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.sampled_from(["", "x", "{}", "stop", "text"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                "choices delta message content tool_calls function name arguments index id finish_reason usage error "
                "type text reasoning reasoning_details function_call prompt_tokens_details x_groq refusal".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(JUNK, max_size=3), JUNK)
def test_whatever_comes_is_an_answer_or_a_failure(chunks: list[Any], delta: Any) -> None:
    try:
        events = read(*chunks, a_chunk(delta), STOP)
    except ProviderFailure:
        return
    assert isinstance(events[0], Began)
    assert isinstance(events[-1], Ended)


def test_codecs_are_found_by_name() -> None:
    assert isinstance(by_name("openai.chat"), ChatCodec)
    assert by_name("openai.chat") is by_name("openai.chat")
    with pytest.raises(ValueError, match=", ".join(CODECS)):
        by_name("openai.telepathy")


def test_finished_parts_are_told_of_a_server_that_is_known_to_tell_them() -> None:
    """They add nothing to the answer; what does not say where it is is none."""
    parts = [{"path": "/a", "value": 1}, {"path": 3}, "odd", {"path": "", "closed": "object"}]
    chunks = [a_chunk({"content": '{"a":1}', "structured": parts}), a_chunk({"structured": []}), a_chunk(finish="stop")]
    for quirks, told in ((Quirks(tells_parts=True), [[parts[0], parts[3]]]), (Quirks(), [])):
        decoder, builder, seen = CODEC.decoder(quirks), ReplyBuilder(), []
        for chunk in chunks:
            seen += decoder.feed(ServerEvent(json.dumps(chunk)))
        seen += decoder.finish()
        assert [event.parts for event in seen if isinstance(event, Structured)] == told
        for event in seen:
            builder.add(event)
        assert builder.reply().message.content == '{"a":1}'
        assert builder.reply().message.parts == (Text('{"a":1}'),)

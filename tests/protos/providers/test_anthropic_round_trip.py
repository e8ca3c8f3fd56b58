"""Anthropic's format there and back, for conversations and answers of any shape; its own client's types are the judges.

Losses that are meant: neighbouring texts are one, blank ones none; thinking of others; a choice among tools that offers
all of them. Guards against fields that a body lacks, has too many of, or in the wrong place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict, TypeAdapter

from diptych.protos.anthropic_messages import MessagesRequest, parse_messages
from diptych.protos.messages import Media, Message, Reasoning, Text, ToolCall, ToolResult
from diptych.protos.openai import ChatRequest
from diptych.protos.openai_output import OutputForm
from diptych.protos.openai_tools import Mode, Tool, ToolUse
from diptych.protos.providers.anthropic import MessagesCodec
from diptych.protos.providers.codec import ServerEvent
from diptych.protos.providers.event_stream import EventStream
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Reply, ReplyBuilder
from diptych.protos.wire_checks import compact

types = pytest.importorskip("anthropic.types")

CODEC = MessagesCodec()
QUIRKS = Quirks(family="anthropic", media=frozenset({"image", "file"}), prefill=True)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SAMPLING = ("temperature", "top_p", "top_k")  # of the API's older version; the types are of the later one

MODES: st.SearchStrategy[Mode] = st.sampled_from(("none", "auto", "required"))
words = st.text('ab .\u00f6\n"\\{', min_size=1, max_size=8).map(lambda text: f"x{text}y")
names = st.sampled_from(("f", "g_1", "tool-2"))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
objects = st.dictionaries(words, values, max_size=2)
images = st.builds(
    lambda data: Media(kind="image", path="", media_type="image/png", data=data), st.sampled_from(("aGk=", "aGV5"))
) | st.just(Media(kind="image", path="", url="https://a.b/c.png"))
pdfs = st.just(Media(kind="file", path="", media_type="application/pdf", data="aGk="))


def apart(parts: list[Any]) -> list[Any]:
    """No two texts side by side."""
    return [
        part for i, part in enumerate(parts) if not (i and isinstance(part, Text) and isinstance(parts[i - 1], Text))
    ]


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    found: list[Message] = []
    if draw(st.booleans()):
        found.append(Message(role="system", parts=(Text(draw(words)),)))
    said = st.lists(st.builds(Text, words) | images, min_size=1, max_size=3).map(apart)
    found.append(Message(role="user", parts=tuple(draw(said))))
    for turn in range(draw(st.integers(0, 2))):
        signed = st.builds(Reasoning, words, st.sampled_from(("EqQB", "Ab+/=")))
        parts: list[Any] = draw(st.lists(signed, max_size=1)) + draw(st.lists(st.builds(Text, words), max_size=1))
        calls = []
        for number in range(draw(st.integers(0 if parts else 1, 2))):
            arguments = draw(objects)
            call_id = f"toolu_{turn}_{number}"
            calls.append(ToolCall(id=call_id, name=draw(names), arguments=arguments, text=compact(arguments)))
        found.append(Message(role="assistant", parts=(*parts, *calls)))
        inner = st.lists(st.builds(Text, words) | images, max_size=2).map(apart)
        for call in calls:
            told = ToolResult(call_id=call.id, name=call.name, parts=tuple(draw(inner)), is_error=draw(st.booleans()))
            found.append(Message(role="tool", parts=(told,)))
        if not calls or draw(st.booleans()):
            found.append(Message(role="user", parts=tuple(draw(said))))
    return tuple(found)


@st.composite
def requests(draw: st.DrawFn) -> ChatRequest:
    messages = draw(conversations())
    fields: dict[str, Any] = {
        "messages": messages,
        "model": "m",
        "max_tokens": draw(st.integers(3000, 9000)),
        "stop": tuple(dict.fromkeys(draw(st.lists(words, max_size=2)))),
        "user": draw(st.none() | words),
        **draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "temperature": st.sampled_from((0.0, 0.5, 1)),
                    "top_p": st.just(0.5),
                    "top_k": st.integers(1, 9),
                },
            )
        ),
    }
    called = {call.name for message in messages for call in message.tool_calls}
    has_tools: bool = draw(st.booleans())
    if called or has_tools:
        tools = tuple(
            Tool(name=name, description=draw(st.none() | words), parameters={"type": "object", "properties": {}})
            for name in sorted(called | draw(st.sets(names, min_size=1)))
        )
        mode: Mode = draw(MODES)
        every = () if mode == "none" else tuple(tool.name for tool in tools)
        named = mode == "required" and draw(st.booleans())
        chosen = every[:1] if named else every
        parallel = draw(st.booleans()) if not named and mode != "none" else mode == "none"
        fields["tool_use"] = ToolUse(tools=tools, mode=mode, names=chosen, is_named=named, parallel=parallel)
    if draw(st.booleans()):
        schema = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
        fields["output_form"] = OutputForm(kind="json_schema", value=compact(schema), path="response_format")
    return ChatRequest.model_construct(**{"stream": None, **fields})


def merged(messages: tuple[Message, ...]) -> list[Any]:
    """Who said what, with neighbouring texts as one and the places of media left out."""
    found: list[Any] = []
    for message in messages:
        parts = [part for part in message.parts if not (isinstance(part, Text) and not part.text.strip())]
        inner: list[Any] = []
        for part in parts:
            if isinstance(part, ToolResult):
                kept = tuple(one for one in part.parts if not (isinstance(one, Text) and not one.text.strip()))
                part = ToolResult(call_id=part.call_id, name=part.name, parts=kept, is_error=part.is_error)
            inner.append(part)
        found.append((message.role, inner))
    return found


@FEW
@given(requests())
def test_a_request_is_read_as_it_was(request: ChatRequest) -> None:
    sent = CODEC.encode(request, model="claude-3-haiku", stream=False, quirks=QUIRKS)
    if request.output_form is not None:  # of which that model knows nothing
        sent = CODEC.encode(request, model="claude-sonnet-4-5", stream=False, quirks=QUIRKS)
    read: MessagesRequest = parse_messages(json.dumps(sent.body).encode())
    assert merged(read.messages) == merged(request.messages)
    assert (read.max_tokens, read.stop, read.user) == (request.max_tokens, request.stop, request.user)
    if request.output_form is None:
        assert (read.temperature, read.top_p, read.top_k) == (request.temperature, request.top_p, request.top_k)
    else:
        assert read.output_form is not None
        assert read.output_form.schema == request.output_form.schema
    assert read.tool_use == request.tool_use


def judged(adapter: TypeAdapter[Any], value: object) -> None:
    """The types leave iterables unread until they are walked."""

    def walk(found: object) -> None:
        if isinstance(found, Mapping):
            for inner in found.values():
                walk(inner)
        elif isinstance(found, Iterator | list | tuple):
            for inner in found:
                walk(inner)

    walk(adapter.validate_python(value))


@pytest.fixture(scope="module")
def params() -> TypeAdapter[Any]:
    return TypeAdapter(types.MessageCreateParams, config=ConfigDict(extra="forbid"))


@pytest.mark.parametrize("model", ["claude-sonnet-4-5", "claude-opus-5-5", "other"])
def test_the_makers_types_take_each_body(model: str, params: TypeAdapter[Any]) -> None:
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(requests(), st.sampled_from((None, 1500)), st.booleans())
    def judge(request: ChatRequest, budget: int | None, stream: bool) -> None:
        given = request.model_copy(update={"reasoning_budget": budget})
        body = CODEC.encode(given, model=model, stream=stream, quirks=QUIRKS).body
        judged(params, {name: value for name, value in body.items() if name not in SAMPLING})

    judge()


def test_the_judge_sees_what_is_wrong(params: TypeAdapter[Any]) -> None:
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "txt": "a"}]}]}
    with pytest.raises(ValueError, match="txt"):
        judged(params, body)


texts = st.builds(lambda text: {"type": "text", "text": text}, words)
cited = st.builds(
    lambda text: {
        "type": "text",
        "text": text,
        "citations": [
            {
                "type": "char_location",
                "cited_text": "c",
                "document_index": 0,
                "document_title": None,
                "start_char_index": 0,
                "end_char_index": 1,
            }
        ],
    },
    words,
)
thoughts = st.builds(lambda text: {"type": "thinking", "thinking": text, "signature": "EqQB"}, words | st.just(""))
redacted = st.just({"type": "redacted_thinking", "data": "EmwK"})
searches = st.just({"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "q"}})
finds = st.just({"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []})
calls = st.builds(
    lambda name, arguments, extra: {"type": "tool_use", "id": "", "name": name, "input": arguments} | extra,
    names,
    objects,
    st.sampled_from(({}, {"caller": {"type": "direct"}})),
)


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    content = draw(st.lists(texts | cited | thoughts | redacted | searches | finds | calls, min_size=1, max_size=6))
    content = [dict(block) for block in content]
    for i, block in enumerate(content):
        if block["type"] == "tool_use":
            block["id"] = f"toolu_{i}"
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": content,
        "stop_reason": draw(st.sampled_from(("end_turn", "max_tokens", "tool_use", "refusal"))),
        "stop_sequence": None,
        "usage": {"input_tokens": draw(st.integers(0, 9)), "output_tokens": 3, "cache_read_input_tokens": 2},
    }


def stream_of(body: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """As Anthropic would send it, in pieces of `size` characters."""
    usage = {**body["usage"], "output_tokens": 1}
    found: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**body, "content": [], "stop_reason": None, "usage": usage}}
    ]
    for index, block in enumerate(body["content"]):
        start, deltas = dict(block), []
        for name, kind, field in (
            ("text", "text_delta", "text"),
            ("thinking", "thinking_delta", "thinking"),
            ("input", "input_json_delta", "partial_json"),
        ):
            if name in block:
                whole = compact(block[name]) if name == "input" else block[name]
                start[name] = {} if name == "input" else ""
                pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
                deltas += [{"type": kind, field: piece} for piece in pieces]
        deltas += [{"type": "citations_delta", "citation": one} for one in block.get("citations", [])]
        start |= {"citations": []} if "citations" in block else {}
        if block["type"] == "thinking":
            start["signature"] = ""
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
        found.append({"type": "content_block_start", "index": index, "content_block": start})
        found += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        found.append({"type": "content_block_stop", "index": index})
    delta = {"stop_reason": body["stop_reason"], "stop_sequence": None}
    found.append({"type": "message_delta", "delta": delta, "usage": body["usage"]})
    return [*found, {"type": "message_stop"}]


def decoded(events: list[dict[str, Any]]) -> Reply:
    decoder, builder = CODEC.decoder(QUIRKS), ReplyBuilder()
    for told in events:
        for made in decoder.feed(ServerEvent(json.dumps(told), told["type"])):
            builder.add(made)
    for made in decoder.finish():
        builder.add(made)
    assert decoder.skipped == 0
    return builder.reply()


@FEW
@given(bodies(), st.integers(1, 5))
def test_a_stream_in_any_pieces_is_the_whole_answer(body: dict[str, Any], size: int) -> None:
    reply = CODEC.reply(body, QUIRKS)
    assert decoded(stream_of(body, size)) == reply
    builder = ReplyBuilder()
    for made in reply.events():
        builder.add(made)
    assert builder.reply() == reply


@FEW
@given(bodies(), st.data())
def test_bytes_in_any_pieces_are_the_whole_answer(body: dict[str, Any], data: st.DataObject) -> None:
    told = [f"event: {one['type']}\ndata: {json.dumps(one, ensure_ascii=False)}\n\n" for one in stream_of(body, 4)]
    sent = "".join(told).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=6)))
    stream, decoder, builder = EventStream(), CODEC.decoder(QUIRKS), ReplyBuilder()
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        for event in stream.feed(sent[start:end]):
            for made in decoder.feed(event):
                builder.add(made)
    assert decoder.finish() == []
    assert builder.reply() == CODEC.reply(body, QUIRKS)


@FEW
@given(bodies())
def test_an_answer_goes_back_as_it_came(body: dict[str, Any]) -> None:
    user = Message(role="user", parts=(Text("a"),))
    messages = (user, CODEC.reply(body, QUIRKS).message, user)
    request = ChatRequest.model_construct(messages=messages, model="m", max_tokens=1)
    sent = CODEC.encode(request, model="claude-opus-5", stream=False, quirks=QUIRKS)
    assert sent.body["messages"][1]["content"] == body["content"]


def test_the_fixtures_are_the_makers() -> None:
    message, events = TypeAdapter(types.Message), TypeAdapter(types.RawMessageStreamEvent)

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(bodies())
    def judge(body: dict[str, Any]) -> None:
        message.validate_python(body)
        for told in stream_of(body, 3):
            events.validate_python(told)

    judge()

"""Requests to /v1/responses of a provider: what a canonical one becomes; OpenAI's types and our own reader are judges.

Guards against reasoning that is sent without its seal or bound to items that lack it (OpenAI answers 400), optional
arguments that come as null, and a conversation that is stored at the provider.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming,
    ResponseCreateParamsStreaming,
)
from pydantic import TypeAdapter

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Media, Message, Reasoning, Text, ToolCall, ToolResult
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.providers.codec import Outgoing
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.quirks import Quirks
from diptych.protos.responses import parse_responses
from diptych.protos.responses_items import ItemIds, ItemReader

PLAIN = Quirks(family="openai")
OPTIONAL = Quirks(replay_reasoning="optional")
SEES_ALL = Quirks(family="openai", media=frozenset({"image", "audio", "file"}))
PIXEL = "data:image/png;base64,iVBORw0KGgo="
USER = {"role": "user", "content": "hi"}
STRICT = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
LOOSE = {"type": "object", "properties": {"city": {"type": "string"}, "day": {"type": "integer"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": STRICT}}
TIME = {"type": "function", "function": {"name": "time", "parameters": LOOSE}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
CALLS = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
FORM = {"type": "json_schema", "json_schema": {"name": "a b", "schema": LOOSE}}
PARAMS: Any = {
    False: TypeAdapter(ResponseCreateParamsNonStreaming),
    True: TypeAdapter(ResponseCreateParamsStreaming),
}


def asked(*messages: Any, **more: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": messages or [USER], **more}).encode())


def sent(request: ChatRequest, *, model: str = "gpt-5.5", stream: bool = False, quirks: Quirks = PLAIN) -> Outgoing:
    return by_name("openai.responses").encode(request, model=model, stream=stream, quirks=quirks)


def noted(outgoing: Outgoing) -> dict[str, str]:
    return {note.field: note.kind for note in outgoing.notes}


def answer(*parts: Any, data: Any = None) -> Message:
    return Message(role="assistant", parts=parts, provider_data=data or {})


def after(message: Message) -> Any:
    """The items that a turn becomes."""
    first, last = asked(USER).messages[0], asked({"role": "user", "content": "end"}).messages[0]
    request = asked().model_copy(update={"messages": (first, message, last)})
    return sent(request).body["input"][1:-1]


def test_a_conversation_with_every_role() -> None:
    system, developer = ({"role": role, "content": role} for role in ("system", "developer"))
    outgoing = sent(asked(system, developer, USER, CALLS, RESULT, USER), stream=True)
    assert outgoing.path == "/responses"
    assert outgoing.body == {
        "model": "gpt-5.5",
        "stream": True,
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "instructions": "system",
        "input": [
            {"type": "message", "role": "developer", "content": "developer"},
            {"type": "message", "role": "user", "content": "hi"},
            {"type": "message", "role": "assistant", "content": "I look."},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Oslo"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {"type": "message", "role": "user", "content": "hi"},
        ],
    }
    assert outgoing.notes == ()


def test_the_system_where_there_are_no_instructions() -> None:
    system = {"role": "system", "content": "s"}
    late = sent(asked(USER, system, USER))
    assert [item["role"] for item in late.body["input"]] == ["user", "system", "user"]
    quirks = Quirks(unsupported=frozenset({"instructions"}), system_role="developer")
    renamed = sent(asked(system, USER), quirks=quirks)
    assert ("instructions" in renamed.body, renamed.body["input"][0]["role"]) == (False, "developer")
    assert noted(renamed) == {"messages[0].role": "renamed"}
    folded = sent(asked(system, USER), quirks=Quirks(system_role="first_user"))
    texts = [{"type": "input_text", "text": text} for text in ("s", "hi")]
    assert folded.body["input"] == [{"type": "message", "role": "user", "content": texts}]
    assert sent(asked(system)).body["input"] == [{"type": "message", "role": "system", "content": "s"}]


def test_reasoning_goes_back_sealed_and_binds_the_items_of_its_turn() -> None:
    """Ids of messages and calls are told beside their reasoning; without it the provider refuses them."""
    seal = {"id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "gAAA"}
    thought = Reasoning("hm", provider_data={"openai": {"item": seal}})
    text = Text("See.", {"openai": {"item": {"id": "msg_1", "phase": "commentary"}}})
    call = ToolCall(id="c1", name="f", arguments={}, text="{}", provider_data={"openai": {"item": {"id": "fc_1"}}})
    part = {"type": "output_text", "text": "See.", "annotations": []}
    message = {"type": "message", "role": "assistant", "phase": "commentary"}
    function = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    assert after(answer(thought, text, call)) == [
        seal | {"type": "reasoning"},
        message | {"id": "msg_1", "status": "completed", "content": [part]},
        function | {"id": "fc_1"},
    ]
    assert after(answer(Reasoning("theirs", signature="x"), text, call)) == [message | {"content": "See."}, function]


def test_items_of_tools_that_the_provider_ran_go_back_where_they_came() -> None:
    search = {
        "type": "web_search_call",
        "id": "ws_1",
        "status": "completed",
        "action": {"type": "search", "query": "q"},
    }
    hidden = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
    kept = answer(Text("a", {"openai": {"after": [search]}}), Text("b"), data={"openai": {"after": [hidden]}})
    assert [item["type"] for item in after(kept)] == ["reasoning", "message", "web_search_call", "message"]
    assert [item["type"] for item in after(answer(Text("a", {"other": {"after": [search]}}), Text("b")))] == ["message"]


def test_reasoning_of_others_goes_where_it_is_wanted() -> None:
    request = asked(USER, {"role": "assistant", "content": "a", "reasoning_content": "hm"}, USER)
    assert all(len(sent(request, quirks=quirks).body["input"]) == 3 for quirks in (PLAIN, OPTIONAL))
    assert "include" in sent(request, model="deployed", quirks=OPTIONAL).body
    assert "include" not in sent(request, model="gpt-4.1", quirks=OPTIONAL).body
    _, thought, *_ = sent(request, quirks=Quirks(replay_reasoning="required")).body["input"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]


def test_media_by_what_they_are() -> None:
    parts = [
        {"type": "text", "text": "what?"},
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}},
    ]
    assert sent(asked({"role": "user", "content": parts}), quirks=SEES_ALL).body["input"][0]["content"] == [
        {"type": "input_text", "text": "what?"},
        {"type": "input_image", "detail": "low", "image_url": PIXEL},
        {"type": "input_image", "detail": "auto", "image_url": "https://x.test/a.png"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"},
    ]
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content\[3\]"):
        sent(asked({"role": "user", "content": parts}))
    with pytest.raises(InvalidRequest, match="send its data"):
        sent(asked({"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}), quirks=SEES_ALL)


def test_a_tool_is_held_to_its_schema_only_where_that_changes_nothing() -> None:
    """A schema made strict would bring nulls for arguments that the client's function knows as optional."""
    weather, time = sent(asked(tools=[WEATHER, TIME])).body["tools"]
    assert (weather["strict"], weather["parameters"]) == (True, STRICT)
    assert (time["strict"], time["parameters"]) == (False, LOOSE)


def test_forms_are_strict_and_their_changes_told() -> None:
    outgoing = sent(asked(response_format=FORM))
    form = outgoing.body["text"]["format"]
    assert (form["type"], form["name"], form["strict"]) == ("json_schema", "a_b", True)
    assert form["schema"]["required"] == ["city", "day"]
    assert any(note.words.startswith("null stands for the absence of day") for note in outgoing.notes)
    other = sent(asked(response_format={"type": "json_object"}), quirks=Quirks(schema_dialect="none"))
    assert (other.body["text"], other.notes) == ({"format": {"type": "json_object"}}, ())
    none = sent(asked(response_format=FORM), quirks=Quirks(schema_dialect="none"))
    assert [note.field for note in none.unsupported] == ["response_format.json_schema.schema"]
    assert [note.field for note in sent(asked(guided_regex="a+")).unsupported] == ["guided_regex"]


@pytest.mark.parametrize(
    ("choice", "quirk", "wanted", "offered"),
    [
        ("auto", "all", None, 2),
        ("none", "all", "none", 2),
        ("none", "auto_only", None, 0),
        ("required", "all", "required", 2),
        ("required", "no_required", None, 2),
        ({"type": "function", "function": {"name": "time"}}, "all", {"type": "function", "name": "time"}, 2),
        ({"type": "function", "function": {"name": "time"}}, "no_named", "required", 1),
        ({"type": "function", "function": {"name": "time"}}, "auto_only", None, 1),
    ],
)
def test_the_choice_among_tools(choice: Any, quirk: Any, wanted: Any, offered: int) -> None:
    body = sent(asked(tools=[WEATHER, TIME], tool_choice=choice), quirks=Quirks(tool_choice=quirk)).body
    assert (body.get("tool_choice"), len(body.get("tools", []))) == (wanted, offered)


def test_some_of_the_tools() -> None:
    some = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]}
    request = asked(tools=[WEATHER, TIME], tool_choice={"type": "allowed_tools", "allowed_tools": some})
    body = sent(request).body
    names = [{"type": "function", "name": "time"}]
    assert (body["tool_choice"], len(body["tools"])) == ({"type": "allowed_tools", "mode": "auto", "tools": names}, 2)
    fewer = sent(request, quirks=Quirks(unsupported=frozenset({"tool_choice.allowed_tools"})))
    assert ("tool_choice" in fewer.body, len(fewer.body["tools"]), noted(fewer)) == (False, 1, {"tool_choice": "moved"})


def test_parameters_that_the_format_has_and_has_not() -> None:
    request = asked(
        temperature=1,
        top_p=0.5,
        max_tokens=9,
        user="u",
        stop=["x"],
        seed=1,
        top_k=3,
        logprobs=True,
        parallel_tool_calls=False,
    )
    outgoing = sent(request)
    body = {name: value for name, value in outgoing.body.items() if name not in ("model", "input", "store", "include")}
    assert body == {"temperature": 1, "top_p": 0.5, "max_output_tokens": 9, "user": "u"}
    assert {note.field for note in outgoing.unsupported} == {"stop", "seed", "top_k", "logprobs"}
    quirks = Quirks(rename={"top_k": "top_k", "stop": "stop", "max_output_tokens": "n_predict"})
    other = sent(request, quirks=quirks)
    assert (other.body["top_k"], other.body["stop"], other.body["n_predict"]) == (3, ["x"], 9)
    assert noted(other) == {"max_tokens": "renamed", "seed": "unsupported", "logprobs": "unsupported"}
    assert sent(asked(tools=[TIME], parallel_tool_calls=False)).body["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("model", "fields", "reasoning", "seals"),
    [
        ("gpt-5.5", {"reasoning_effort": "low"}, {"effort": "low"}, True),
        ("o3", {"include_reasoning": True}, {"summary": "auto"}, True),
        ("gpt-5.5", {"chat_template_kwargs": {"enable_thinking": False}}, {"effort": "none"}, True),
        ("gpt-4.1", {"chat_template_kwargs": {"enable_thinking": False}}, None, False),
        ("gpt-4.1", {"include_reasoning": True}, None, False),
        ("gpt-5-chat-latest", {}, None, False),
        (
            "other",
            {"reasoning_effort": "high", "include_reasoning": True},
            {"effort": "high", "summary": "auto"},
            False,
        ),
    ],
)
def test_what_is_asked_of_reasoning(model: str, fields: Any, reasoning: Any, seals: bool) -> None:
    body = sent(asked(**fields), model=model).body
    assert (body.get("reasoning"), "include" in body) == (reasoning, seals)


def test_providers_that_differ() -> None:
    quirks = Quirks(
        effort_field="",
        unsupported=frozenset({"store", "include"}),
        extra_body={"x": 1},
        headers={"h": "v"},
        prefill=False,
    )
    begun = asked(USER, {"role": "assistant", "content": "Well,"}, continue_final_message=True, reasoning_effort="low")
    outgoing = sent(begun, quirks=quirks)
    assert outgoing.body.keys() == {"model", "input", "x"}
    assert (outgoing.headers, noted(outgoing)) == (
        {"h": "v"},
        {"continue_final_message": "unsupported", "reasoning_effort": "unsupported"},
    )
    assert len(sent(begun, quirks=Quirks(prefill=True)).body["input"]) == 2


def test_options_of_the_provider_come_last() -> None:
    options = {"openai": {"prompt_cache_key": "k", "reasoning": {"summary": "detailed"}, "text": {"verbosity": "low"}}}
    outgoing = sent(asked(reasoning_effort="low", provider_options=options))
    assert outgoing.body["reasoning"] == {"effort": "low", "summary": "detailed"}
    assert (outgoing.body["prompt_cache_key"], outgoing.notes) == ("k", ())
    for name in ("input", "model", "stream", "background", "previous_response_id"):
        with pytest.raises(InvalidRequest, match=rf"provider_options\.openai\.{name}"):
            sent(asked(provider_options={"openai": {name: "x"}}))


def test_ids_that_are_too_long_are_shortened_with_their_results() -> None:
    long = "x" * 100
    call = CALL | {"id": long}
    outgoing = sent(asked(USER, CALLS | {"tool_calls": [call]}, RESULT | {"tool_call_id": long}))
    _, _, called, result = outgoing.body["input"]
    assert called["call_id"] == result["call_id"]
    assert len(called["call_id"]) <= 64


words = st.text(min_size=1, max_size=8)
arguments = st.dictionaries(st.sampled_from("ab"), st.integers(0, 9) | words, max_size=2)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    """Turns that items can say without a loss: one text in each."""
    found = [Message(role="system", parts=(Text(draw(words)),))] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            found.append(Message(role="developer", parts=(Text(draw(words)),)))
        image = Media(
            kind="image", media_type="image/png", data="AAAA", detail=draw(st.sampled_from(["low", "auto"])), path=""
        )
        shown = [image] if draw(st.booleans()) else []
        found.append(Message(role="user", parts=(Text(draw(words)), *shown)))
        calls = []
        for i in range(draw(st.integers(0, 2))):
            given_ = draw(arguments)
            text = json.dumps(given_, ensure_ascii=False, separators=(",", ":"))
            calls.append(ToolCall(id=f"c{turn}-{i}", name=draw(st.sampled_from("fg")), arguments=given_, text=text))
        said = [Text(draw(words))] if not calls or draw(st.booleans()) else []
        found.append(Message(role="assistant", parts=(*said, *calls)))
        for call in draw(st.permutations(calls)):
            result = ToolResult(call_id=call.id, name=call.name, parts=(Text(draw(words)),))
            found.append(Message(role="tool", parts=(result,)))
    return (*found, Message(role="user", parts=(Text("end"),)))


@given(conversations(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_our_own_reader_reads_the_same_conversation(messages: tuple[Message, ...], streams: bool) -> None:
    """The reader of /v1/responses, which was written from the same specification for the other side."""
    body = sent(asked().model_copy(update={"messages": messages}), stream=streams).body
    PARAMS[streams].validate_python(body)
    read = parse_responses(json.dumps(body).encode())
    reader = ItemReader(ItemIds("resp_" + "0" * 24), lambda sealed: None, {})
    if read.fields.instructions is not None:
        reader.instruct(read.fields.instructions)
    reader.read(read.items, "input")
    assert reader.messages() == messages


def test_openai_itself_takes_what_is_sent() -> None:
    """The parameters of OpenAI's own client."""
    seal = {"id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
    thought = Reasoning("hm", provider_data={"openai": {"item": seal}})
    text = Text("See.", {"openai": {"item": {"id": "msg_1", "phase": "commentary"}}})
    call = ToolCall(id="c9", name="f", arguments={}, text="{}", provider_data={"openai": {"item": {"id": "fc_1"}}})
    shown = [{"type": "text", "text": "a map"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    request = asked(
        {"role": "developer", "content": "d"},
        {"role": "user", "content": shown},
        CALLS,
        RESULT | {"content": shown},
        tools=[WEATHER, TIME],
        tool_choice={"type": "function", "function": {"name": "time"}},
        response_format=FORM,
        reasoning_effort="low",
        include_reasoning=True,
        temperature=1,
        max_tokens=5,
        safety_identifier="u",
    )
    result = Message(role="tool", parts=(ToolResult(call_id="c9", name="f", parts=(Text("1"),)),))
    messages = (*request.messages, answer(thought, text, call), result)
    for streams in (False, True):
        body = sent(request.model_copy(update={"messages": messages}), stream=streams).body
        PARAMS[streams].validate_python(body)
        items = [item["type"] for item in body["input"]]
        assert items[-4:] == ["reasoning", "message", "function_call", "function_call_output"]

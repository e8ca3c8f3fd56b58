"""Messages: what today's clients send is taken, what cannot be meant is refused with its path."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Media, Message, Text
from diptych.protos.openai import parse_chat
from diptych.protos.openai_messages import read_messages

USER = {"role": "user", "content": "hi"}


def call(call_id: str = "c1", name: str = "f", arguments: Any = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CALLING = {"role": "assistant", "tool_calls": [call()]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "x"}


def read(*messages: Any) -> tuple[Message, ...]:
    return parse_chat(json.dumps({"model": "m", "messages": messages}).encode()).messages


def result_of(message: Message) -> tuple[str, str]:
    assert message.result is not None
    return message.result.name, message.result.call_id


def test_a_call_keeps_its_text_and_what_it_holds() -> None:
    """Templates want the object, others the text as the model wrote it."""
    text = '{ "a": [1, {"b": "\\u00f6"}] }'
    (message,) = read({"role": "assistant", "tool_calls": [call(arguments=text)]})
    (found,) = message.tool_calls
    assert (found.id, found.name, found.text) == ("c1", "f", text)
    assert found.arguments == {"a": [1, {"b": "\u00f6"}]}
    assert message.content == ""


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_a_message_with_calls_needs_no_content(content: dict[str, Any]) -> None:
    assert read({**CALLING, **content})[0].content == ""


@pytest.mark.parametrize("arguments", ["", "{}", " { } "])
def test_a_call_without_arguments_has_an_empty_object(arguments: str) -> None:
    """Streams without a piece of arguments leave an empty text with clients that join the pieces."""
    assert read({"role": "assistant", "tool_calls": [call(arguments=arguments)]})[0].tool_calls[0].arguments == {}


def test_a_whole_message_of_openais_client_comes_back() -> None:
    """Its fields that mean nothing to a prompt were taken for unknown ones."""
    echoed: dict[str, Any] = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "parsed": None,
        "provider_specific_fields": {"refusal": None},
        "reasoning_content": "hm",
        "tool_calls": [{**call(), "index": 0}, call("c2")],
    }
    echoed["tool_calls"][1]["function"]["parsed_arguments"] = {}
    message = read(echoed)[0]
    assert [found.id for found in message.tool_calls] == ["c1", "c2"]
    assert message.reasoning_content == "hm"
    assert read({"role": "assistant", "tool_calls": [{**call(), "type": None}]})[0].tool_calls[0].id == "c1"
    assert read({"role": "assistant", "content": '{"a": 1}', "parsed": {"a": 1}})[0].content == '{"a": 1}'
    for role in ("user", "system"):
        assert read({"role": role, "content": "x", "tool_calls": None, "refusal": None})[0].content == "x"


def test_marks_in_a_prompt_change_nothing() -> None:
    mark = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    parts = [{"type": "text", "text": "a", **mark}, {"type": "text", "text": "b", "prompt_cache_breakpoint": None}]
    assert read({"role": "user", "content": parts})[0].content == "ab"


def test_results_name_the_function_that_was_called() -> None:
    messages = read(
        USER, {"role": "assistant", "tool_calls": [call(), call("c2", "g")]}, {**RESULT, "tool_call_id": "c2"}
    )
    assert messages[2].role == "tool"
    assert result_of(messages[2]) == ("g", "c2")
    assert result_of(read(CALLING, {**RESULT, "name": "mine"})[1]) == ("mine", "c1")
    assert read(CALLING, {**RESULT, "content": [{"type": "text", "text": "y"}]})[1].content == "y"


def test_the_old_form_of_calls_becomes_the_new_one() -> None:
    first = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a":1}'}}
    messages = read(USER, first, {"role": "function", "name": "f", "content": "1"}, first)
    (made,) = messages[1].tool_calls
    assert (made.name, made.arguments) == ("f", {"a": 1})
    assert messages[2].role == "tool"
    assert result_of(messages[2]) == ("f", made.id)
    assert messages[3].tool_calls[0].id != made.id


def test_a_refusal_is_what_the_assistant_said() -> None:
    (message,) = read({"role": "assistant", "content": None, "refusal": "no"})
    assert (message.content, message.refusal) == ("no", "no")
    assert read({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]})[0].content == "no"


def test_names_and_orders_of_roles_are_free() -> None:
    roles = ["system", "user", "system", "developer", "assistant", "assistant", "user"]
    messages = read(*({"role": role, "content": "", "name": "n"} for role in roles))
    assert [message.role for message in messages] == roles
    assert {message.name for message in messages} == {"n"}


AT = "messages[1].tool_calls[0]"


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ({"role": "assistant"}, "messages[1].content", "is missing"),
        ({"role": "assistant", "content": None}, "messages[1].content", "if an empty one"),
        ({"role": "assistant", "content": []}, "messages[1].content", "list of text parts"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[1].content", "is missing"),
        ({"role": "critic", "content": "x"}, "messages[1].role", "must be system, developer, user"),
        ({"content": "x"}, "messages[1].role", "is missing"),
        ({**USER, "tool_calls": [call()]}, "messages[1].tool_calls", "this one is the user's"),
        ({**USER, "tool_call_id": "c1"}, "messages[1].tool_call_id", "is for tool messages"),
        ({**USER, "name": ""}, "messages[1].name", "is empty"),
        ({**USER, "name": 1}, "messages[1].name", "must be a string"),
        ({**USER, "content": [{"type": "refusal", "refusal": "x"}]}, "messages[1].content[0]", "type text"),
        ({**CALLING, "tool_calls": {}}, "messages[1].tool_calls", "list of calls"),
        ({**CALLING, "tool_calls": [call()] * 129}, "messages[1].tool_calls", "limit is 128"),
        ({**CALLING, "tool_calls": [call(), call()]}, "messages[1].tool_calls[1].id", "another call"),
        ({**CALLING, "tool_calls": ["x"]}, AT, "must be an object"),
        ({**CALLING, "tool_calls": [{"id": "c", "type": "function"}]}, f"{AT}.function", "is missing"),
        ({**CALLING, "tool_calls": [{**call(), "type": "custom"}]}, f"{AT}.type", "must be function"),
        ({**CALLING, "tool_calls": [{**call(), "x": 1}]}, f"{AT}.x", "unknown field"),
        ({**CALLING, "tool_calls": [call("")]}, f"{AT}.id", "is empty"),
        ({**CALLING, "tool_calls": [call(name="")]}, f"{AT}.function.name", "is empty"),
        ({**CALLING, "tool_calls": [call(arguments={})]}, f"{AT}.function.arguments", "not the object itself"),
        ({**CALLING, "tool_calls": [call(arguments=None)]}, f"{AT}.function.arguments", "is missing"),
        ({**CALLING, "tool_calls": [call(arguments="[]")]}, f"{AT}.function.arguments", "JSON of an object"),
        ({**CALLING, "tool_calls": [call(arguments='{"a":')]}, f"{AT}.function.arguments", "not valid JSON"),
        ({**CALLING, "tool_calls": [call(arguments='{"a":1,"a":2}')]}, f"{AT}.function.arguments", "appears twice"),
        ({**CALLING, "tool_calls": [call(arguments='{"a":NaN}')]}, f"{AT}.function.arguments", "NaN"),
        ({**CALLING, "tool_calls": [call(arguments='{"a":' + "[" * 99)]}, f"{AT}.function.arguments", "levels deep"),
        ({**CALLING, "tool_calls": [call(arguments='{"a":"\\ud800"}')]}, f"{AT}.function.arguments", "surrogate"),
        ({**CALLING, "function_call": {"name": "f", "arguments": "{}"}}, "messages[1].function_call", "old name"),
        ({**CALLING, "reasoning": "a", "reasoning_content": "b"}, "messages[1].reasoning", "differ"),
        ({**CALLING, "audio": {"id": "x"}}, "messages[1].audio", "reads text"),
        ({**CALLING, "refusal": 1}, "messages[1].refusal", "must be a string"),
        ({**RESULT, "tool_call_id": None}, "messages[1].tool_call_id", "is missing"),
        (RESULT, "messages[1].tool_call_id", "no call in an assistant message before it"),
        ({"role": "function", "name": "f", "content": "x"}, "messages[1].name", "is called in no assistant message"),
        ({"role": "function", "content": "x"}, "messages[1].name", "is missing"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_path(message: Any, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as told:
        read(USER, message)
    assert told.value.param == param
    assert words in str(told.value)
    assert param in str(told.value)


PNG = "data:image/png;base64,AAAA"


def test_media_are_parts_with_the_place_they_came_from() -> None:
    """Which model reads them is not this reader's business."""
    parts = [
        {"type": "text", "text": "what is this? "},
        {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "a.pdf"}},
    ]
    (message,) = read({"role": "user", "content": parts})
    assert message.content == "what is this? "
    image, linked, sound, kept, sent = message.media
    assert image == Media(kind="image", path="", media_type="image/png", data="AAAA", detail="low")
    assert (linked.url, linked.path) == ("https://example.org/a.png", "messages[0].content[2]")
    assert (sound.kind, sound.media_type, kept.file_id) == ("audio", "audio/mpeg", "file-1")
    assert (sent.name, sent.media_type, sent.data) == ("a.pdf", "application/pdf", "AAAA")
    answered = read(CALLING, {**RESULT, "content": parts[:2]})[1]
    assert answered.result is not None
    assert [type(part) for part in answered.result.parts] == [Text, Media]


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        ({"type": "image_url", "image_url": PNG}, "messages[0].content[0].image_url", "must be an object"),
        ({"type": "image_url"}, "messages[0].content[0].image_url", "must be an object"),
        ({"type": "image_url", "image_url": {"url": "ftp://x"}}, "messages[0].content[0].image_url.url", "http(s)"),
        ({"type": "image_url", "image_url": {"url": PNG + "!"}}, "messages[0].content[0].image_url.url", "base64"),
        (
            {"type": "image_url", "image_url": {"url": PNG, "detail": "x"}},
            "messages[0].content[0].image_url.detail",
            "low",
        ),
        (
            {"type": "input_audio", "input_audio": {"format": "ogg"}},
            "messages[0].content[0].input_audio.format",
            "wav or mp3",
        ),
        ({"type": "file", "file": {}}, "messages[0].content[0].file", "one of file_id and file_data"),
        ({"type": "video"}, "messages[0].content[0]", "must be a part of type text"),
    ],
)
def test_media_without_form_are_refused(part: Any, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)) as told:
        read({"role": "user", "content": [part]})
    assert told.value.param == param


def test_a_result_before_its_call_is_refused() -> None:
    with pytest.raises(InvalidRequest) as told:
        read(USER, RESULT, CALLING)
    assert told.value.param == "messages[1].tool_call_id"
    with pytest.raises(InvalidRequest):
        read(CALLING, {**RESULT, "content": None})


def test_all_arguments_together_hold_so_many_objects_and_lists() -> None:
    """Each call for itself kept to the bound of a body, and a body of such calls took a second to parse."""
    wide = {"role": "assistant", "tool_calls": [call(arguments=json.dumps({"a": [[]] * 30_000}))]}
    assert len(read(wide, wide)) == 2
    with pytest.raises(InvalidRequest, match="before it there are more than 65536 objects") as told:
        read(wide, wide, wide)
    assert told.value.param == "messages[2].tool_calls[0].function.arguments"
    text = {"role": "assistant", "tool_calls": [call(arguments=json.dumps({"code": "[{" * 40_000}))]}
    assert len(read(text, text)) == 2


def test_reading_takes_only_what_json_can_hold() -> None:
    wrongs: list[Any] = [None, "x", {}, []]
    for wrong in wrongs:
        with pytest.raises(InvalidRequest):
            read_messages(wrong)

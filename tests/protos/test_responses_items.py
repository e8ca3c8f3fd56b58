"""Items of a conversation: what they mean in canonical messages, how they are kept, what is refused and where.

Guards against a call that loses its reasoning or its text, a result without its call, and a stored conversation that
means something else when it is read again.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Media, Message, Reasoning, Refusal, Text
from diptych.protos.responses_items import MAX_ITEMS, ItemIds, ItemReader, UnknownItem, references

ID = "resp_" + "0" * 24
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "42"}


def read(items: list[Any], before: list[Any] | None = None, **referred: Any) -> tuple[list[Any], tuple[Message, ...]]:
    reader = ItemReader(ItemIds(ID), lambda sealed: sealed[1:] if sealed.startswith("!") else None, referred)
    reader.read(before or [], "previous_response_id")
    kept = reader.read(items, "input")
    return kept, reader.messages()


def user(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}], **more}


def thought(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}], **more}


def test_a_turn_is_what_an_assistant_thought_said_and_called() -> None:
    other = CALL | {"call_id": "c2"}
    kept, messages = read([user(), thought("hm"), said("I call."), CALL, other, RESULT, said("Done.")])
    assert [message.role for message in messages] == ["user", "assistant", "tool", "assistant"]
    turn = messages[1]
    assert (turn.reasoning_content, turn.content) == ("hm", "I call.")
    assert [(call.id, call.name, call.arguments) for call in turn.tool_calls] == [
        ("c1", "f", {"a": 1}),
        ("c2", "f", {"a": 1}),
    ]
    assert messages[2].result is not None
    assert (messages[2].result.call_id, messages[2].result.name, messages[2].content) == ("c1", "f", "42")
    assert len({item["id"] for item in kept}) == len(kept)
    assert {item["status"] for item in kept} == {"completed"}


def test_words_behind_a_call_belong_to_its_turn() -> None:
    """Templates want the result right behind the call."""
    _, messages = read([user(), CALL, said("wait"), RESULT])
    assert [message.role for message in messages] == ["user", "assistant", "tool"]
    assert messages[1].content == "wait"


def test_two_messages_of_an_assistant_are_two_turns() -> None:
    _, messages = read([user(), said("a"), said("b"), thought("x"), said("c")])
    assert [message.content for message in messages] == ["hi", "a", "b", "c"]


def test_strings_and_parts_of_every_role() -> None:
    items = [
        user("a"),
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "b"}]},
        {"role": "system", "content": "c"},
        {"role": "assistant", "content": "d", "phase": "final_answer"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "e"}]},
    ]
    kept, messages = read(items)
    assert [(message.role, message.content) for message in messages] == [
        ("user", "a"),
        ("developer", "b"),
        ("system", "c"),
        ("assistant", "d"),
        ("assistant", "e"),
    ]
    assert messages[4].parts == (Refusal("e"),)
    assert kept[0]["content"] == [{"type": "input_text", "text": "a"}]
    assert kept[3]["phase"] == "final_answer"


def test_media_are_parts_with_their_place() -> None:
    png = "data:image/png;base64,AAAA"
    parts = [
        {"type": "input_image", "image_url": png, "detail": "high"},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "input_file", "file_data": "AAAA", "filename": "a.pdf"},
        {"type": "input_file", "file_url": "https://a.example/b.pdf"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "input_text", "text": "t", "prompt_cache_breakpoint": {"mode": "explicit"}},
    ]
    kept, (message,) = read([{"role": "user", "content": parts}])
    kinds = [part.kind if isinstance(part, Media) else "text" for part in message.parts]
    assert kinds == ["image", "image", "file", "file", "audio", "text"]
    assert [part.path for part in message.media] == [f"input[0].content[{i}]" for i in range(5)]
    assert kept[0]["content"][0] == parts[0]


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (thought("a"), "a"),
        ({"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}], "id": "rs_1"}, "s"),
        ({"type": "reasoning", "summary": [], "encrypted_content": "!sealed"}, "sealed"),
        (thought("a", encrypted_content="!sealed"), "sealed"),
    ],
)
def test_reasoning_in_every_form(item: dict[str, Any], text: str) -> None:
    kept, (message,) = read([item])
    assert message.parts == (Reasoning(text), Text(""))
    assert kept[0].get("encrypted_content") == item.get("encrypted_content")


def test_what_was_kept_means_the_same_when_it_is_read_again() -> None:
    items = [user(), thought("hm", encrypted_content="!hm"), said("a"), CALL, RESULT, user("b")]
    kept, messages = read(items)
    stored = json.loads(json.dumps(kept))
    again, same = read([user("c")], before=stored)
    assert same[:-1] == messages
    assert same[-1].content == "c"
    assert read(stored)[0] == kept
    assert again[0]["id"] == "msg_" + "0" * 24 + "0000"


def test_a_call_that_was_cut_off_can_be_part_of_a_conversation() -> None:
    cut = CALL | {"arguments": '{"a": ', "status": "incomplete"}
    _, messages = read([user(), cut, RESULT])
    assert (messages[1].tool_calls[0].arguments, messages[1].tool_calls[0].text) == ({}, '{"a": ')


def test_references_stand_for_stored_items() -> None:
    stored = said("before", id="msg_1")
    items = [{"type": "item_reference", "id": "msg_1"}, {"id": "fc_1"}, RESULT]
    assert references(items) == ["msg_1", "fc_1"]
    kept, messages = read(items, msg_1=stored, fc_1=CALL | {"id": "fc_1"})
    assert [item["id"] for item in kept[:2]] == ["msg_1", "fc_1"]
    assert messages[0].content == "before"
    with pytest.raises(UnknownItem) as caught:
        read([{"type": "item_reference", "id": "msg_2"}])
    assert (caught.value.http_status, caught.value.param) == (404, "input[0].id")


WRONG: list[tuple[list[Any], str, str]] = [
    ([5], "input[0]", "object"),
    ([{"type": "computer_call"}], "input[0].type", "computer_call"),
    ([{"type": 5}], "input[0].type", "no string"),
    ([{"role": "user"}], "input[0].content", "missing"),
    ([{"role": "tool", "content": "a"}], "input[0].role", "must be user"),
    ([user(nonsense=1)], "input[0].nonsense", "unknown field"),
    ([user(status="done")], "input[0].status", "must be"),
    ([{"role": "user", "content": []}], "input[0].content", "must be a list"),
    ([{"role": "user", "content": [{"type": "output_text", "text": "a"}]}], "input[0].content[0].type", "input_text"),
    (
        [{"role": "assistant", "content": [{"type": "input_text", "text": "a"}]}],
        "input[0].content[0].type",
        "output_text",
    ),
    ([{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content[0]", "one of"),
    (
        [{"role": "user", "content": [{"type": "input_file", "file_id": "a", "file_url": "b"}]}],
        "input[0].content[0]",
        "one of",
    ),
    (
        [{"role": "user", "content": [{"type": "input_image", "image_url": "ftp://a"}]}],
        "input[0].content[0].image_url",
        "http",
    ),
    (
        [
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"}}
                ],
            }
        ],
        "input[0].content[0].prompt_cache_breakpoint",
        "no promised time",
    ),
    ([RESULT], "input[0].call_id", "no function_call before it"),
    ([CALL, RESULT, RESULT], "input[2].call_id", "answered"),
    ([CALL, CALL], "input[1].call_id", "its own"),
    ([CALL | {"arguments": {}}], "input[0].arguments", "not the object"),
    ([CALL | {"arguments": "["}], "input[0].arguments", "JSON of an object"),
    ([CALL | {"async": True}], "input[0].async", "not supported"),
    ([CALL | {"namespace": "n"}], "input[0].namespace", "not supported"),
    ([CALL | {"name": ""}], "input[0].name", "empty"),
    ([user(id="a", type="message"), said("b", id="a")], "input[1].id", "only what is new"),
    ([thought("a", encrypted_content="forged")], "input[0].encrypted_content", "was not made by this server"),
    ([{"type": "reasoning", "summary": [{"type": "x", "text": "a"}]}], "input[0].summary[0].type", "summary_text"),
    ([CALL | {"call_id": "x" * 257}], "input[0].call_id", "256"),
]


@pytest.mark.parametrize(("items", "param", "words"), WRONG, ids=[param for _, param, _ in WRONG])
def test_what_cannot_be_meant_is_refused_with_its_path(items: list[Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(items)
    assert caught.value.param == param
    assert words in str(caught.value)


def test_items_of_the_responses_before_count() -> None:
    """Else a conversation would grow without a bound, a few items at a time."""
    with pytest.raises(InvalidRequest, match=str(MAX_ITEMS)):
        read([user()], before=[user()] * MAX_ITEMS)
    with pytest.raises(InvalidRequest, match="only what is new"):
        read([said("a", id="msg_1")], before=[said("a", id="msg_1")])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["type", "role", "content", "id", "call_id", "name", "arguments", "output", "summary", "status"]
)
KINDS = st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "item_reference"])


@given(st.lists(st.dictionaries(FIELDS, JSON | KINDS, max_size=6) | JSON, max_size=4))
def test_nothing_but_an_error_that_names_a_path_comes_of_anything(items: list[Any]) -> None:
    params = []
    try:
        json.dumps(read(items)[0])
    except InvalidRequest as error:
        params.append(error.param or "")
    assert all(param.startswith("input") for param in params)

"""What the request schemas honour, accept at its default, and refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import FIXED, ChatRequest, CompletionRequest, parse_chat, parse_completion

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({**CHAT, **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({**TEXT, **fields}).encode())


def blamed(**fields: Any) -> str | None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param is None or caught.value.param in str(caught.value)
    return caught.value.param


HONOURED: list[tuple[str, Any]] = [
    ("max_tokens", 7),
    ("max_completion_tokens", 7),
    ("temperature", 0),
    ("temperature", 1.5),
    ("top_p", 0.5),
    ("top_k", 40),
    ("seed", -(2**63)),
    ("stream", True),
    ("ignore_eos", True),
    ("user", "u"),
    ("safety_identifier", "s"),
]


@pytest.mark.parametrize(("name", "value"), HONOURED)
def test_a_field_in_the_table_reaches_the_request_unchanged(name: str, value: Any) -> None:
    assert getattr(chat(**{name: value}), name) == value


@pytest.mark.parametrize("name", sorted(ChatRequest.fixed))
def test_a_fixed_field_is_accepted_at_each_of_its_defaults_and_refused_otherwise(name: str) -> None:
    for default in FIXED[name]:
        assert chat(**{name: default}) == chat()
    assert blamed(**{name: {"anything": "else"}}) == name


@pytest.mark.parametrize("name", sorted(CompletionRequest.fixed))
def test_a_fixed_field_of_completions_is_accepted_at_each_of_its_defaults(name: str) -> None:
    for default in FIXED[name]:
        assert completion(**{name: default}) == completion()
    with pytest.raises(InvalidRequest, match=name):
        completion(**{name: {"anything": "else"}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", True),
        ("n", 2),
        ("n", 10**300),
        ("logprobs", True),
        ("logprobs", 0),
        ("frequency_penalty", False),
        ("frequency_penalty", 0.1),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("chat_template", "{{ 1 }}"),
        ("prompt", "hi"),
        ("temperature", "0"),
        ("temperature", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 1.0),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 5.0),
        ("max_tokens", "5"),
        ("max_tokens", 2**63),
        ("seed", 2**63),
        ("seed", 1.0),
        ("stream", 1),
        ("stream", "true"),
        ("stop", 1),
        ("stop", [""]),
        ("stop", ["a", 1]),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("user", 1),
        ("metadata", {"a": 1}),
        ("metadata", []),
        ("metadata", {str(i): "" for i in range(17)}),
        ("model", None),
        ("model", ""),
        ("messages", []),
        ("messages", {}),
        ("messages", "hi"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(name: str, value: Any) -> None:
    assert blamed(**{name: value}) == name


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[0]"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 1}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": "x", "name": "n"}, "messages[0].name"),
        ({"role": "user", "content": "x", "extra": 1}, "messages[0].extra"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[0].content[0]"),
    ],
)
def test_a_bad_message_is_refused_with_its_path(message: Any, param: str) -> None:
    assert blamed(messages=[message]) == param


def test_what_clients_echo_back_from_an_answer_is_accepted() -> None:
    echoed: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
    }
    assert chat(messages=[echoed]).messages[0].content == "x"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "developer", "content": parts}]).messages[0].content == "ab"


def test_the_two_names_of_max_tokens_may_not_differ() -> None:
    assert chat(max_tokens=3, max_completion_tokens=3).wanted_tokens == 3
    assert blamed(max_tokens=3, max_completion_tokens=4) == "max_tokens"


def test_stream_options_need_a_stream() -> None:
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert not chat(stream=True, stream_options={}).include_usage
    assert blamed(stream_options={"include_usage": True}) == "stream_options"
    assert blamed(stream=True, stream_options={"include_obfuscation": True}) == "stream_options.include_obfuscation"
    assert blamed(stream=True, stream_options={"x": 1}) == "stream_options.x"


def test_stop_is_one_string_or_a_list_without_repetitions() -> None:
    assert chat(stop=None).stop == ()
    assert chat(stop="a").stop == ("a",)
    assert chat(stop=["a", "b", "a"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("hi", "hi"), (["hi"], "hi"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2)), ([-1, 2**31], (-1, 2**31))],
)
def test_a_prompt_is_one_text_or_one_list_of_ids(prompt: Any, wanted: Any) -> None:
    assert completion(prompt=prompt).prompt == wanted


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [""], ["a", "b"], [[1], [2]], [1.0], [True], [None], [1, "a"], {}, 1, None, [[["a"]]]]
)
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


def test_completions_generate_16_tokens_by_default() -> None:
    assert completion().wanted_tokens == 16
    assert chat().wanted_tokens is None

"""Bodies of /v1/responses: each field of today's client is honoured or refused by its name, none taken and forgotten.

Guards against a field that is accepted and changes nothing, and against a request that means something else than the
same one to chat.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import said
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.responses import CHAT_FIELDS, FIXED, ResponsesRequest, parse_input_tokens, parse_responses

BASE: dict[str, Any] = {"model": "m", "input": "hi"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
# Of openai 3.54's ResponseCreateParams.
FIELDS = """access_programs background background_options context_management conversation image include input
instructions max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls previous_response_id prompt
prompt_cache_key prompt_cache_options prompt_cache_retention reasoning safety_identifier service_tier store stream
stream_options temperature text tool_choice tools top_logprobs top_p truncation user""".split()


def parse(**fields: Any) -> ResponsesRequest:
    return parse_responses(json.dumps(BASE | fields).encode())


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    return caught.value


@pytest.mark.parametrize("field", [name for name in FIELDS if name not in ("model", "input")])
def test_every_field_of_the_client_is_known_and_may_be_null(field: str) -> None:
    parse(**{field: None})


HONOURED: dict[str, Any] = {
    "background": True,
    "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
    "instructions": "Be brief.",
    "max_output_tokens": 5,
    "max_tool_calls": 3,
    "metadata": {"a": "b"},
    "parallel_tool_calls": False,
    "previous_response_id": "resp_1",
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "store": False,
    "temperature": 0.5,
    "top_p": 0.5,
    "truncation": "auto",
    "user": "u",
    "tools": [TOOL],
    "tool_choice": "none",
}


@pytest.mark.parametrize("field", sorted(HONOURED))
def test_a_response_repeats_its_request(field: str) -> None:
    request = parse(**{field: HONOURED[field]})
    told = request.told()
    if field == "tools":
        assert told[field] == [TOOL | {"strict": True}]
    elif field in told:
        assert told[field] == HONOURED[field]
    elif field != "include":
        assert getattr(request.chat, field) == HONOURED[field]


def test_what_a_field_means_is_what_chats_field_means() -> None:
    """One road behind the readers."""
    nested = {"type": "function", "function": {name: value for name, value in TOOL.items() if name != "type"}}
    chat = parse_chat(
        json.dumps(
            {
                "model": "m",
                "messages": [{"role": "user", "content": "hi"}],
                "tools": [nested],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "parallel_tool_calls": False,
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
                "reasoning_effort": "low",
                "logprobs": True,
                "top_logprobs": 2,
                "temperature": 0.5,
                "seed": 4,
                "stop": ["x"],
                "logit_bias": {"5": 1},
                "priority": 3,
            }
        ).encode()
    )
    here = parse(
        tools=[TOOL],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": None}},
        reasoning={"effort": "low"},
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        temperature=0.5,
        seed=4,
        stop=["x"],
        logit_bias={"5": 1},
        priority=3,
    ).as_chat((said("user", "hi"),))
    for name in ChatRequest.model_fields:
        one, other = getattr(chat, name), getattr(here, name)
        if name == "output_form":
            assert (one.value, one.name, other.path) == (other.value, other.name, "text.format.schema")
            assert not other.is_guided
        else:
            assert one == other, name


@pytest.mark.parametrize("field", sorted(FIXED))
def test_what_is_not_offered_is_refused_by_its_name(field: str) -> None:
    for default in FIXED[field]:
        parse(**{field: default})
    samples = ["other", 1, {"a": 1}, [1], True]
    for sample in samples:
        error = refused(**{field: sample})
        assert (error.param, error.message.startswith(field)) == (field, True)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": 5}, "input"),
    ({"input": []}, "input"),
    ({"model": None}, "model"),
    ({"nonsense": 1}, "nonsense"),
    ({"n": 2}, "n"),
    ({"messages": []}, "messages"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"logprobs": True}, "logprobs"),
    ({"response_format": {"type": "text"}}, "response_format"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": True}, "max_output_tokens"),
    ({"max_tool_calls": 0}, "max_tool_calls"),
    ({"temperature": 3}, "temperature"),
    ({"truncation": "middle"}, "truncation"),
    ({"include": ["everything"]}, "include[0]"),
    ({"include": "all"}, "include"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
    ({"metadata": {"a": "x" * 513}}, "metadata"),
    ({"metadata": {"x" * 65: "a"}}, "metadata"),
    ({"prompt_cache_key": "x" * 513}, "prompt_cache_key"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
    ({"background": True, "store": False}, "background"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    ({"reasoning": {"effort": "highest"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"reasoning": {"budget": 1}}, "reasoning.budget"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "text", "name": "n"}}}, "text.format.name"),
    ({"text": {"other": 1}}, "text.other"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "custom", "name": "c"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].function"),
    ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [TOOL | {"output_schema": SCHEMA}]}, "tools[0].output_schema"),
    ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "any", "tools": [TOOL]}}, "tool_choice.mode"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [5]}}, "tool_choice.tools[0]"),
    ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[f"{n}-{param}" for n, (_, param) in enumerate(WRONG)])
def test_what_is_wrong_is_refused_with_its_path(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


def test_the_input_may_be_missing_where_there_is_something_to_go_on_from() -> None:
    assert parse(input=[], previous_response_id="resp_1").items == ()


def test_counting_tokens_takes_the_fields_that_count() -> None:
    body = BASE | {"instructions": "a", "tools": [TOOL], "truncation": "disabled", "text": {}, "reasoning": {}}
    assert parse_input_tokens(json.dumps(body).encode()).tools.use is not None
    for field in ("stream", "personality", "store", *sorted(CHAT_FIELDS)):
        with pytest.raises(InvalidRequest) as caught:
            parse_input_tokens(json.dumps(BASE | {field: None}).encode())
        assert caught.value.param == field

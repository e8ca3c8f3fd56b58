"""Anthropic's requests: what its client sends is taken, all else is refused with its path and never dropped.

Guards against fields that are accepted and ignored, results of tools that lose their call, and errors that speak of
fields by the names of another wire format.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from diptych.protos.anthropic_messages import MessagesRequest, Thinking, parse_count, parse_messages, renamed
from diptych.protos.anthropic_replies import content_of, error_body, error_status, signature_of, thought_in
from diptych.protos.errors import (
    ContextTooLong,
    DeadlineExceeded,
    DiptychError,
    EngineLost,
    Forbidden,
    InvalidRequest,
    Overloaded,
    RateLimited,
    RequestTooLarge,
    Unauthorized,
    UnknownModel,
)
from diptych.protos.messages import Media, Message, Reasoning, Text, ToolCall, ToolResult

USER = {"role": "user", "content": "hi"}
TOOL = {"name": "f", "description": "does f", "input_schema": {"type": "object", "properties": {"a": {}}}}
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": [1, "\u00f6"]}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "done"}
CALLING = {"role": "assistant", "content": [{"type": "text", "text": "See: "}, USE]}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}


def read(**fields: Any) -> MessagesRequest:
    return parse_messages(json.dumps({"model": "m", "max_tokens": 100, "messages": [USER], **fields}).encode())


def said(*messages: Any) -> tuple[Message, ...]:
    return read(messages=list(messages)).messages


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_a_short_request() -> None:
    request = read(system="Be kind.", temperature=1, top_p=0.5, top_k=3, stop_sequences=["a", "b"], stream=True)
    assert [(message.role, message.content) for message in request.messages] == [("system", "Be kind."), ("user", "hi")]
    assert (request.temperature, request.top_p, request.top_k, request.stop) == (1, 0.5, 3, ("a", "b"))
    assert (request.max_tokens, request.stream, request.cuts_to_fit) == (100, True, True)
    assert request.template.generation_prompt
    assert request.include_reasoning is False


def test_blocks_of_a_user_are_paragraphs_and_those_of_an_answer_are_not() -> None:
    user, assistant = said(
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": [text("d"), text("e")]},
    )
    assert user.content == "a\n\nb\n\nc"
    assert assistant.content == "de"
    calling, *_ = said(CALLING, {"role": "assistant", "content": "so"}, {"role": "user", "content": [RESULT]})
    assert [type(part) for part in calling.parts] == [Text, ToolCall, Text, Text]
    assert read(system=[text("x"), text("y")]).messages[0].content == "x\n\ny"


def test_results_of_tools_are_messages_before_what_the_user_says() -> None:
    other = USE | {"id": "t2"}
    calling = {"role": "assistant", "content": [USE, other]}
    results = [RESULT, {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": [text("no"), IMAGE]}]
    _, assistant, first, second, user = said(USER, calling, {"role": "user", "content": [*results, text("so?")]})
    assert assistant.tool_calls[0] == ToolCall(
        id="t1", name="f", arguments={"a": [1, "\u00f6"]}, text='{"a":[1,"\u00f6"]}'
    )
    assert first.result == ToolResult(call_id="t1", name="f", parts=(Text("done"),))
    assert second.result is not None
    assert second.result.is_error
    assert [type(part) for part in second.result.parts] == [Text, Text, Media]
    assert (user.role, user.content) == ("user", "so?")


def test_documents_and_search_results_that_are_texts_become_text() -> None:
    document = {
        "type": "document",
        "title": "T",
        "context": "old",
        "source": {"type": "text", "media_type": "text/plain", "data": "body"},
        "citations": {"enabled": False},
    }
    found = {"type": "search_result", "source": "http://x", "title": "S", "content": [text("one"), text("two")]}
    content = said({"role": "user", "content": [document, found]})[0].content
    assert content == "Document: T\nold\n\nbody\n\nSearch result: S\nSource: http://x\n\none\n\ntwo"
    parts = {"type": "document", "source": {"type": "content", "content": [text("a"), IMAGE]}}
    assert [part.kind for part in said({"role": "user", "content": [parts]})[0].media] == ["image"]
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}}
    (media,) = said({"role": "user", "content": [pdf]})[0].media
    assert (media.kind, media.media_type, media.path) == ("file", "application/pdf", "messages[0].content[0]")


def test_thinking_comes_back_with_its_text_or_in_its_signature() -> None:
    shown = {"type": "thinking", "thinking": "hm", "signature": signature_of("hm", carries=False)}
    omitted = {"type": "thinking", "thinking": "", "signature": signature_of("h\u00f6m", carries=True)}
    foreign = {"type": "thinking", "thinking": "", "signature": "EqQBCkYIBBgC"}
    for block, wanted in ((shown, "hm"), (omitted, "h\u00f6m"), (foreign, "")):
        _, message, _ = said(USER, {"role": "assistant", "content": [block, text("ok")]}, USER)
        assert message.parts[0] == Reasoning(wanted, signature=str(block["signature"]))
        assert message.content == "ok"
    redacted = {"type": "redacted_thinking", "data": "sealed"}
    _, message, _ = said(USER, {"role": "assistant", "content": [redacted, text("x")]}, USER)
    assert message.parts[0] == Reasoning("sealed", is_redacted=True), "its maker wants it back"
    assert thought_in("t1.!") is None


def test_a_last_message_of_the_assistant_begins_the_answer() -> None:
    request = read(messages=[USER, {"role": "assistant", "content": "It is ("}])
    assert request.template.continue_final
    assert not request.template.generation_prompt
    empty = read(messages=[USER, {"role": "assistant", "content": []}])
    assert [message.role for message in empty.messages] == ["user"]
    assert not empty.template.continue_final


@pytest.mark.parametrize(
    ("choice", "mode", "names", "parallel", "is_named"),
    [
        (None, "auto", ("f", "g"), True, False),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", ("f", "g"), False, False),
        ({"type": "any"}, "required", ("f", "g"), True, False),
        ({"type": "tool", "name": "g"}, "required", ("g",), True, True),
        ({"type": "none"}, "none", (), True, False),
    ],
)
def test_choices_of_tools(choice: Any, mode: str, names: Any, parallel: bool, is_named: bool) -> None:
    other = {"type": "custom", "name": "g", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}
    use = read(tools=[TOOL, other], tool_choice=choice).tool_use
    assert use is not None
    assert (use.mode, use.names, use.parallel, use.is_named) == (mode, names, parallel, is_named)
    assert use.tools[1].parameters == {"type": "object", "properties": {}}
    assert read(tool_choice={"type": "auto"}).tool_use is None


def test_examples_of_inputs_are_told() -> None:
    use = read(tools=[TOOL | {"input_examples": [{"a": 1}, {"a": 2}]}]).tool_use
    assert use is not None
    assert use.tools[0].description == 'does f\n\nExamples of its input:\n{"a":1}\n{"a":2}'


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_the_form_of_an_answer(field: str) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    request = read(**{field: {"format": form, "effort": "max"} if field == "output_config" else form})
    assert request.output_form is not None
    assert request.output_form.schema == {"type": "object"}
    assert not request.output_form.is_guided
    path = "output_config.format.schema" if field == "output_config" else "output_format.schema"
    assert request.output_form.path == path
    assert request.template.variables.get("reasoning_effort") == ("high" if field == "output_config" else None)
    assert request.template.asked_effort == ("max" if field == "output_config" else None)


def test_thinking() -> None:
    assert (read().thinking, read(thinking={"type": "disabled"}).thinking) == (Thinking(), Thinking(is_told=True))
    request = read(thinking={"type": "enabled", "budget_tokens": 99, "display": "omitted"})
    assert request.thinking == Thinking(is_told=True, is_on=True, budget=99, is_omitted=True)
    assert (request.reasoning_budget, request.include_reasoning) == (99, True)
    assert request.template.variables == {"enable_thinking": True, "thinking": True}
    assert read(thinking={"type": "adaptive"}).thinking == Thinking(is_told=True, is_on=True)
    off = {"enable_thinking": False, "thinking": False}
    assert (read().template.variables, read().template.implied) == ({}, off)
    told = read(thinking={"type": "disabled"}).template
    assert (told.variables, told.implied) == (off, {})


def test_what_changes_nothing_here_is_taken() -> None:
    read(
        cache_control={"type": "ephemeral", "ttl": "1h"},
        service_tier="standard_only",
        speed="standard",
        container=None,
        diagnostics={"previous_message_id": None},
        mcp_servers=[],
        metadata={"user_id": "u"},
    )
    assert read(seed=5, timeout_s=3, priority=1).seed == 5
    for keep in ("all", {"type": "all"}):  # as coding agents send it
        read(context_management={"edits": [{"type": "clear_thinking_20251015", "keep": keep}]})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1e3}, "max_tokens"),
    ({"model": None}, "model"),
    ({"thread": {"type": "create"}}, "thread"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "assistant", "content": []}]}, "messages"),
    ({"messages": [USER | {"name": "x"}]}, "messages[0].name"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [CALLING, {"role": "user", "content": [text("x"), RESULT]}]}, "messages[1].content[1]"),
    ({"messages": [CALLING, {"role": "user", "content": [RESULT, RESULT]}]}, "messages[1].content[1].tool_use_id"),
    ({"messages": [{"role": "assistant", "content": [USE, USE]}]}, "messages[0].content[1].id"),
    ({"messages": [{"role": "assistant", "content": [USE | {"input": "{}"}]}]}, "messages[0].content[0].input"),
    (
        {"messages": [{"role": "assistant", "content": [USE | {"caller": {"type": "x"}}]}]},
        "messages[0].content[0].caller",
    ),
    ({"messages": [USER, CALLING]}, "messages"),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": 5}]}]},
        "messages[0].content[0].data",
    ),
    ({"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [text("x") | {"foo": 1}]}]}, "messages[0].content[0].foo"),
    (
        {"messages": [{"role": "user", "content": [text("x") | {"citations": [{}]}]}]},
        "messages[0].content[0].citations",
    ),
    (
        {"messages": [{"role": "user", "content": [IMAGE | {"transformations": {"a": 1}}]}]},
        "messages[0].content[0].transformations",
    ),
    ({"system": [IMAGE]}, "system[0].type"),
    ({"system": 5}, "system"),
    ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, "the request.cache_control.ttl"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"stop": ["x"]}, "stop"),
    ({"n": 2}, "n"),
    ({"metadata": {"user": "u"}}, "metadata.user"),
    ({"metadata": {"user_id": 5}}, "metadata.user_id"),
    ({"reasoning_budget": 5}, "reasoning_budget"),
    ({"cuts_to_fit": True}, "cuts_to_fit"),
    ({"temperature": 3}, "temperature"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "budget_tokens": 5}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "display": "all"}}, "thinking.display"),
    ({"thinking": {"type": "adaptive"}, "messages": [USER, {"role": "assistant", "content": "x"}]}, "thinking"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [TOOL | {"input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name"),
    ({"tools": [TOOL | {"parameters": {}}]}, "tools[0].parameters"),
    ({"tools": [TOOL | {"type": "computer_20250124"}]}, "tools[0].type"),
    ({"tools": [TOOL | {"allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "none", "disable_parallel_tool_use": True}},
        "tool_choice.disable_parallel_tool_use",
    ),
    (
        {"tools": [TOOL], "tool_choice": {"type": "any"}, "messages": [USER, {"role": "assistant", "content": "x"}]},
        "tool_choice",
    ),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=[f"{number}-{param}" for number, (_, param) in enumerate(BAD)])
def test_what_cannot_be_meant_is_refused_with_its_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    assert caught.value.param == param
    assert param in caught.value.message


def test_a_count_takes_the_conversation_alone() -> None:
    body: dict[str, Any] = {"model": "m", "messages": [USER], "thinking": {"type": "enabled", "budget_tokens": 2000}}
    assert parse_count(json.dumps(body | {"tools": [TOOL], "system": "x"}).encode()).messages[1].content == "hi"
    for name in ("max_tokens", "stream", "temperature"):
        with pytest.raises(InvalidRequest, match=name):
            parse_count(json.dumps(body | {name: 1}).encode())


def test_fields_have_the_names_of_this_wire_format() -> None:
    assert renamed("stop has 17 strings; the limit is 16") == "stop_sequences has 17 strings; the limit is 16"
    assert renamed("tool_calls[2].function.arguments: $.a is no number") == "the input of tool_use 2: $.a is no number"
    assert renamed("reasoning_budget cannot be kept") == "thinking.budget_tokens cannot be kept"
    assert renamed("the stopped one") == "the stopped one"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("x"), 400, "invalid_request_error"),
        (ContextTooLong("x"), 400, "invalid_request_error"),
        (Unauthorized("x"), 401, "authentication_error"),
        (Forbidden("x"), 403, "permission_error"),
        (UnknownModel("x"), 404, "not_found_error"),
        (RequestTooLarge("x"), 413, "request_too_large"),
        (RateLimited("x"), 429, "rate_limit_error"),
        (Overloaded("x"), 529, "overloaded_error"),
        (EngineLost("x"), 503, "api_error"),
        (DeadlineExceeded("x"), 504, "timeout_error"),
        (DiptychError("x"), 500, "api_error"),
    ],
)
def test_errors(error: DiptychError, status: int, kind: str) -> None:
    assert error_status(error) == status
    details = {"error_code": error.code, "param": None}
    told = {"type": kind, "message": "x", "details": details}
    assert error_body(error, "id") == {"type": "error", "error": told, "request_id": "id"}


def test_the_input_of_a_call_that_was_cut_is_empty() -> None:
    begun = {"type": "content_block_start", "index": 0, "content_block": USE | {"input": {}}}
    delta = {"type": "input_json_delta", "partial_json": '{"a": [1'}
    assert content_of([begun, {"type": "content_block_delta", "index": 0, "delta": delta}])[0]["input"] == {}

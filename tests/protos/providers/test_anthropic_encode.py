"""Requests for Anthropic's format: what stands where, and that nothing a client asked for is lost without a note.

Guards against turns that do not alternate, blank texts, ids that the format refuses, thinking and sampling that a model
answers 400 to, and reasoning of others that is sent as if it were the provider's own.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from diptych.protos.anthropic_messages import parse_messages
from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Media, Message, Reasoning, Refusal, Text, ToolCall, ToolResult, said
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.openai_template import Scalar, TemplateOptions
from diptych.protos.providers.anthropic import MessagesCodec
from diptych.protos.providers.codec import Codec, Outgoing
from diptych.protos.providers.quirks import Quirks

CODEC: Codec = MessagesCodec()
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "g"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 2}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "q", "schema": SCHEMA, "description": "why"}}
ALL_MEDIA = Quirks(family="anthropic", media=frozenset({"image", "file"}), prefill=True)
PIXEL = base64.b64encode(b"\x89PNG").decode()


def chat(**fields: Any) -> ChatRequest:
    budget = fields.pop("reasoning_budget", None)  # which other wire formats say
    request = parse_chat(json.dumps({"model": "x", "messages": [USER], **fields}).encode())
    return request.model_copy(update={"reasoning_budget": budget})


def with_messages(*messages: Message, **fields: Any) -> ChatRequest:
    return chat(**fields).model_copy(update={"messages": messages})


def encode(request: ChatRequest, model: str = "claude-sonnet-4-5", quirks: Quirks = ALL_MEDIA) -> Outgoing:
    return CODEC.encode(request, model=model, stream=False, quirks=quirks)


def notes(sent: Outgoing, kind: str = "unsupported") -> set[str]:
    return {note.field for note in sent.notes if note.kind == kind}


def content(*messages: Message) -> list[Any]:
    return [(turn["role"], turn["content"]) for turn in encode(with_messages(*messages)).body["messages"]]


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def test_a_short_request() -> None:
    sent = CODEC.encode(chat(max_tokens=9), model="claude-haiku-4-5", stream=True, quirks=Quirks())
    assert sent.path == "/messages"
    assert sent.headers == {"anthropic-version": "2023-06-01"}
    assert sent.body == {
        "model": "claude-haiku-4-5",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": [words("hi")]}],
        "stream": True,
    }
    assert sent.notes == ()


def test_turns_alternate_and_results_come_first() -> None:
    call = ToolCall(id="t1", name="f", arguments={"a": 1}, text='{"a":1}')
    result = ToolResult(call_id="t1", name="f", parts=(Text("no"),), is_error=True)
    sent = encode(
        with_messages(
            said("system", "be"),
            said("developer", "kind"),
            said("user", "a"),
            said("user", "b"),
            Message(role="assistant", parts=(Text("see "), Text("here"), call)),
            said("user", "early"),
            Message(role="tool", parts=(result,)),
            said("system", "late"),
            said("user", "c"),
        )
    )
    assert sent.body["system"] == [words("be"), words("kind"), words("late")]
    first, second, third = sent.body["messages"]
    assert (first["role"], first["content"]) == ("user", [words("a"), words("b")])
    use = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
    assert second["content"] == [words("see "), words("here"), use]
    told = {"type": "tool_result", "tool_use_id": "t1", "content": [words("no")], "is_error": True}
    assert third["content"] == [told, words("early"), words("c")]
    assert "messages[7]" in notes(sent, "moved")
    assert sent.body["tools"] == [{"name": "f", "input_schema": {"type": "object"}}]
    assert sent.body["tool_choice"] == {"type": "none"}


def test_blank_texts_are_no_blocks() -> None:
    sent = encode(with_messages(said("user", "a"), said("assistant", " \n"), said("user", "b")))
    assert [turn["role"] for turn in sent.body["messages"]] == ["user"]
    assert notes(sent, "moved") == {"messages[1]", "max_tokens"}
    with pytest.raises(InvalidRequest, match="hold nothing") as caught:
        encode(with_messages(said("user", " ")))
    assert caught.value.param == "messages"


def test_ids_are_of_the_formats_letters_and_no_two_the_same() -> None:
    parts = [ToolCall(id=i, name="f", arguments={}, text="{}") for i in ("functions.f:0", "call_0", "call_0")]
    messages = [said("user", "a")]
    for call in parts:
        messages.append(Message(role="assistant", parts=(call,)))
        messages.append(Message(role="tool", parts=(ToolResult(call_id=call.id, name="f", parts=(Text(call.id),)),)))
    sent = encode(with_messages(*messages))
    blocks = [block for turn in sent.body["messages"][1:] for block in turn["content"]]
    made = [block["id"] for block in blocks if block["type"] == "tool_use"]
    assert len(set(made)) == 3
    assert made[1:] == ["call_0", "call_0_2"]
    assert [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"] == made
    assert notes(sent, "renamed") == {"messages[].tool_calls[].id"}


def test_media() -> None:
    parts = (
        Media(kind="image", path="p0", media_type="image/png", data=PIXEL, detail="high"),
        Media(kind="image", path="p1", url="https://a.b/c.png"),
        Media(kind="file", path="p2", media_type="application/pdf", data=PIXEL, name="a.pdf"),
        Media(kind="file", path="p3", media_type="text/csv", data=base64.b64encode(b"a,b").decode()),
    )
    sent = encode(with_messages(Message(role="user", parts=parts)))
    assert sent.body["messages"][0]["content"] == [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
        {"type": "image", "source": {"type": "url", "url": "https://a.b/c.png"}},
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": PIXEL},
            "title": "a.pdf",
        },
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a,b"}},
    ]
    assert notes(sent) == {"p0.detail"}


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (Media(kind="audio", path="p", media_type="audio/wav", data=PIXEL), "no sounds"),
        (Media(kind="image", path="p", media_type="image/bmp", data=PIXEL), "is image/bmp: image/jpeg"),
        (Media(kind="file", path="p", media_type="application/zip", data=PIXEL), "is application/zip"),
        (Media(kind="file", path="p", media_type="text/plain", data=base64.b64encode(b"\xff").decode()), "UTF-8"),
        (Media(kind="file", path="p", file_id="file-1"), "file_id"),
    ],
)
def test_media_that_cannot_be_sent_are_an_error_at_their_place(part: Media, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        encode(with_messages(Message(role="user", parts=(part,))))
    assert caught.value.param == "p"


def test_reasoning_goes_back_to_its_maker_alone() -> None:
    kept = Reasoning("hm", signature="EqQBCkYIBBgC")
    redacted = Reasoning("Zm9v", is_redacted=True)
    strange = (
        Reasoning("own", signature="d1.abc="),  # of an answer that was made here
        Reasoning("bare"),
        Reasoning("other", signature="AAA", provider_data={"gemini": {"x": 1}}),
    )
    answer = Message(role="assistant", parts=(kept, redacted, *strange, Text("so")))
    sent = encode(with_messages(said("user", "a"), answer, said("user", "b")))
    assert sent.body["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "EqQBCkYIBBgC"},
        {"type": "redacted_thinking", "data": "Zm9v"},
        words("so"),
    ]
    assert "messages[1].reasoning" in notes(sent, "moved")
    quirks = Quirks(replay_reasoning="required")
    bare = {"type": "thinking", "thinking": "bare", "signature": ""}
    for model, goes_back in (("MiniMax-M3", True), ("claude-opus-5", False)):
        sent = encode(with_messages(said("user", "a"), answer, said("user", "b")), model, quirks)
        assert (bare in sent.body["messages"][1]["content"]) is goes_back


def test_what_others_said_of_parts_stays_here() -> None:
    cached = Text("a", {"anthropic": {"cache_control": {"type": "ephemeral"}, "x": 1}, "openai": {"cache_control": 1}})
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"q": "?"}}
    answer = Text("b", {"anthropic": {"blocks": [search]}, "gemini": {"blocks": [{"type": "no"}]}})
    first, second, _ = content(
        Message(role="user", parts=(cached,)), Message(role="assistant", parts=(answer,)), said("user", "c")
    )
    assert first == ("user", [words("a") | {"cache_control": {"type": "ephemeral"}}])
    assert second == ("assistant", [words("b"), search])


def test_refusals_are_texts() -> None:
    sent = encode(
        with_messages(said("user", "a"), Message(role="assistant", parts=(Refusal("no"),)), said("user", "b"))
    )
    assert sent.body["messages"][1]["content"] == [words("no")]
    assert "messages[1].refusal" in notes(sent, "moved")


def test_a_last_message_of_the_assistant_is_gone_on_with_where_that_can_be() -> None:
    messages = [USER, {"role": "assistant", "content": "It is ( "}]
    request = chat(messages=messages, continue_final_message=True)
    sent = encode(request)
    assert sent.body["messages"][1]["content"] == [words("It is (")]
    assert "messages[1].content" in notes(sent, "moved")
    for model, quirks in (("claude-opus-4-6", ALL_MEDIA), ("claude-sonnet-4-5", Quirks())):
        sent = encode(request, model, quirks)
        assert [turn["role"] for turn in sent.body["messages"]] == ["user"]
        assert notes(sent) == {"continue_final_message"}
    with pytest.raises(InvalidRequest, match="continue_final_message: true"):
        encode(chat(messages=messages))
    with pytest.raises(InvalidRequest, match=r"End with a user's message$"):
        encode(chat(messages=messages), "claude-opus-5")
    calling = Message(role="assistant", parts=(ToolCall(id="t", name="f", arguments={}, text="{}"),))
    with pytest.raises(InvalidRequest, match="send their results"):
        encode(with_messages(said("user", "a"), calling))


@pytest.mark.parametrize(
    ("fields", "choice", "offered"),
    [
        ({}, None, 2),
        ({"tool_choice": "none"}, {"type": "none"}, 2),
        ({"tool_choice": "required"}, {"type": "any"}, 2),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}, 2),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            {"type": "tool", "name": "g", "disable_parallel_tool_use": True},
            2,
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "g"}}],
                    },
                }
            },
            {"type": "any"},
            1,
        ),
    ],
)
def test_tools_and_the_choice_among_them(fields: dict[str, Any], choice: object, offered: int) -> None:
    sent = encode(chat(tools=[TOOL, OTHER], max_tokens=9, **fields))
    assert sent.body.get("tool_choice") == choice
    assert len(sent.body["tools"]) == offered
    if offered == 2:
        assert sent.body["tools"][0] == {
            "name": "f",
            "description": "d",
            "input_schema": {"type": "object", "properties": {}},
        }
    assert not sent.notes


def test_tools_that_the_format_or_the_model_does_not_take() -> None:
    dotted = {"type": "function", "function": {"name": "files.read"}}
    with pytest.raises(InvalidRequest, match=r"files\.read") as caught:
        encode(chat(tools=[dotted]))
    assert caught.value.param == "tools[0].function.name"
    either = {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    sent = encode(chat(tools=[{"type": "function", "function": {"name": "f", "parameters": either}}]))
    (tool,) = sent.body["tools"]
    assert tool["input_schema"] == {"type": "object", "properties": {}}
    assert '"anyOf"' in tool["description"]
    assert notes(sent, "adapted") == {"tools[0].function.parameters"}
    for model, quirks in (("claude-opus-5-5", Quirks()), ("claude-opus-5", Quirks(tool_choice="auto_only"))):
        sent = encode(chat(tools=[TOOL], tool_choice="required"), model, quirks)
        assert "tool_choice" not in sent.body
        assert notes(sent) == {"tool_choice"}


def test_a_schema_is_sent_in_the_formats_dialect() -> None:
    sent = encode(chat(response_format=FORM))
    form = sent.body["output_config"]["format"]
    assert form["type"] == "json_schema"
    assert form["schema"]["additionalProperties"] is False
    assert form["schema"]["description"].startswith("why")
    assert "minimum" not in form["schema"]["properties"]["a"]
    assert any(note.kind == "adapted" for note in sent.notes)
    for request, model, quirks in (
        (chat(response_format=FORM), "claude-sonnet-4-0", Quirks()),
        (chat(response_format=FORM), "claude-sonnet-4-5", Quirks(schema_dialect="none")),
        (chat(response_format={"type": "json_object"}), "claude-sonnet-4-5", Quirks()),
        (chat(guided_regex="a+"), "claude-sonnet-4-5", Quirks()),
    ):
        sent = encode(request, model, quirks)
        assert "output_config" not in sent.body
        assert len(notes(sent)) == 1
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    endless = {"type": "json_schema", "json_schema": {"name": "q", "schema": tree}}
    assert len(notes(encode(chat(response_format=endless)))) == 1


@pytest.mark.parametrize(
    ("model", "fields", "thinking", "effort", "unsupported"),
    [
        ("claude-sonnet-4-5", {"reasoning_budget": 2000}, {"type": "enabled", "budget_tokens": 2000}, None, set()),
        ("claude-sonnet-4-5", {"reasoning_effort": "low"}, {"type": "enabled", "budget_tokens": 2048}, None, set()),
        ("claude-sonnet-4-5", {"reasoning_effort": "none"}, None, None, set()),
        ("claude-sonnet-4-5", {"reasoning_budget": 99}, None, None, {"reasoning_budget"}),
        (
            "claude-sonnet-4-5",
            {"reasoning_budget": 5000, "max_tokens": 3000},
            {"type": "enabled", "budget_tokens": 2999},
            None,
            set(),
        ),
        ("claude-opus-4-5", {"reasoning_effort": "low"}, {"type": "enabled", "budget_tokens": 2048}, "low", set()),
        ("claude-opus-4-6", {"reasoning_effort": "minimal"}, {"type": "adaptive"}, "low", set()),
        ("claude-opus-4-6", {"reasoning_budget": 2000}, {"type": "enabled", "budget_tokens": 2000}, None, set()),
        (
            "claude-opus-4-7",
            {"reasoning_budget": 2000},
            {"type": "adaptive", "display": "summarized"},
            None,
            {"reasoning_budget"},
        ),
        (
            "claude-sonnet-5",
            {"reasoning_effort": "high", "include_reasoning": False},
            {"type": "adaptive", "display": "omitted"},
            "high",
            set(),
        ),
        ("claude-sonnet-5", {"include_reasoning": True}, {"type": "adaptive", "display": "summarized"}, None, set()),
        ("claude-sonnet-5", {}, None, None, set()),
        ("claude-sonnet-5", {"chat_template_kwargs": {"thinking": False}}, {"type": "disabled"}, None, set()),
        ("claude-sonnet-5-5", {"reasoning_effort": "none"}, {"type": "between_tools"}, None, set()),
        ("claude-opus-5-5", {"reasoning_effort": "none"}, {"type": "adaptive", "display": "omitted"}, "low", set()),
        ("claude-3-5-haiku-latest", {"reasoning_effort": "low"}, None, None, {"reasoning_effort"}),
        ("MiniMax-M3", {"reasoning_effort": "medium"}, {"type": "enabled", "budget_tokens": 8192}, None, set()),
    ],
)
def test_reasoning_is_asked_for_as_the_model_takes_it(
    model: str, fields: dict[str, Any], thinking: object, effort: str | None, unsupported: set[str]
) -> None:
    sent = encode(chat(**fields), model)
    assert sent.body.get("thinking") == thinking
    assert sent.body.get("output_config", {}).get("effort") == effort
    assert notes(sent) == unsupported
    if isinstance(thinking, dict) and "budget_tokens" in thinking:
        assert sent.body["max_tokens"] > thinking["budget_tokens"]


@pytest.mark.parametrize(
    ("model", "effort", "said"),
    [
        ("claude-opus-4-6", "max", "max"),
        ("claude-opus-4-6", "xhigh", "high"),
        ("claude-opus-4-7", "xhigh", "xhigh"),
        ("claude-opus-4-5", "max", "high"),
    ],
)
def test_the_highest_efforts_reach_models_that_know_them_and_are_noted_elsewhere(
    model: str, effort: str, said: str
) -> None:
    """They became `high` when the request was read, before anybody knew who would answer it, and nobody was told."""
    form = {"model": "m", "max_tokens": 90_000, "messages": [{"role": "user", "content": "a"}]}
    told = parse_messages(json.dumps({**form, "output_config": {"effort": effort}}).encode())
    for request in (chat(reasoning_effort=effort), told):
        sent = encode(request, model)
        assert sent.body["output_config"] == {"effort": said}
        words = [note.words for note in sent.notes if note.field == "reasoning_effort" and "nearest" in note.words]
        assert words == ([] if said == effort else [f"{said}, the nearest that this model knows"])


def test_an_effort_in_a_providers_own_field() -> None:
    quirks = Quirks(effort_field="output_config.effort", effort_values={"minimal": "low"})
    sent = encode(chat(reasoning_effort="minimal"), "deepseek-v4", quirks)
    assert sent.body["output_config"] == {"effort": "low"}
    assert "thinking" not in sent.body
    sent = encode(chat(reasoning_effort="low"), "deepseek-v4", Quirks(effort_field=""))
    assert notes(sent) == {"reasoning_effort"}


def test_thinking_with_a_budget_does_not_begin_where_it_is_refused() -> None:
    forced = chat(tools=[TOOL], tool_choice="required", reasoning_budget=2000)
    assert notes(encode(forced)) == {"reasoning_budget"}
    call = ToolCall(id="t", name="f", arguments={}, text="{}")
    done = Message(role="tool", parts=(ToolResult(call_id="t", name="f", parts=(Text("x"),)),))
    signed = Reasoning("hm", signature="EqQB")
    for parts, wanted in (((call,), {"reasoning_budget"}), ((signed, call), set())):
        messages = (said("user", "a"), Message(role="assistant", parts=parts), done)
        sent = encode(with_messages(*messages, tools=[TOOL], reasoning_budget=2000, max_tokens=4000))
        assert notes(sent) == set()
        assert notes(sent, "moved") == wanted
        assert ("thinking" in sent.body) is not bool(wanted)


@pytest.mark.parametrize(
    ("model", "fields", "sent_fields", "unsupported"),
    [
        (
            "claude-3-haiku-20240307",
            {"temperature": 0.5, "top_p": 0.5, "top_k": 5},
            {"temperature", "top_p", "top_k"},
            set(),
        ),
        ("claude-sonnet-4-5", {"temperature": 0.5, "top_p": 0.5}, {"temperature"}, {"top_p"}),
        ("claude-sonnet-4-5", {"temperature": 1, "top_p": 0.5}, {"top_p"}, set()),
        ("claude-sonnet-4-5", {"temperature": 1.5}, set(), {"temperature"}),
        (
            "claude-sonnet-4-5",
            {"temperature": 0.5, "top_k": 3, "reasoning_budget": 2000},
            set(),
            {"temperature", "top_k"},
        ),
        ("claude-sonnet-4-5", {"temperature": 1, "top_p": 0.97, "reasoning_budget": 2000}, {"top_p"}, set()),
        ("claude-opus-4-7", {"temperature": 0, "top_p": 0.5}, set(), {"temperature", "top_p"}),
        ("claude-opus-4-7", {"temperature": 1, "top_p": 1, "top_k": -1}, set(), set()),
    ],
)
def test_sampling_that_a_model_refuses_is_a_note(
    model: str, fields: dict[str, Any], sent_fields: set[str], unsupported: set[str]
) -> None:
    sent = encode(chat(max_tokens=4000, **fields), model)
    assert {"temperature", "top_p", "top_k"} & sent.body.keys() == sent_fields
    assert notes(sent) == unsupported


def test_the_later_version_of_the_api_has_no_sampling() -> None:
    quirks = Quirks(headers={"anthropic-version": "2026-10-21"})
    sent = encode(chat(temperature=0.5), "claude-3-haiku", quirks)
    assert notes(sent) == {"temperature"}
    assert sent.headers == {"anthropic-version": "2026-10-21"}


def test_what_the_format_has_no_word_for_is_a_note() -> None:
    fields = {
        "min_p": 0.1,
        "seed": 1,
        "presence_penalty": 1,
        "frequency_penalty": 0,
        "logit_bias": {"5": 1},
        "logprobs": True,
        "stop": ["\n\n", "end"],
        "chat_template_kwargs": {"style": "dry"},
        "add_generation_prompt": False,
        "repetition_penalty": 1,
    }
    sent = encode(chat(**fields, user="u", max_tokens=9))
    wanted = {"min_p", "seed", "presence_penalty", "logit_bias", "logprobs", "stop[0]", "chat_template_kwargs.style"}
    assert notes(sent) == wanted | {"add_generation_prompt"}
    assert sent.body["stop_sequences"] == ["end"]
    assert sent.body["metadata"] == {"user_id": "u"}
    named = encode(chat(messages=[USER | {"name": "Ann"}], max_tokens=9))
    assert notes(named) == {"messages[0].name"}


def test_a_number_of_tokens_is_always_sent() -> None:
    for model, quirks, number in (
        ("claude-opus-5", Quirks(), 16_384),
        ("claude-3-haiku", Quirks(), 4096),
        ("other", Quirks(default_max_tokens=77), 77),
    ):
        sent = encode(chat(), model, quirks)
        assert sent.body["max_tokens"] == number
        assert notes(sent, "moved") == {"max_tokens"}
    many = chat(max_tokens=100_000).model_copy(update={"cuts_to_fit": True})
    assert encode(many).body["max_tokens"] == 64_000
    assert encode(chat(max_tokens=100_000)).body["max_tokens"] == 100_000


def test_options_come_last_and_betas_are_a_header() -> None:
    options = {"anthropic": {"anthropic_beta": ["b"], "service_tier": "auto", "max_tokens": 5}, "groq": {"x": 1}}
    quirks = Quirks(family="anthropic", headers={"anthropic-beta": "a", "x-y": "z"}, extra_body={"speed": "standard"})
    sent = encode(chat(max_tokens=9, provider_options=options), quirks=quirks)
    assert sent.headers == {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b", "x-y": "z"}
    assert sent.body["service_tier"] == "auto"
    assert (sent.body["max_tokens"], sent.body["speed"]) == (5, "standard")
    assert "x" not in sent.body
    assert notes(sent, "moved") == {"provider_options.anthropic.max_tokens"}
    for name, value in (("model", "m"), ("messages", []), ("stream", True), ("anthropic_beta", "a,b")):
        with pytest.raises(InvalidRequest) as caught:
            encode(chat(provider_options={"anthropic": {name: value}}), quirks=quirks)
        assert caught.value.param == f"provider_options.anthropic.{name}"


def test_quirks_take_out_and_rename_with_notes() -> None:
    quirks = Quirks(unsupported=frozenset({"stop_sequences", "metadata"}), rename={"max_tokens": "max_len"})
    sent = encode(chat(stop="x", user="u", max_tokens=9), quirks=quirks)
    assert sent.body.keys() == {"model", "messages", "max_len"}
    assert notes(sent) == {"stop"}
    assert "omitted" in {note.kind for note in sent.notes if note.field == "user"}
    assert notes(sent, "renamed") == {"max_tokens"}


def test_googles_address_names_the_model() -> None:
    quirks = Quirks(extra_body={"anthropic_version": "vertex-2023-10-16"}, headers={"anthropic-beta": "a"})
    request = chat(max_tokens=9)
    sent = CODEC.encode(request, model="claude-sonnet-4@20250514", stream=True, quirks=quirks)
    assert sent.path == "/claude-sonnet-4@20250514:streamRawPredict"
    assert encode(request, "claude-sonnet-4", quirks).path == "/claude-sonnet-4:rawPredict"
    assert "model" not in sent.body
    assert (sent.body["anthropic_version"], sent.body["anthropic_beta"]) == ("vertex-2023-10-16", ["a"])
    assert sent.headers == {}


def test_encoding_changes_neither_the_request_nor_the_quirks() -> None:
    quirks = Quirks(family="anthropic", extra_body={"output_config": {"x": 1}})
    request = chat(tools=[TOOL], response_format=FORM, provider_options={"anthropic": {"output_config": {"y": 2}}})
    before = repr(request), repr(quirks)
    first, second = encode(request, quirks=quirks), encode(request, quirks=quirks)
    assert first == second
    assert (repr(request), repr(quirks)) == before
    assert first.body["output_config"].keys() == {"format", "x", "y"}


def test_systems_words_with_the_first_user_where_there_is_no_place_for_them() -> None:
    request = with_messages(said("system", "be"), said("user", "a"))
    sent = encode(request, quirks=Quirks(system_role="first_user"))
    assert "system" not in sent.body
    assert sent.body["messages"] == [{"role": "user", "content": [words("be"), words("a")]}]


def test_contents_as_strings_and_a_field_of_what_is_begun() -> None:
    quirks = Quirks(flattens_content=True, prefill=True, prefill_field="partial", media=frozenset({"image"}))
    image = Media(kind="image", path="p", url="https://a.b/c.png")
    messages = (
        said("system", "be"),
        Message(role="user", parts=(image, Text("a"))),
        said("assistant", "b"),
        said("user", "c"),
        said("user", "d"),
        said("assistant", "e"),
    )
    begun = TemplateOptions(continue_final=True, generation_prompt=False)
    request = with_messages(*messages).model_copy(update={"template": begun})
    body = encode(request, "kimi-k3", quirks).body
    assert body["system"] == "be"
    assert body["messages"][0]["content"][1] == words("a")
    assert [turn["content"] for turn in body["messages"][1:]] == ["b", "c\n\nd", "e"]
    assert body["messages"][-1]["partial"] is True


def test_arguments_that_are_no_json_go_back_as_a_text() -> None:
    call = ToolCall(id="t", name="f", arguments={}, text='{"a": [1,')
    done = Message(role="tool", parts=(ToolResult(call_id="t", name="f", parts=(Text("x"),)),))
    sent = encode(with_messages(said("user", "a"), Message(role="assistant", parts=(call,)), done))
    assert sent.body["messages"][1]["content"][0]["input"] == {"INVALID_JSON": '{"a": [1,'}


def test_an_effort_beside_reasoning_that_is_not_told() -> None:
    """As a request in this format arrives that has an effort and no thinking."""
    variables: dict[str, Scalar] = {"enable_thinking": False, "thinking": False, "reasoning_effort": "high"}
    request = chat(include_reasoning=False).model_copy(update={"template": TemplateOptions(variables=variables)})
    sent = encode(request, "claude-opus-5")
    assert sent.body["output_config"] == {"effort": "high"}
    assert sent.body["thinking"] == {"type": "adaptive", "display": "omitted"}

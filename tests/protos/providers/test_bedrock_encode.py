"""Requests for Bedrock's Converse: what stands where for the models of which maker, and no loss without a note.

Guards against fields that one maker's models take and another's answer 400 to, and parts that it has no word for.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Media, Message, Reasoning, Text, ToolCall, ToolResult, said
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.providers.bedrock import ConverseCodec
from diptych.protos.providers.bedrock_models import model_of
from diptych.protos.providers.codec import Codec, Outgoing
from diptych.protos.providers.quirks import Quirks

CODEC: Codec = ConverseCodec()
CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
NOVA, LLAMA, OSS = "amazon.nova-pro-v1:0", "us.meta.llama3-3-70b-instruct-v1:0", "openai.gpt-oss-120b-1:0"
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "description": " d ", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "g"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 2}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "my form", "schema": SCHEMA, "description": "why"}}
QUIRKS = Quirks(family="bedrock", media=frozenset({"image", "file", "audio"}), prefill=True)
PIXEL = base64.b64encode(b"\x89PNG").decode()
NAMED = {"type": "function", "function": {"name": "g"}}


def chat(**fields: Any) -> ChatRequest:
    budget = fields.pop("reasoning_budget", None)  # which other wire formats say
    request = parse_chat(json.dumps({"model": "x", "messages": [USER], **fields}).encode())
    return request.model_copy(update={"reasoning_budget": budget})


def with_messages(*messages: Message, **fields: Any) -> ChatRequest:
    return chat(**fields).model_copy(update={"messages": messages})


def encode(request: ChatRequest, model: str = CLAUDE, quirks: Quirks = QUIRKS) -> Outgoing:
    return CODEC.encode(request, model=model, stream=False, quirks=quirks)


def notes(sent: Outgoing, kind: str = "unsupported") -> set[str]:
    return {note.field for note in sent.notes if note.kind == kind}


def extra(sent: Outgoing) -> dict[str, Any]:
    found: dict[str, Any] = sent.body.get("additionalModelRequestFields", {})
    return found


def test_a_short_request() -> None:
    sent = CODEC.encode(chat(), model=CLAUDE, stream=True, quirks=Quirks(headers={"x-y": "z"}))
    assert sent.path == "/model/us.anthropic.claude-sonnet-4-5-20250929-v1%3A0/converse-stream"
    assert sent.body == {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}
    assert (sent.headers, sent.notes) == ({"x-y": "z"}, ())
    arn = "arn:aws:bedrock:us-east-1:1:inference-profile/us.anthropic.claude-opus-5"
    assert encode(chat(), arn).path == f"/model/{arn.replace(':', '%3A').replace('/', '%2F')}/converse"


@pytest.mark.parametrize(
    ("name", "maker", "version"),
    [
        (CLAUDE, "anthropic", (4, 5)),
        ("arn:aws:bedrock:us-east-1:1:inference-profile/eu.anthropic.claude-opus-4-7", "anthropic", (4, 7)),
        ("arn:aws:bedrock:us-east-1::foundation-model/amazon.nova-lite-v1:0", "amazon", None),
        ("us-gov.anthropic.claude-3-haiku-20240307-v1:0", "anthropic", (3, 0)),
        ("arn:aws:bedrock:us-east-1:1:application-inference-profile/abc123", "", None),
        ("deepseek.v3.2", "deepseek", None),
        ("my-import", "", None),
    ],
)
def test_models_by_their_names(name: str, maker: str, version: tuple[int, int] | None) -> None:
    model = model_of(name)
    assert model.maker == maker
    assert (model.claude.version if model.claude else None) == version


def test_messages() -> None:
    call = ToolCall(id="t:1", name="f", arguments={"a": 1}, text='{"a":1}')
    image = Media(kind="image", path="p", media_type="image/png", data=PIXEL)
    result = ToolResult(call_id="t:1", name="f", parts=(Text("no"), image), is_error=True)
    sent = encode(
        with_messages(
            said("system", "be"),
            said("user", "a"),
            said("user", " "),
            Message(role="assistant", parts=(Reasoning("hm", "EqQB"), Reasoning("Zm8=", is_redacted=True), call)),
            Message(role="tool", parts=(result,)),
            said("user", "b"),
            tools=[TOOL],
        )
    )
    assert sent.body["system"] == [{"text": "be"}]
    assert sent.body["messages"] == [
        {"role": "user", "content": [{"text": "a"}]},
        {
            "role": "assistant",
            "content": [
                {"reasoningContent": {"reasoningText": {"text": "hm", "signature": "EqQB"}}},
                {"reasoningContent": {"redactedContent": "Zm8="}},
                {"toolUse": {"toolUseId": "t:1", "name": "f", "input": {"a": 1}}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "toolResult": {
                        "toolUseId": "t:1",
                        "content": [{"text": "no"}, {"image": {"format": "png", "source": {"bytes": PIXEL}}}],
                        "status": "error",
                    }
                },
                {"text": "b"},
            ],
        },
    ]
    assert notes(sent, "moved") == {"messages[2]"}
    nova = encode(
        with_messages(
            said("user", "a"), Message(role="assistant", parts=(Reasoning("hm", "EqQB"), Text("x"))), said("user", "b")
        ),
        NOVA,
    )
    assert nova.body["messages"][1]["content"] == [{"text": "x"}]
    assert notes(nova, "moved") == {"messages[1].reasoning"}


def test_reasoning_goes_back_to_models_that_take_it() -> None:
    answer = Message(role="assistant", parts=(Reasoning("hm"), Text("x")))
    request = with_messages(said("user", "a"), answer, said("user", "b"))
    bare = {"reasoningContent": {"reasoningText": {"text": "hm"}}}
    for model, replay, goes_back in (
        ("us.deepseek.r1-v1:0", "required", True),
        ("us.deepseek.r1-v1:0", "strip", False),
        (CLAUDE, "required", False),  # which wants a proof of it
        (NOVA, "required", False),
    ):
        sent = encode(request, model, Quirks(replay_reasoning=replay))  # type: ignore[arg-type]
        assert (bare in sent.body["messages"][1]["content"]) is goes_back


def test_results_of_tools_as_their_model_takes_them() -> None:
    call = ToolCall(id="t", name="f", arguments={}, text="{}")
    for model, text, wanted in (
        (CLAUDE, "x", {"text": "x"}),
        (CLAUDE, "", {"json": {}}),
        ("mistral.mistral-large-2407-v1:0", "x", {"json": {"result": "x"}}),
        ("mistral.mistral-large-2407-v1:0", '{"a":1}', {"json": {"a": 1}}),
    ):
        done = Message(role="tool", parts=(ToolResult(call_id="t", name="f", parts=(Text(text),)),))
        request = with_messages(said("user", "a"), Message(role="assistant", parts=(call,)), done, tools=[TOOL])
        sent = encode(request, model)
        assert sent.body["messages"][2]["content"][0]["toolResult"]["content"] == [wanted]


def test_media() -> None:
    parts = (
        Media(kind="image", path="p", url="s3://bucket/a.jpg"),
        Media(kind="file", path="p", media_type="application/pdf", data=PIXEL, name="my_file v1.2.pdf"),
        Media(kind="file", path="p", media_type="text/markdown", data=PIXEL),
        Media(kind="file", path="p", media_type="text/csv", data=PIXEL),
        Media(kind="audio", path="p", media_type="audio/mpeg", data=PIXEL),
    )
    content = encode(with_messages(Message(role="user", parts=parts))).body["messages"][0]["content"]
    source = {"bytes": PIXEL}
    assert content == [
        {"image": {"format": "jpeg", "source": {"s3Location": {"uri": "s3://bucket/a.jpg"}}}},
        {"document": {"name": "my file v1 2", "format": "pdf", "source": source}},
        {"document": {"name": "document", "format": "md", "source": source}},
        {"document": {"name": "document 2", "format": "csv", "source": source}},
        {"audio": {"format": "mp3", "source": source}},
    ]
    for part, told in (
        (Media(kind="image", path="p", url="https://a.b/c.png"), "send the data themselves"),
        (Media(kind="image", path="p", media_type="image/bmp", data=PIXEL), "png, jpeg, gif, webp"),
        (Media(kind="file", path="p", file_id="f"), "file_id"),
        (Media(kind="image", path="p", media_type="image/png", data="a"), "no base64"),
    ):
        with pytest.raises(InvalidRequest, match=told) as caught:
            encode(with_messages(Message(role="user", parts=(part,))))
        assert caught.value.param == "p"
    with pytest.raises(InvalidRequest, match="no sounds"):
        encode(with_messages(Message(role="user", parts=parts[4:])), quirks=Quirks())


def test_points_of_a_cache_and_citations_go_back() -> None:
    text = Text("a", {"bedrock": {"cachePoint": {"type": "default"}}, "anthropic": {"cache_control": {}}})
    cited = Text("b", {"bedrock": {"citations": [{"title": "t"}]}})
    sent = encode(
        with_messages(Message(role="user", parts=(text,)), Message(role="assistant", parts=(cited,)), said("user", "c"))
    )
    assert [turn["content"] for turn in sent.body["messages"]] == [
        [{"text": "a"}, {"cachePoint": {"type": "default"}}],
        [{"citationsContent": {"content": [{"text": "b"}], "citations": [{"title": "t"}]}}],
        [{"text": "c"}],
    ]


@pytest.mark.parametrize(
    ("model", "fields", "choice", "fields_of_claude", "unsupported"),
    [
        (CLAUDE, {}, None, {}, set()),
        (CLAUDE, {"tool_choice": "required"}, {"any": {}}, {}, set()),
        (NOVA, {"tool_choice": NAMED}, {"tool": {"name": "g"}}, {}, set()),
        (
            CLAUDE,
            {"tool_choice": NAMED},
            None,
            {"tool_choice": {"type": "tool", "name": "g", "disable_parallel_tool_use": True}},
            set(),
        ),
        (
            CLAUDE,
            {"parallel_tool_calls": False},
            None,
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            set(),
        ),
        (NOVA, {"parallel_tool_calls": False}, None, {}, {"parallel_tool_calls"}),
        (LLAMA, {"tool_choice": "required"}, None, {}, {"tool_choice"}),
        ("us.anthropic.claude-opus-5-5", {"tool_choice": "required"}, None, {}, {"tool_choice"}),
    ],
)
def test_tools_and_the_choice_among_them(
    model: str, fields: dict[str, Any], choice: object, fields_of_claude: object, unsupported: set[str]
) -> None:
    sent = encode(chat(tools=[TOOL, OTHER], **fields), model)
    config = sent.body["toolConfig"]
    spec = {"name": "f", "description": "d", "inputSchema": {"json": {"type": "object", "properties": {}}}}
    assert config["tools"][0] == {"toolSpec": spec}
    assert len(config["tools"]) == 2
    assert config.get("toolChoice") == choice
    assert extra(sent) == fields_of_claude
    assert notes(sent) == unsupported


def test_no_calls_are_wanted() -> None:
    assert "toolConfig" not in encode(chat(tools=[TOOL], tool_choice="none")).body
    call = Message(role="assistant", parts=(ToolCall(id="t", name="f", arguments={}, text="{}"),))
    done = Message(role="tool", parts=(ToolResult(call_id="t", name="f", parts=(Text("x"),)),))
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        request = with_messages(said("user", "a"), call, done, **fields)
        sent = encode(request)
        assert len(sent.body["toolConfig"]["tools"]) == 1
        assert extra(sent) == {"tool_choice": {"type": "none"}}
        assert notes(sent) == set()
        assert notes(encode(request, NOVA)) == ({"tool_choice"} if fields else set())
    with pytest.raises(InvalidRequest, match=r"files\.read") as caught:
        encode(chat(tools=[{"type": "function", "function": {"name": "files.read"}}]))
    assert caught.value.param == "tools[0].function.name"


def test_settings() -> None:
    fields = {"temperature": 0.5, "top_k": 5, "stop": ["a", "b"], "max_tokens": 9, "user": "u-1"}
    sent = encode(chat(**fields))
    settings = {"temperature": 0.5, "stopSequences": ["a", "b"], "maxTokens": 9}
    assert sent.body["inferenceConfig"] == settings
    assert extra(sent) == {"top_k": 5}
    assert sent.body["additionalModelResponseFieldPaths"] == ["/stop_sequence"]
    assert sent.body["requestMetadata"] == {"user": "u-1"}
    assert sent.notes == ()
    sent = encode(chat(**fields, top_p=0.5), NOVA)
    assert sent.body["inferenceConfig"] == settings | {"topP": 0.5}
    assert extra(sent) == {"inferenceConfig": {"topK": 5}}
    assert notes(encode(chat(**fields), LLAMA)) == {"top_k"}
    assert notes(encode(chat(temperature=0.5), "xai.grok-4-7")) == {"temperature"}
    assert notes(encode(chat(temperature=0.5), "us.anthropic.claude-opus-4-8")) == {"temperature"}
    sent = encode(chat(user="\u00f6", safety_identifier="\u00e4", seed=1, min_p=0.5))
    assert notes(sent) == {"seed", "min_p"}
    assert [note.kind for note in sent.notes if note.field == "user"] == ["omitted", "omitted"]
    assert notes(encode(chat(stop=["a", "b"]), quirks=Quirks(most_stops=1))) == {"stop[1]"}


@pytest.mark.parametrize(
    ("model", "fields", "wanted", "unsupported"),
    [
        (CLAUDE, {"reasoning_budget": 2000}, {"thinking": {"type": "enabled", "budget_tokens": 2000}}, set()),
        (
            "anthropic.claude-opus-4-6-v1",
            {"reasoning_effort": "low"},
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
            set(),
        ),
        (
            "anthropic.claude-opus-4-5-v1",
            {"reasoning_effort": "low"},
            {"thinking": {"type": "enabled", "budget_tokens": 2048}},
            set(),
        ),
        (OSS, {"reasoning_effort": "minimal"}, {"reasoning_effort": "low"}, set()),
        (OSS, {"reasoning_budget": 2000}, {}, {"reasoning_budget"}),
        (OSS, {"reasoning_effort": "none"}, {}, set()),
        ("openai.gpt-6-sol", {"reasoning_effort": "none"}, {"reasoning": {"effort": "none"}}, set()),
        ("qwen.qwen3-32b-v1:0", {"reasoning_effort": "medium"}, {"reasoning_config": "high"}, set()),
        ("qwen.qwen3-coder-30b", {"reasoning_effort": "low"}, {}, {"reasoning_effort"}),
        ("deepseek.v3.2", {"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "high"}, set()),
        (
            "amazon.nova-2-lite-v1:0",
            {"reasoning_effort": "high", "max_tokens": 9, "temperature": 0.5},
            {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": "high"}},
            {"max_tokens", "temperature"},
        ),
        (NOVA, {"reasoning_effort": "low"}, {}, {"reasoning_effort"}),
    ],
)
def test_reasoning_is_asked_for_as_the_model_takes_it(
    model: str, fields: dict[str, Any], wanted: object, unsupported: set[str]
) -> None:
    sent = encode(chat(**fields), model)
    assert extra(sent) == wanted
    assert notes(sent) == unsupported
    if "reasoning_budget" in fields and wanted:
        assert sent.body["inferenceConfig"]["maxTokens"] > 2000


@pytest.mark.parametrize(("model", "said"), [("openai.gpt-6-sol", "max"), ("xai.grok-5", "high")])
def test_the_highest_effort_is_told_where_the_model_knows_it_and_noted_where_not(model: str, said: str) -> None:
    sent = encode(chat(reasoning_effort="max"), model)
    assert extra(sent) == {"reasoning": {"effort": said}}
    assert [note.words for note in sent.notes] == ([] if said == "max" else ["reasoning.effort high"])


def test_an_effort_in_a_field_of_its_own() -> None:
    quirks = Quirks(effort_field="thinking.level", effort_values={"high": "max"})
    sent = encode(chat(reasoning_effort="high"), "my-import", quirks)
    assert extra(sent) == {"thinking": {"level": "max"}}
    assert notes(encode(chat(reasoning_effort="high"), OSS, Quirks(effort_field=""))) == {"reasoning_effort"}


def test_a_schema_is_a_text() -> None:
    for model in (CLAUDE, OSS, "my-import"):
        sent = encode(chat(response_format=FORM), model)
        form = sent.body["outputConfig"]["textFormat"]
        assert form["type"] == "json_schema"
        told = form["structure"]["jsonSchema"]
        assert (told["name"], told["description"]) == ("my_form", "why")
        assert json.loads(told["schema"])["additionalProperties"] is False
    for model in (LLAMA, NOVA, "anthropic.claude-sonnet-4-20250514-v1:0"):
        sent = encode(chat(response_format=FORM), model)
        assert "outputConfig" not in sent.body
        assert len(notes(sent)) == 1
    assert len(notes(encode(chat(response_format={"type": "json_object"})))) == 1


def test_a_last_message_of_the_assistant() -> None:
    request = chat(messages=[USER, {"role": "assistant", "content": "It "}], continue_final_message=True)
    assert encode(request).body["messages"][1]["content"] == [{"text": "It"}]
    assert notes(encode(request, NOVA)) == {"continue_final_message"}


def test_options_come_last() -> None:
    guardrail = {"guardrailIdentifier": "g", "guardrailVersion": "1"}
    options = {"bedrock": {"guardrailConfig": guardrail, "additionalModelRequestFields": {"anthropic_beta": ["b"]}}}
    sent = encode(chat(top_k=5, provider_options=options))
    assert sent.body["guardrailConfig"] == guardrail
    assert extra(sent) == {"top_k": 5, "anthropic_beta": ["b"]}
    with pytest.raises(InvalidRequest) as caught:
        encode(chat(provider_options={"bedrock": {"messages": []}}))
    assert caught.value.param == "provider_options.bedrock.messages"
    quirks = Quirks(unsupported=frozenset({"inferenceConfig.topP", "toolConfig.toolChoice"}), family="bedrock")
    sent = encode(chat(top_p=0.5, tools=[TOOL], tool_choice="required"), NOVA, quirks)
    assert sent.body["inferenceConfig"] == {}
    assert notes(sent) == {"top_p", "tool_choice"}

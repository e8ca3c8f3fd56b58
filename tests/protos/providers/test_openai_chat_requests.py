"""Canonical requests as bodies of OpenAI's chat format: what the makers' own types accept, and what comes back.

Guards against parts of a conversation that get lost on their way to a provider, fields that a provider would refuse or
ignore without anybody being told, and data of one provider that reach another.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParams
from pydantic import TypeAdapter

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Media, Message, Reasoning, Refusal, Text, ToolCall, ToolResult
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.providers.codec import Note, Outgoing
from diptych.protos.providers.openai_chat import ChatCodec
from diptych.protos.providers.quirks import Quirks

CODEC = ChatCodec()
JUDGE: TypeAdapter[Any] = TypeAdapter(CompletionCreateParams)
ALL_MEDIA = frozenset({"image", "audio", "file"})
# A provider that takes whatever there are words for.
OPEN = Quirks(
    system_role="developer",
    schema_dialect="openai",
    replay_reasoning="optional",
    media=ALL_MEDIA,
    most_stops=16,
    rename={
        name: name for name in ("top_k", "min_p", "guided_regex", "continue_final_message", "chat_template_kwargs")
    },
)
USER = {"role": "user", "content": "hi"}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
OTHER = {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}}


def a_request(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "route", "messages": list(messages) or [USER], **fields}).encode())


def encoded(request: ChatRequest, quirks: Quirks = Quirks(), *, stream: bool = False) -> Outgoing:  # noqa: B008
    return CODEC.encode(request, model="m", stream=stream, quirks=quirks)


def of(outgoing: Outgoing, kind: str) -> dict[str, str]:
    return {note.field: note.words for note in outgoing.notes if note.kind == kind}


WORDS = st.text("ab \n", min_size=1, max_size=4)
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk=", "detail": "low"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}
FILE = {"type": "file", "file": {"file_data": "data:application/pdf;base64,aGk=", "filename": "a.pdf"}}
PARTS = st.lists(
    WORDS.map(lambda text: {"type": "text", "text": text}) | st.sampled_from([IMAGE, SOUND, FILE]),
    min_size=2,
    max_size=3,
)
NAMED = st.fixed_dictionaries({}, optional={"name": st.just("ann")})
TURN = st.one_of(
    st.builds(
        lambda role, text, name: [{"role": role, "content": text, **name}],
        st.sampled_from(["system", "developer"]),
        WORDS,
        NAMED,
    ),
    st.builds(lambda content, name: [{"role": "user", "content": content, **name}], WORDS | PARTS, NAMED),
    st.builds(
        lambda content, more: [{"role": "assistant", "content": content, **more}],
        WORDS,
        st.fixed_dictionaries({}, optional={"refusal": WORDS, "reasoning_content": WORDS}),
    ),
    st.builds(
        lambda text, more, results: [
            {
                "role": "assistant",
                "content": text,
                "tool_calls": [
                    {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": i})}}
                    for i, _ in enumerate(results)
                ],
                **more,
            },
            *({"role": "tool", "tool_call_id": f"c{i}", "content": result} for i, result in enumerate(results)),
        ],
        st.none() | WORDS,
        st.fixed_dictionaries({}, optional={"reasoning_content": WORDS}),
        st.lists(WORDS, min_size=1, max_size=2),
    ),
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.5]),
        "top_p": st.just(0.9),
        "top_k": st.just(5),
        "min_p": st.just(0.1),
        "seed": st.just(3),
        "presence_penalty": st.just(0.5),
        "frequency_penalty": st.just(-1),
        "logit_bias": st.just({"5": 2}),
        "stop": st.just(["x", "y"]),
        "max_completion_tokens": st.just(9),
        "user": st.just("u"),
        "safety_identifier": st.just("s"),
        "reasoning_effort": st.just("low"),
        "chat_template_kwargs": st.just({"language": "en"}),
        "tools": st.just([TOOL, OTHER]),
        "parallel_tool_calls": st.booleans(),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TURN, min_size=1, max_size=4),
    FIELDS,
    st.sampled_from(["none", "auto", "required", "named", None]),
    st.booleans(),
)
def test_a_request_comes_back_as_it_was(
    turns: list[Any], fields: dict[str, Any], choice: str | None, stream: bool
) -> None:
    if "tools" not in fields:
        fields.pop("parallel_tool_calls", None)
    elif choice is not None:
        fields["tool_choice"] = {"type": "function", "function": {"name": "g"}} if choice == "named" else choice
    request = a_request(*(message for turn in turns for message in turn), **fields)
    outgoing = encoded(request, OPEN, stream=stream)
    assert not outgoing.unsupported
    body = json.loads(json.dumps(outgoing.body))
    assert body.pop("model") == "m"
    JUDGE.validate_python({"model": "m", **body})
    back = parse_chat(json.dumps({"model": "route", **body}).encode())
    assert back.messages == request.messages
    before, after = request.tool_use, back.tool_use
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert (after.tools, after.mode, after.names, after.is_named) == (
            before.tools,
            before.mode,
            before.names,
            before.is_named,
        )
        assert before.mode == "none" or after.most_calls == before.most_calls
    same = set(ChatRequest.model_fields) - {"messages", "tool_use", "stream", "stream_options"}
    assert {name: getattr(back, name) for name in same} == {name: getattr(request, name) for name in same}
    assert back.include_usage == stream


def test_a_parameter_that_the_provider_lacks_is_noted_and_not_sent() -> None:
    request = a_request(top_k=5, min_p=0.1, logprobs=True, seed=1, guided_regex="a+", chat_template_kwargs={"x": 1})
    outgoing = encoded(request, Quirks(unsupported=frozenset({"seed"})))
    assert set(of(outgoing, "unsupported")) == {
        "top_k",
        "min_p",
        "logprobs",
        "seed",
        "guided_regex",
        "chat_template_kwargs.x",
    }
    assert outgoing.body.keys() == {"model", "messages"}
    assert outgoing.unsupported == outgoing.notes


def test_values_that_ask_for_nothing_are_no_ones_loss() -> None:
    request = a_request(top_k=-1, min_p=0, repetition_penalty=1, logprobs=False, ignore_eos=False)
    assert encoded(request).notes == ()


@pytest.mark.parametrize(
    ("asked", "rename", "sent", "notes"),
    [
        ("max_tokens", {}, "max_completion_tokens", {"max_tokens": "max_completion_tokens"}),
        ("max_completion_tokens", {}, "max_completion_tokens", {}),
        ("max_tokens", {"max_completion_tokens": "max_tokens"}, "max_tokens", {}),
        (
            "max_completion_tokens",
            {"max_completion_tokens": "max_tokens"},
            "max_tokens",
            {"max_completion_tokens": "max_tokens"},
        ),
    ],
)
def test_a_limit_has_the_name_that_the_provider_knows(
    asked: str, rename: dict[str, str], sent: str, notes: dict[str, str]
) -> None:
    outgoing = encoded(a_request(**{asked: 7}), Quirks(rename=rename))
    assert outgoing.body[sent] == 7
    assert of(outgoing, "renamed") == notes
    assert len({"max_tokens", "max_completion_tokens"} & outgoing.body.keys()) == 1


def test_a_provider_without_names_hears_none() -> None:
    outgoing = encoded(a_request(USER | {"name": "ann"}), Quirks(unsupported=frozenset({"name"})))
    assert outgoing.body["messages"] == [USER]
    assert list(of(outgoing, "unsupported")) == ["messages[0].name"]


def test_more_stops_than_the_provider_takes_are_unsupported() -> None:
    outgoing = encoded(a_request(stop=list("abcde")))
    assert (outgoing.body["stop"], list(of(outgoing, "unsupported"))) == (list("abcd"), ["stop"])
    assert encoded(a_request(stop=list("abcde")), Quirks(most_stops=16)).notes == ()
    assert "stop" not in encoded(a_request(stop="a"), Quirks(most_stops=0)).body


@pytest.mark.parametrize(
    ("fields", "quirks", "sent", "kind"),
    [
        ({"reasoning_effort": "low"}, Quirks(), {"reasoning_effort": "low"}, None),
        (
            {"reasoning_effort": "low"},
            Quirks(effort_field="reasoning.effort"),
            {"reasoning": {"effort": "low"}},
            "renamed",
        ),
        (
            {"reasoning_effort": "low"},
            Quirks(effort_values={"low": "minimal"}),
            {"reasoning_effort": "minimal"},
            "renamed",
        ),
        ({"reasoning_effort": "low"}, Quirks(effort_field=""), {}, "unsupported"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, Quirks(), {"reasoning_effort": "none"}, "moved"),
        (
            {"reasoning_budget": 9},
            Quirks(rename={"reasoning_budget": "thinking.budget"}),
            {"thinking": {"budget": 9}},
            "renamed",
        ),
        ({"reasoning_budget": 9}, Quirks(), {}, "unsupported"),
    ],
)
def test_efforts_are_asked_for_as_the_provider_wants(
    fields: dict[str, Any], quirks: Quirks, sent: dict[str, Any], kind: str | None
) -> None:
    fields = dict(fields)
    budget = {"reasoning_budget": fields.pop("reasoning_budget", None)}  # of requests in other wire formats
    outgoing = encoded(a_request(**fields).model_copy(update=budget), quirks)
    assert {key: value for key, value in outgoing.body.items() if key not in ("model", "messages")} == sent
    assert [note.kind for note in outgoing.notes] == ([kind] if kind else [])


@pytest.mark.parametrize(
    ("choice", "known", "sent", "kinds", "tools"),
    [
        ("required", "all", "required", [], "fg"),
        ("required", "no_required", None, ["unsupported"], "fg"),
        ("required", "auto_only", None, ["unsupported"], "fg"),
        ("none", "all", "none", [], "fg"),
        ("none", "auto_only", None, ["moved"], ""),
        ("named", "no_required", "named", [], "fg"),
        ("named", "no_named", "required", ["moved"], "g"),
        ("named", "auto_only", None, ["unsupported"], "fg"),
        ("allowed", "all", None, ["moved"], "g"),
    ],
)
def test_choices_of_tools_are_said_or_noted(
    choice: str, known: Any, sent: str | None, kinds: list[str], tools: str
) -> None:
    named = {"type": "function", "function": {"name": "g"}}
    wanted: Any = {
        "named": named,
        "allowed": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}},
    }
    outgoing = encoded(
        a_request(tools=[TOOL, OTHER], tool_choice=wanted.get(choice, choice)), Quirks(tool_choice=known)
    )
    assert outgoing.body.get("tool_choice") == (named if sent == "named" else sent)
    assert [note.kind for note in outgoing.notes] == kinds
    told = "".join(tool["function"]["name"] for tool in outgoing.body.get("tools", []))
    # Where nothing can be asked of the model, it is offered the tools that may be called and no others.
    assert told == ("g" if (choice, known) == ("named", "auto_only") else tools)


def test_functions_of_old_clients_are_called_one_at_a_time() -> None:
    outgoing = encoded(a_request(functions=[TOOL["function"]]))
    assert outgoing.body["parallel_tool_calls"] is False
    assert list(
        of(encoded(a_request(tools=[TOOL], parallel_tool_calls=False), Quirks(parallel_tools=False)), "unsupported")
    ) == ["parallel_tool_calls"]


def test_a_tool_is_strict_where_its_schema_needs_no_change() -> None:
    strict = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tools = [TOOL, {"type": "function", "function": {"name": "s", "parameters": strict}}]
    functions = [tool["function"] for tool in encoded(a_request(tools=tools)).body["tools"]]
    assert [function.get("strict") for function in functions] == [None, True]
    assert functions[0]["parameters"] == TOOL["function"]["parameters"]  # type: ignore[index]


@pytest.mark.parametrize("dialect", ["openai_strict", "strict_plain", "openai", "none"])
def test_a_form_is_asked_for_in_the_providers_dialect(dialect: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}}
    asked = {"type": "json_schema", "json_schema": {"name": "Page[User]", "schema": schema}}
    outgoing = encoded(a_request(response_format=asked), Quirks(schema_dialect=dialect))
    form = outgoing.body["response_format"]
    if dialect == "none":
        assert form == {"type": "json_object"}
        assert list(of(outgoing, "unsupported")) == ["response_format.json_schema.schema"]
        return
    assert form["json_schema"]["name"] == "Page_User_"
    assert form["json_schema"].get("strict") == (True if dialect != "openai" else None)
    assert (form["json_schema"]["schema"] == schema) == (dialect == "openai")
    assert bool(of(outgoing, "adapted")) == (dialect != "openai")


def test_a_schema_without_a_strict_form_is_noted_and_sent_as_a_wish() -> None:
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    outgoing = encoded(
        a_request(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    )
    assert "any properties" in of(outgoing, "unsupported")["response_format.json_schema.schema"]
    assert outgoing.body["response_format"]["json_schema"] == {"name": "n", "schema": schema}


def test_guided_forms_go_where_they_are_known() -> None:
    request = a_request(guided_choice=["a", "b"])
    assert list(of(encoded(request), "unsupported")) == ["guided_choice"]
    outgoing = encoded(request, Quirks(rename={"guided_choice": "guided_choice"}))
    assert (outgoing.body["guided_choice"], outgoing.notes) == (["a", "b"], ())


def test_system_messages_where_only_users_speak() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "developer", "content": "D"},
        USER,
        {"role": "assistant", "content": "A"},
    ]
    body = encoded(a_request(*messages, {"role": "system", "content": "E"}), Quirks(system_role="first_user")).body
    assert [(message["role"], message["content"]) for message in body["messages"]] == [
        ("user", "S\n\nD\n\nhi"),
        ("assistant", "A"),
        ("user", "E"),
    ]


def test_a_provider_without_developers_hears_of_a_system() -> None:
    outgoing = encoded(a_request({"role": "developer", "content": "D"}, USER))
    assert outgoing.body["messages"][0]["role"] == "system"
    assert of(outgoing, "renamed") == {"messages[0].role": "system"}


def test_contents_are_strings_where_lists_are_not_known() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        message,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ]
    body = encoded(a_request(*messages), Quirks(flattens_content=True)).body
    assert [message["content"] for message in body["messages"]] == ["ab", "", "r"]


@pytest.mark.parametrize(
    ("part", "quirks", "words"),
    [
        (Media(kind="audio", path="p", data="aGk=", media_type="audio/wav"), Quirks(), "takes no audio"),
        (Media(kind="audio", path="p", data="aGk=", media_type="audio/flac"), OPEN, "wav and mp3"),
        (Media(kind="file", path="p", url="https://x/y.pdf"), OPEN, "data of file parts"),
        (Media(kind="image", path="p", file_id="file-1"), OPEN, "send its data"),
        (Media(kind="image", path="p", url="https://x/y.png"), Quirks(flattens_content=True), "takes no image"),
    ],
)
def test_media_without_words_are_refused_by_their_place(part: Media, quirks: Quirks, words: str) -> None:
    request = ChatRequest(model="r", messages=(Message(role="user", parts=(Text("x"), part)),))
    with pytest.raises(InvalidRequest, match=words) as caught:
        encoded(request, quirks)
    assert caught.value.param == "p"


def test_what_a_tool_showed_stands_behind_all_results_of_its_turn() -> None:
    calls = tuple(ToolCall(id=f"c{i}", name="look", arguments={}, text="{}") for i in range(2))
    image = Media(kind="image", path="p", data="aGk=", media_type="image/png")
    results = tuple(
        Message(role="tool", parts=(ToolResult(call_id=f"c{i}", name="look", parts=(image,)),)) for i in range(2)
    )
    request = ChatRequest(
        model="r", messages=(Message(role="user", parts=(Text("x"),)), Message(role="assistant", parts=calls), *results)
    )
    outgoing = encoded(request)
    roles = [message["role"] for message in outgoing.body["messages"]]
    assert roles == ["user", "assistant", "tool", "tool", "user"]
    kinds = [part["type"] for part in outgoing.body["messages"][-1]["content"]]
    assert kinds == ["text", "image_url"] * 2
    assert [note.kind for note in outgoing.notes] == ["moved", "moved"]
    JUDGE.validate_python(outgoing.body)


def test_a_providers_own_data_go_back_to_it_and_to_nobody_else() -> None:
    details = [{"type": "reasoning.encrypted", "data": "x"}]
    call = ToolCall(
        id="c",
        name="f",
        arguments={},
        text="{}",
        provider_data={"fam": {"extra_content": {"sig": 1}}, "other": {"no": 1}},
    )
    parts = (
        Reasoning("hm", "proof", provider_data={"fam": {"reasoning_details": details}}),
        Text("t", {"fam": {"cache_control": {"type": "ephemeral"}, "annotations": [1]}}),
        call,
    )
    message = Message(
        role="assistant", parts=parts, provider_data={"fam": {"reasoning_details": details}, "other": {"no": 1}}
    )
    request = ChatRequest(model="r", messages=(Message(role="user", parts=(Text("x"),)), message))
    sent = encoded(request, Quirks(family="fam", replay_reasoning="optional")).body["messages"][1]
    assert sent["reasoning_details"] == details * 2
    assert sent["tool_calls"][0]["extra_content"] == {"sig": 1}
    assert sent["content"] == [{"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}}]
    plain = encoded(request, Quirks(family="third")).body["messages"][1]
    assert plain == {
        "role": "assistant",
        "content": "t",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }


@pytest.mark.parametrize(
    ("replay", "thoughts"), [("strip", [None, None]), ("optional", ["hm", None]), ("required", ["hm", " "])]
)
def test_reasoning_is_sent_back_as_the_provider_wants_it(replay: Any, thoughts: list[str | None]) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        USER,
        {"role": "assistant", "content": "b"},
        USER,
    ]
    sent = encoded(a_request(*messages), Quirks(replay_reasoning=replay, reasoning_field="thought")).body["messages"]
    assert [sent[1].get("thought"), sent[3].get("thought")] == thoughts


def test_a_refusal_is_words_where_it_is_no_field() -> None:
    message = Message(role="assistant", parts=(Refusal("no"),))
    request = ChatRequest(model="r", messages=(Message(role="user", parts=(Text("x"),)), message))
    assert encoded(request).body["messages"][1] == {"role": "assistant", "content": None, "refusal": "no"}
    outgoing = encoded(request, Quirks(unsupported=frozenset({"refusal"})))
    assert outgoing.body["messages"][1] == {"role": "assistant", "content": "no"}
    assert of(outgoing, "moved").keys() == {"messages[1].refusal"}


def test_a_last_message_is_gone_on_from_where_that_is_known() -> None:
    request = a_request(USER, {"role": "assistant", "content": "Once"}, continue_final_message=True)
    assert list(of(encoded(request), "unsupported")) == ["continue_final_message"]
    known = encoded(request, Quirks(prefill=True, prefill_field="prefix"))
    assert (known.body["messages"][-1]["prefix"], known.notes) == (True, ())
    own = encoded(request, Quirks(rename={"continue_final_message": "continue_final_message"}))
    assert (own.body["continue_final_message"], own.body["add_generation_prompt"], own.notes) == (True, False, ())


def test_options_of_the_provider_come_last() -> None:
    options = {"fam": {"temperature": 1.5, "nested": {"b": 2}}, "other": {"secret": 1}}
    quirks = Quirks(family="fam", extra_body={"nested": {"a": 1}}, headers={"x-a": "b"}, default_max_tokens=64)
    outgoing = encoded(a_request(temperature=0.5, provider_options=options), quirks)
    assert outgoing.body["temperature"] == 1.5
    assert outgoing.body["nested"] == {"a": 1, "b": 2}
    assert outgoing.body["max_completion_tokens"] == 64
    assert "secret" not in json.dumps(outgoing.body)
    assert outgoing.headers == {"x-a": "b"}
    assert [note for note in outgoing.notes if note.field == "provider_options.fam.temperature"] == [
        Note("moved", "provider_options.fam.temperature", outgoing.notes[0].words)
    ]
    assert quirks.extra_body == {"nested": {"a": 1}}


@pytest.mark.parametrize("name", ["model", "stream", "messages"])
def test_options_may_not_take_the_request_over(name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"provider_options\.openai\.chat\.{name}"):
        encoded(a_request(provider_options={"openai.chat": {name: "x"}}))


def test_a_stream_is_asked_for_its_usage_where_that_is_known() -> None:
    assert encoded(a_request(), stream=True).body["stream_options"] == {"include_usage": True}
    assert "stream_options" not in encoded(a_request(), Quirks(stream_usage=False), stream=True).body
    assert "stream" not in encoded(a_request()).body

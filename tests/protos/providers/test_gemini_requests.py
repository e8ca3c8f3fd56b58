"""Requests to Gemini: what a canonical one becomes, what is noted, what is refused, and that nothing said is lost.

Guards against a call that goes back without its thoughtSignature (Gemini 3 answers 400), ids that Gemini 2 refuses and
Gemini 3 needs, results in another order than their calls, and a parameter that is dropped without a note.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Message, Reasoning, Text, ToolCall, ToolResult
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.providers.codec import Outgoing
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.quirks import Quirks

NEW, OLD, OLDEST = "gemini-3.5-flash", "gemini-2.5-flash", "gemini-2.0-flash"
SEES_ALL = Quirks(family="google", media=frozenset({"image", "audio", "file"}))
PIXEL = "data:image/png;base64,iVBORw0KGgo="
USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}},
        {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ],
}
RESULTS = [
    {"role": "tool", "tool_call_id": "c2", "content": "noon"},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


def asked(*messages: Any, **more: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": messages or [USER], **more}).encode())


def sent(request: ChatRequest, *, model: str = NEW, stream: bool = False, quirks: Quirks = SEES_ALL) -> Outgoing:
    return by_name("gemini.generate").encode(request, model=model, stream=stream, quirks=quirks)


def config(request: ChatRequest, **more: Any) -> Any:
    return sent(request, **more).body.get("generationConfig", {})


def noted(outgoing: Outgoing) -> dict[str, str]:
    return {note.field: note.kind for note in outgoing.notes}


def test_a_conversation_with_every_role() -> None:
    outgoing = sent(asked({"role": "system", "content": "Be brief."}, USER, CALLS, *RESULTS, USER), model=OLD)
    assert outgoing.path == "/models/gemini-2.5-flash:generateContent"
    assert outgoing.body == {
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "hi"}]},
            {
                "role": "model",
                "parts": [
                    {"functionCall": {"name": "weather", "args": {"city": "Oslo"}}},
                    {"functionCall": {"name": "time", "args": {}}},
                ],
            },
            {
                "role": "user",
                "parts": [
                    {"functionResponse": {"name": "weather", "response": {"output": "rain"}}},
                    {"functionResponse": {"name": "time", "response": {"output": "noon"}}},
                ],
            },
            {"role": "user", "parts": [{"text": "hi"}]},
        ],
    }
    assert outgoing.notes == ()


def test_ids_and_signatures_are_of_the_third_generation() -> None:
    """A history of another model's calls is taken when the first of those made together is marked as unsigned."""
    _, model, results, _ = sent(asked(USER, CALLS, *RESULTS, USER)).body["contents"]
    assert [part["functionCall"]["id"] for part in model["parts"]] == ["c1", "c2"]
    assert [part["functionResponse"]["id"] for part in results["parts"]] == ["c1", "c2"]
    assert [part.get("thoughtSignature") for part in model["parts"]] == ["skip_thought_signature_validator", None]
    outgoing = sent(asked(USER, CALLS, *RESULTS, USER), quirks=Quirks(unsupported=frozenset({"functionCall.id"})))
    assert all("id" not in part["functionCall"] for part in outgoing.body["contents"][1]["parts"])


def test_what_gemini_said_of_its_parts_goes_back_and_what_others_said_does_not() -> None:
    mine = {"google": {"thoughtSignature": "c2ln"}, "other": {"thoughtSignature": "b3Ro"}}
    raw = {"executableCode": {"language": "PYTHON", "code": "1"}}
    parts = (
        Reasoning("hm", provider_data={"google": {"thoughtSignature": "dGhv"}}),
        Reasoning("not theirs", signature="x"),
        Text("See.", {"google": {"after": [raw, {"text": "", "thoughtSignature": "ZW5k"}]}}),
        ToolCall(id="c1", name="weather", arguments={}, text="{}", provider_data=mine),
    )
    answer = Message(role="assistant", parts=parts)
    result = Message(role="tool", parts=(ToolResult(call_id="c1", name="weather", parts=(Text("rain"),)),))
    request = asked(USER).model_copy(update={"messages": (*asked(USER).messages, answer, result)})
    assert sent(request).body["contents"][1]["parts"] == [
        {"text": "hm", "thought": True, "thoughtSignature": "dGhv"},
        {"text": "See."},
        raw,
        {"text": "", "thoughtSignature": "ZW5k"},
        {"functionCall": {"id": "c1", "name": "weather", "args": {}}, "thoughtSignature": "c2ln"},
    ]
    others = sent(request, quirks=Quirks(family="elsewhere", replay_reasoning="optional")).body["contents"][1]["parts"]
    assert others[0] == {"text": "See."}
    assert [part.get("thoughtSignature") for part in others] == [None, "skip_thought_signature_validator"]


def test_media_by_what_they_are() -> None:
    parts = [
        {"type": "text", "text": "what?"},
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://x.test/a.JPG?q=1", "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}},
    ]
    outgoing = sent(asked({"role": "user", "content": parts}))
    assert outgoing.body["contents"][0]["parts"] == [
        {"text": "what?"},
        {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}},
        {"fileData": {"fileUri": "https://x.test/a.JPG?q=1", "mimeType": "image/jpeg"}},
        {"inlineData": {"mimeType": "audio/wav", "data": "AAAA"}},
        {"inlineData": {"mimeType": "application/pdf", "data": "AAAA"}},
    ]
    assert outgoing.body["generationConfig"] == {"mediaResolution": "MEDIA_RESOLUTION_LOW"}
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content\[3\]"):
        sent(asked({"role": "user", "content": parts}), quirks=Quirks())


def test_images_that_a_tool_showed() -> None:
    """The third generation takes them in the result, those before it beside the result."""
    shown = [{"type": "text", "text": "a map"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    request = asked(USER, CALLS, RESULTS[0], {"role": "tool", "tool_call_id": "c1", "content": shown})
    image = {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}}
    new = sent(request).body["contents"][2]["parts"]
    assert (len(new), new[0]["functionResponse"]["parts"]) == (2, [image])
    assert sent(request, model=OLD).body["contents"][2]["parts"][2] == image


def test_instructions_that_come_late_or_to_a_model_without_them() -> None:
    late = {"role": "developer", "content": "In verse."}
    outgoing = sent(asked(USER, {"role": "assistant", "content": "hey"}, late, USER))
    assert outgoing.body["systemInstruction"] == {"parts": [{"text": "In verse."}]}
    assert noted(outgoing) == {"messages[2]": "moved"}
    first = sent(asked(late, USER), quirks=Quirks(system_role="first_user"))
    assert first.body == {"contents": [{"role": "user", "parts": [{"text": "In verse."}, {"text": "hi"}]}]}
    with pytest.raises(InvalidRequest, match="messages must hold"):
        sent(asked(late))


def test_sampling_and_its_bounds() -> None:
    request = asked(
        temperature=0.5, top_p=0.9, top_k=40, seed=2**40 + 7, presence_penalty=1, frequency_penalty=-1, max_tokens=9
    )
    assert config(request) == {
        "temperature": 0.5,
        "topP": 0.9,
        "topK": 40,
        "seed": 7,
        "presencePenalty": 1,
        "frequencyPenalty": -1,
        "maxOutputTokens": 9,
    }
    outgoing = sent(asked(stop=list("abcdef"), top_k=-1, min_p=0.1, logit_bias={"1": 2}, logprobs=True, user="u"))
    assert outgoing.body["generationConfig"] == {"stopSequences": list("abcde")}
    assert {note.field for note in outgoing.unsupported} == {"stop", "top_k", "min_p", "logit_bias", "logprobs"}
    assert [(note.kind, note.field) for note in outgoing.notes if note.field == "user"] == [("omitted", "user")]
    lacking = sent(asked(seed=1), quirks=Quirks(unsupported=frozenset({"generationConfig.seed"})))
    assert ("seed" not in lacking.body["generationConfig"], noted(lacking)) == (True, {"seed": "unsupported"})


@pytest.mark.parametrize(
    ("model", "fields", "thinking"),
    [
        (NEW, {"reasoning_effort": "high"}, {"thinkingLevel": "HIGH", "includeThoughts": True}),
        (NEW, {"reasoning_effort": "none"}, {"thinkingLevel": "LOW"}),
        (NEW, {"reasoning_budget": 500, "reasoning_effort": "low"}, {"thinkingBudget": 500, "includeThoughts": True}),
        (NEW, {"include_reasoning": True}, {"includeThoughts": True}),
        (NEW, {"include_reasoning": False, "reasoning_effort": "low"}, {"thinkingLevel": "LOW"}),
        (NEW, {"reasoning_effort": "max"}, {"thinkingLevel": "HIGH", "includeThoughts": True}),
        (OLD, {"reasoning_effort": "medium"}, {"thinkingBudget": 8192, "includeThoughts": True}),
        (OLD, {"reasoning_effort": "xhigh"}, {"thinkingBudget": 24_576, "includeThoughts": True}),
        (OLD, {"chat_template_kwargs": {"enable_thinking": False}}, {"thinkingBudget": 0}),
        ("gemini-2.5-pro", {"reasoning_effort": "none"}, {"thinkingBudget": 128}),
        (OLDEST, {"reasoning_effort": "none"}, None),
        (NEW, {"chat_template_kwargs": {"enable_thinking": False}, "include_reasoning": False}, None),
        ("gemini-omni-flash", {"reasoning_effort": "medium"}, {"thinkingLevel": "MEDIUM", "includeThoughts": True}),
    ],
)
def test_reasoning_by_the_model_generation(model: str, fields: Any, thinking: Any) -> None:
    budget = fields.pop("reasoning_budget", None)
    request = asked(**fields).model_copy(update={"reasoning_budget": budget})
    assert config(request, model=model).get("thinkingConfig") == thinking


def test_efforts_that_a_provider_names_otherwise_or_does_not_take() -> None:
    quirks = Quirks(effort_values={"minimal": "MINIMAL"})
    assert config(asked(reasoning_effort="minimal"), quirks=quirks)["thinkingConfig"]["thinkingLevel"] == "MINIMAL"
    by_budget = Quirks(effort_field="generationConfig.thinkingConfig.thinkingBudget", effort_values={"low": "200"})
    assert config(asked(reasoning_effort="low"), quirks=by_budget)["thinkingConfig"]["thinkingBudget"] == 200
    quirks = Quirks(effort_values={"high": "HIGHEST"})  # more than high is high, by whatever name
    assert config(asked(reasoning_effort="max"), quirks=quirks)["thinkingConfig"]["thinkingLevel"] == "HIGHEST"
    for model in (NEW, OLD):
        assert noted(sent(asked(reasoning_effort="max"), model=model)) == {"reasoning_effort": "moved"}
    assert noted(sent(asked(reasoning_effort="low"), model=OLDEST)) == {"reasoning_effort": "unsupported"}


def test_forms_in_the_dialect_of_the_model() -> None:
    schema = {
        "type": "object",
        "properties": {"at": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
        "required": ["at"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    new = config(asked(response_format=form))
    assert (new["responseMimeType"], new["responseJsonSchema"]["additionalProperties"]) == ("application/json", False)
    old = config(asked(response_format=form), model=OLDEST)["responseSchema"]
    assert old["properties"] == {"at": {"type": "string", "nullable": True}}
    assert config(asked(response_format={"type": "json_object"})) == {"responseMimeType": "application/json"}
    guided = sent(asked(guided_choice=["yes", "no"]))
    assert ("generationConfig" in guided.body, noted(guided)) == (False, {"guided_choice": "unsupported"})
    none = sent(asked(response_format=form), quirks=Quirks(schema_dialect="none"))
    assert none.unsupported[0].field.startswith("response_format.json_schema.schema")


@pytest.mark.parametrize(
    ("choice", "wanted", "offered"),
    [
        ("auto", None, ["weather", "time"]),
        ("none", {"mode": "NONE"}, ["weather", "time"]),
        ("required", {"mode": "ANY"}, ["weather", "time"]),
        (
            {"type": "function", "function": {"name": "time"}},
            {"mode": "ANY", "allowedFunctionNames": ["time"]},
            ["weather", "time"],
        ),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [TIME | {"function": {"name": "time"}}]},
            },
            None,
            ["time"],
        ),
    ],
)
def test_tools_and_the_choice_among_them(choice: Any, wanted: Any, offered: list[str]) -> None:
    body = sent(asked(tools=[WEATHER, TIME], tool_choice=choice)).body
    declared = body["tools"][0]["functionDeclarations"]
    assert [function["name"] for function in declared] == offered
    assert body.get("toolConfig", {}).get("functionCallingConfig") == wanted
    if offered[0] == "weather":
        assert declared[0]["parametersJsonSchema"]["required"] == ["city"]


def test_what_of_tools_gemini_does_not_do() -> None:
    body = {"tools": [WEATHER, TIME], "parallel_tool_calls": False, "tool_choice": "required"}
    outgoing = sent(asked(**body), quirks=Quirks(tool_choice="auto_only"))
    assert {note.field for note in outgoing.unsupported} == {"parallel_tool_calls", "tool_choice"}
    with pytest.raises(InvalidRequest, match=r"tools\[0\]\.function\.name must begin"):
        sent(asked(tools=[{"type": "function", "function": {"name": "2nd", "parameters": {}}}]))


def test_options_of_the_provider_come_last_and_are_told() -> None:
    options = {
        "google": {"safetySettings": [], "generationConfig": {"temperature": 1, "candidateCount": 1}},
        "other": {"x": 1},
    }
    outgoing = sent(
        asked(temperature=0, provider_options=options), quirks=Quirks(family="google", extra_body={"labels": {}})
    )
    assert outgoing.body["generationConfig"] == {"temperature": 1, "candidateCount": 1}
    assert (outgoing.body["safetySettings"], outgoing.body["labels"]) == ([], {})
    assert noted(outgoing) == {"provider_options.google.generationConfig.temperature": "moved"}
    bad: dict[str, Any]
    for bad in ({"contents": []}, {"toolConfig": {"functionCallingConfig": {"streamFunctionCallArguments": True}}}):
        with pytest.raises(InvalidRequest, match=r"provider_options\.google\."):
            sent(asked(provider_options={"google": bad}))


def test_an_answer_that_is_begun() -> None:
    request = asked(USER, {"role": "assistant", "content": "Well,"}, continue_final_message=True)
    assert sent(request, quirks=Quirks(prefill=True)).body["contents"][-1]["role"] == "model"
    cut = sent(request)
    assert ([c["role"] for c in cut.body["contents"]], noted(cut)) == (
        ["user"],
        {"continue_final_message": "unsupported"},
    )


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("models/gemini-2.5-pro", "/models/gemini-2.5-pro:streamGenerateContent?alt=sse"),
        ("tunedModels/mine", "/tunedModels/mine:streamGenerateContent?alt=sse"),
        ("gemini-1.5-pro@001", "/models/gemini-1.5-pro@001:streamGenerateContent?alt=sse"),
        ("../../v1/x?y#z", "/models/..%2F..%2Fv1%2Fx%3Fy%23z:streamGenerateContent?alt=sse"),
    ],
)
def test_a_model_name_stays_within_its_place_in_the_path(model: str, path: str) -> None:
    assert sent(asked(), model=model, stream=True).path == path


def test_google_itself_takes_what_is_sent() -> None:
    """The types of Google's own client, which know every field and no other."""
    types = pytest.importorskip("google.genai.types")
    shown = [{"type": "text", "text": "a map"}, {"type": "image_url", "image_url": {"url": PIXEL, "detail": "high"}}]
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": WEATHER["function"]["parameters"]}}  # type: ignore[index]
    request = asked(
        {"role": "system", "content": "s"},
        {"role": "user", "content": shown},
        CALLS,
        RESULTS[0],
        {"role": "tool", "tool_call_id": "c1", "content": shown},
        tools=[WEATHER, TIME],
        tool_choice="required",
        response_format=form,
        reasoning_effort="low",
        temperature=1,
        top_k=3,
        seed=1,
        stop=["x"],
        max_tokens=5,
        presence_penalty=1,
    )
    for model in (NEW, OLD, OLDEST):
        body = sent(request, model=model).body
        for content in (*body.pop("contents"), body.pop("systemInstruction")):
            types.Content.model_validate(content)
        types.GenerationConfig.model_validate(body.pop("generationConfig"))
        for tool in body.pop("tools"):
            types.Tool.model_validate(tool)
        types.ToolConfig.model_validate(body.pop("toolConfig"))
        assert body == {}


words = st.text(min_size=1, max_size=8)
objects = st.dictionaries(st.sampled_from("ab"), st.integers(0, 9) | words, max_size=2)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    """Turns that Gemini can say without a loss: no names, no refusals, neighbours of different roles."""
    found: list[Message] = []
    if draw(st.booleans()):
        found.append(Message(role="system", parts=(Text(draw(words)),)))
    for turn in range(draw(st.integers(1, 3))):
        found.append(
            Message(role="user", parts=tuple(Text(text) for text in draw(st.lists(words, min_size=1, max_size=2))))
        )
        calls = []
        for i in range(draw(st.integers(0, 2))):
            arguments = draw(objects)
            data: Any = {"google": {"thoughtSignature": draw(st.sampled_from(["YQ==", "Yg=="]))}}
            text = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
            call_id = f"c{turn}-{i}"
            calls.append(
                ToolCall(
                    id=call_id, name=draw(st.sampled_from("fg")), arguments=arguments, text=text, provider_data=data
                )
            )
        said = tuple(Text(text) for text in draw(st.lists(words, min_size=not calls, max_size=2)))
        found.append(Message(role="assistant", parts=(*said, *calls)))
        for call in draw(st.permutations(calls)):
            result = ToolResult(
                call_id=call.id, name=call.name, parts=(Text(draw(words)),), is_error=draw(st.booleans())
            )
            found.append(Message(role="tool", parts=(result,)))
    return (*found, Message(role="user", parts=(Text("end"),)))


def read_back(body: dict[str, Any]) -> list[Message]:
    """The inverse, knowing Gemini's format alone."""
    found: list[Message] = []
    if "systemInstruction" in body:
        found.append(Message(role="system", parts=tuple(Text(p["text"]) for p in body["systemInstruction"]["parts"])))
    for content in body["contents"]:
        parts: list[Any] = []
        for part in content["parts"]:
            if "functionResponse" in part:
                told = part["functionResponse"]
                (kind, text), *_ = told["response"].items()
                result = ToolResult(
                    call_id=told["id"], name=told["name"], parts=(Text(text),), is_error=kind == "error"
                )
                found.append(Message(role="tool", parts=(result,)))
            elif "functionCall" in part:
                call = part["functionCall"]
                text = json.dumps(call["args"], ensure_ascii=False, separators=(",", ":"))
                data = {"google": {"thoughtSignature": part["thoughtSignature"]}}
                parts.append(
                    ToolCall(id=call["id"], name=call["name"], arguments=call["args"], text=text, provider_data=data)
                )
            else:
                parts.append(Text(part["text"]))
        if parts:
            found.append(Message(role="assistant" if content["role"] == "model" else "user", parts=tuple(parts)))
    return found


def _in_order(messages: tuple[Message, ...]) -> list[Message]:
    """Results in the order of their calls, which is the one that is sent."""
    found = list(messages)
    return sorted(found, key=lambda m: (_turn(found, m), m.result.call_id if m.result else ""))


def _turn(messages: list[Message], message: Message) -> int:
    at = next(i for i, other in enumerate(messages) if other is message)
    while message.result is not None and messages[at - 1].result is not None:
        at -= 1
    return at


@given(conversations())
@settings(max_examples=40, deadline=None)
def test_a_conversation_read_back_is_the_same(messages: tuple[Message, ...]) -> None:
    request = asked(USER).model_copy(update={"messages": messages})
    assert read_back(sent(request).body) == _in_order(messages)

"""What each codec sends, judged by the makers' own types: openai's, anthropic's, google-genai's, botocore's of Bedrock.

The same conversations go to all of them, with the built-in providers' quirks. Guards against a field that the format
does not have, one that it demands and that is left out, and a part of a conversation in the wrong place: what a
provider answers with 400, or ignores without a word.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict, TypeAdapter, ValidationError

from diptych.cluster.providers.registry import Registry
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.providers.codec import Outgoing
from diptych.protos.providers.codecs import CODECS, by_name

pytestmark = pytest.mark.slow

PLACES = {
    "AZURE_RESOURCE_NAME": "res",
    "GOOGLE_CLOUD_PROJECT": "proj",
    "GOOGLE_CLOUD_LOCATION": "europe-west1",
    "AWS_REGION": "eu-west-1",
}
REGISTRY = Registry.load({}, PLACES)
# The makers of the formats, whose types these are, and models of theirs that differ in what they take.
CASES = [
    ("openai", "gpt-4.1"),
    ("openai", "gpt-5.1"),
    ("azure", "gpt-4o"),
    ("openai_responses", "gpt-4.1"),
    ("openai_responses", "gpt-5.1"),
    ("azure_responses", "o3"),
    ("anthropic", "claude-3-haiku-20240307"),
    ("anthropic", "claude-sonnet-4-5"),
    ("anthropic", "claude-opus-5-5"),
    ("google", "gemini-2.0-flash"),
    ("google", "gemini-2.5-pro"),
    ("google", "gemini-3.5-flash"),
    ("vertex", "gemini-2.5-flash"),
    ("bedrock", "us.anthropic.claude-sonnet-4-5-20250929-v1:0"),
    ("bedrock", "amazon.nova-2-lite-v1:0"),
    ("bedrock", "mistral.mistral-large-3-675b"),
]
# Of Anthropic's API before its version of 2026, to which the types of its client belong.
OLD_SAMPLING = ("temperature", "top_p", "top_k")

WORDS = st.text('ab .\u00f6\n"\\{', min_size=1, max_size=8).map(lambda text: f"x{text}y")
PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}
TEXT_PART = WORDS.map(lambda text: {"type": "text", "text": text})
CONTENTS = WORDS | st.lists(TEXT_PART | st.just(PIXEL), min_size=1, max_size=3)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "description": "Of the world."},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "unit": {"anyOf": [{"type": "string", "enum": ["C", "F"]}, {"type": "null"}]},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["city"],
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
]
FORMS = [
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
    {"type": "json_schema", "json_schema": {"name": "b c", "schema": SCHEMA}},
]
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from((0, 0.5, 1, 1.5)),
        "top_p": st.just(0.9),
        "top_k": st.just(5),
        "min_p": st.just(0.1),
        "seed": st.just(3),
        "presence_penalty": st.just(0.5),
        "frequency_penalty": st.just(-1),
        "logit_bias": st.just({"5": 2}),
        "stop": st.sampled_from(("x", ["x", "y"])),
        "max_tokens": st.integers(1, 40000),
        "user": WORDS,
        "safety_identifier": st.just("s"),
        "reasoning_effort": st.sampled_from(("none", "minimal", "low", "medium", "high")),
        "response_format": st.sampled_from(FORMS),
    },
)
CHOICES = st.sampled_from(("none", "auto", "required", {"type": "function", "function": {"name": "time"}}))


@st.composite
def requests(draw: st.DrawFn) -> ChatRequest:
    """Conversations of every role, as clients send them."""
    has_tools = draw(st.booleans())
    messages: list[dict[str, Any]] = draw(
        st.lists(st.builds(lambda role, text: {"role": role, "content": text}, SPEAKERS, WORDS), max_size=2)
    )
    for turn in range(draw(st.integers(0, 2))):
        messages.append({"role": "user", "content": draw(CONTENTS)})
        count = draw(st.integers(0, 2)) if has_tools else 0
        answer: dict[str, Any] = {"role": "assistant", "content": draw(WORDS | st.none()) if count else draw(WORDS)}
        if draw(st.booleans()):
            answer["reasoning_content"] = draw(WORDS)
        if count:
            arguments = draw(st.dictionaries(WORDS, st.none() | st.integers(-9, 9) | WORDS, max_size=2))
            answer["tool_calls"] = [
                {
                    "id": f"call:{turn}.{number}",
                    "type": "function",
                    "function": {
                        "name": draw(st.sampled_from(("weather", "time"))),
                        "arguments": json.dumps(arguments),
                    },
                }
                for number in range(count)
            ]
        messages.append(answer)
        messages += [
            {"role": "tool", "tool_call_id": f"call:{turn}.{number}", "content": draw(CONTENTS)}
            for number in draw(st.permutations(range(count)))
        ]
    fields = draw(FIELDS)
    if has_tools:
        fields |= {"tools": TOOLS, "tool_choice": draw(CHOICES), "parallel_tool_calls": draw(st.booleans())}
    body = {"model": "m", "messages": [*messages, {"role": "user", "content": draw(CONTENTS)}], **fields}
    return parse_chat(json.dumps(body).encode())


SPEAKERS = st.sampled_from(("system", "developer"))


def walked(adapter: TypeAdapter[Any], value: object) -> None:
    """The types leave iterables unread until they are walked."""

    def walk(found: object) -> None:
        if isinstance(found, Mapping):
            for inner in found.values():
                walk(inner)
        elif isinstance(found, Iterator | list | tuple):
            for inner in found:
                walk(inner)

    walk(adapter.validate_python(value))


@cache
def typed(name: str) -> TypeAdapter[Any]:
    """The makers' request types; a field that they do not know is an error."""
    from anthropic.types import MessageCreateParams
    from openai.types.chat.completion_create_params import CompletionCreateParams
    from openai.types.responses.response_create_params import ResponseCreateParams

    found: dict[str, Any] = {
        "chat": CompletionCreateParams,
        "responses": ResponseCreateParams,
        "messages": MessageCreateParams,
    }
    return TypeAdapter(found[name], config=ConfigDict(extra="forbid"))


def judge_chat(sent: Outgoing, model: str, *, stream: bool) -> None:
    assert sent.path.endswith("/chat/completions")
    assert sent.body.get("stream", False) == stream
    walked(typed("chat"), sent.body)


def judge_responses(sent: Outgoing, model: str, *, stream: bool) -> None:
    assert sent.path.endswith("/responses")
    assert sent.body["store"] is False
    assert sent.body.get("stream", False) == stream
    walked(typed("responses"), sent.body)


def judge_messages(sent: Outgoing, model: str, *, stream: bool) -> None:
    assert sent.path.endswith("/messages")
    assert sent.body.get("stream", False) == stream
    walked(typed("messages"), {name: value for name, value in sent.body.items() if name not in OLD_SAMPLING})


def judge_gemini(sent: Outgoing, model: str, *, stream: bool) -> None:
    """There is no type for a whole request: its fields are judged one by one, and none may be left."""
    from google.genai import types

    verb = "streamGenerateContent?alt=sse" if stream else "generateContent"
    assert sent.path.endswith(f"/models/{model}:{verb}")
    judges: dict[str, Callable[[Any], object]] = {
        "contents": lambda found: [types.Content.model_validate(content) for content in found],
        "systemInstruction": types.Content.model_validate,
        "generationConfig": types.GenerationConfig.model_validate,
        "tools": lambda found: [types.Tool.model_validate(tool) for tool in found],
        "toolConfig": types.ToolConfig.model_validate,
    }
    for name, value in sent.body.items():
        judges[name](value)
    assert sent.body["contents"]


@cache
def bedrock() -> Any:
    from botocore.loaders import Loader
    from botocore.model import ServiceModel

    return ServiceModel(Loader().load_service_model("bedrock-runtime", "service-2"))


def judge_converse(sent: Outgoing, model: str, *, stream: bool) -> None:
    """Against the service's own description; and Amazon's client would write the same bytes to the same path."""
    from botocore.serialize import create_serializer
    from botocore.validate import ParamValidator

    operation = bedrock().operation_model("ConverseStream" if stream else "Converse")
    params = {"modelId": model, **_with_bytes(sent.body)}
    report = ParamValidator().validate(params, operation.input_shape)
    assert not report.has_errors(), report.generate_report()
    made = create_serializer("rest-json", include_validation=False).serialize_to_request(params, operation)
    assert made["url_path"] == sent.path
    assert json.loads(made["body"]) == sent.body


def _with_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: base64.b64decode(inner) if name in ("bytes", "redactedContent") else _with_bytes(inner)
            for name, inner in value.items()
        }
    return [_with_bytes(inner) for inner in value] if isinstance(value, list) else value


JUDGES: dict[str, Callable[..., None]] = {
    "openai.chat": judge_chat,
    "openai.responses": judge_responses,
    "anthropic.messages": judge_messages,
    "gemini.generate": judge_gemini,
    "bedrock.converse": judge_converse,
}


def test_every_codec_has_a_judge() -> None:
    """A sixth codec without one would pass for judged."""
    assert set(JUDGES) == set(CODECS)
    assert {REGISTRY.provider(name).codec for name, _ in CASES} == set(CODECS)


@pytest.mark.parametrize(("name", "model"), CASES)
def test_the_maker_takes_what_is_sent(name: str, model: str) -> None:
    """Whatever a client says in OpenAI's words; what the format lacks is a note, and not in the body."""
    provider = REGISTRY.provider(name)
    codec, judge = by_name(provider.codec), JUDGES[provider.codec]

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(requests(), st.booleans())
    def judged(request: ChatRequest, stream: bool) -> None:
        judge(codec.encode(request, model=model, stream=stream, quirks=provider.quirks), model, stream=stream)

    judged()


@pytest.mark.parametrize("name", ["openai", "openai_responses", "anthropic", "google", "bedrock"])
def test_the_judge_sees_what_is_wrong(name: str) -> None:
    """A judge that lets everything pass is none: a field of no format, at the top and within a message."""
    provider = REGISTRY.provider(name)
    model = dict(CASES)[name]
    request = parse_chat(b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}')
    sent = by_name(provider.codec).encode(request, model=model, stream=False, quirks=provider.quirks)
    JUDGES[provider.codec](sent, model, stream=False)
    inner = next(value for value in sent.body.values() if isinstance(value, list))
    for place in (sent.body, inner[0]):
        place["of_no_format"] = 1
        with pytest.raises((ValidationError, AssertionError, KeyError)):
            JUDGES[provider.codec](sent, model, stream=False)
        del place["of_no_format"]

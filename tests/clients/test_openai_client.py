"""The official Python client as its documentation shows it: structured outputs, helpers, tools, streams.

Guards against answers that curl can read and the client cannot: a missing field, a null where it wants a list, deltas
that do not add up, arguments that are no string.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessage, ParsedFunctionToolCall
from pydantic import BaseModel, Field

pytestmark = pytest.mark.slow

ASK: list[Any] = [{"role": "user", "content": "Alice and Bob are going to a science fair on Friday."}]
SHORT: list[Any] = [{"role": "user", "content": "say little <stop> t6"}]  # ends a text by itself


class Kind(StrEnum):
    FAIR = "fair"
    PARTY = "party"


class Person(BaseModel):
    name: str
    age: int = Field(ge=0, le=150)


class Event(BaseModel):
    name: str
    kind: Kind
    participants: list[Person] = Field(min_length=1, max_length=3)
    note: str | None


class Step(BaseModel):
    explanation: str
    output: str


class Reasoned(BaseModel):
    steps: list[Step]
    final_answer: str


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str
    days: int = Field(ge=1, le=7)


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "minLength": 2},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["location", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CLOCK: Any = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}
TOOLS = [WEATHER, CLOCK]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as made:
        yield made


def weather(arguments: str) -> dict[str, str]:
    """Checked arguments of get_weather."""
    found = json.loads(arguments)
    assert found.keys() == {"location", "unit"}
    assert len(found["location"]) >= 2
    assert found["unit"] in ("celsius", "fahrenheit")
    return dict(found)


def test_a_json_schema_by_hand(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "integer", "minimum": 10}, "sure": {"type": "boolean"}},
        "required": ["answer", "sure"],
        "additionalProperties": False,
    }
    for strict in ({"strict": True}, {"strict": False}, {}):
        form: Any = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, **strict}}
        reply = client.chat.completions.create(model="echo", messages=ASK, response_format=form)
        choice = reply.choices[0]
        found = json.loads(choice.message.content or "")
        assert found["answer"] >= 10
        assert isinstance(found["sure"], bool)
        assert (choice.finish_reason, choice.message.refusal) == ("stop", None)
        assert choice.message.tool_calls is None


def test_json_mode(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="echo", messages=ASK, response_format={"type": "json_object"})
    assert isinstance(json.loads(reply.choices[0].message.content or ""), dict)


@pytest.mark.parametrize("form", [Event, Reasoned])
def test_parse_gives_the_class(client: openai.OpenAI, form: type[BaseModel]) -> None:
    reply = client.chat.completions.parse(model="echo", messages=ASK, response_format=form)
    message = reply.choices[0].message
    assert message.refusal is None
    assert isinstance(message.parsed, form)
    assert form.model_validate_json(message.content or "", strict=True) == message.parsed


def test_parse_gives_the_class_in_every_choice(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(model="echo", messages=ASK, response_format=Event, n=2)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert all(isinstance(choice.message.parsed, Event) for choice in reply.choices)


def test_parse_of_a_cut_answer_is_the_clients_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError) as caught:
        client.chat.completions.parse(model="echo", messages=ASK, response_format=Event, max_completion_tokens=8)
    assert caught.value.completion.usage is not None
    assert caught.value.completion.usage.completion_tokens == 8


def test_the_stream_helper_tells_parsed_snapshots(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="echo", messages=ASK, response_format=Event, stream_options={"include_usage": True}
    ) as stream:
        events = list(stream)
        last = stream.get_final_completion()
    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert len(deltas) > 3
    assert "".join(deltas) == last.choices[0].message.content
    assert [event.parsed for event in events if event.type == "content.done"] == [last.choices[0].message.parsed]
    assert isinstance(last.choices[0].message.parsed, Event)
    assert last.usage is not None
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


async def test_the_asynchronous_twin(base_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        reply = await client.chat.completions.parse(model="echo", messages=ASK, response_format=Event)
        assert isinstance(reply.choices[0].message.parsed, Event)
        async with client.chat.completions.stream(model="echo", messages=ASK, response_format=Event) as stream:
            kinds = {event.type async for event in stream}
            last = await stream.get_final_completion()
        assert {"chunk", "content.delta", "content.done"} <= kinds
        assert isinstance(last.choices[0].message.parsed, Event)


@pytest.mark.parametrize(
    "choice", ["auto", "none", {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}]
)
def test_a_text_where_tools_are_free(client: openai.OpenAI, choice: Any) -> None:
    """The echo model answers a text where it may."""
    reply = client.chat.completions.create(model="echo", messages=SHORT, tools=TOOLS, tool_choice=choice)
    message = reply.choices[0].message
    assert message.content
    assert message.tool_calls is None
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("choice", "names", "reason"),
    [
        ("required", {"get_weather", "clock"}, "tool_calls"),
        (NAMED, {"get_weather"}, "stop"),  # as OpenAI: the model did not choose
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}},
            {"get_weather"},
            "tool_calls",
        ),
    ],
    ids=["required", "named", "allowed"],
)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_where_one_is_forced(
    client: openai.OpenAI, choice: Any, names: set[str], reason: str, parallel: bool
) -> None:
    reply = client.chat.completions.create(
        model="echo", messages=ASK, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel
    )
    message = reply.choices[0].message
    assert message.content is None
    assert reply.choices[0].finish_reason == reason
    assert message.tool_calls
    for call in message.tool_calls:
        assert call.type == "function"
        assert call.id.startswith("call_")
        assert call.function.name in names
        if call.function.name == "get_weather":
            weather(call.function.arguments)


def test_deltas_of_a_streamed_call_add_up(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="echo", messages=ASK, tools=TOOLS, tool_choice=NAMED, parallel_tool_calls=False, stream=True
    )
    calls: dict[int, Any] = {}
    for chunk in stream:
        for part in chunk.choices[0].delta.tool_calls or ():
            if part.index not in calls:
                calls[part.index] = part
            else:
                assert (part.id, part.type) == (None, None)
                calls[part.index].function.arguments += part.function.arguments
    assert list(calls) == [0]
    assert calls[0].function.name == "get_weather"
    weather(calls[0].function.arguments)


def test_the_stream_helper_tells_calls(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(GetWeather)
    with client.chat.completions.stream(model="echo", messages=ASK, tools=[tool], tool_choice="required") as stream:
        events = list(stream)
        message = stream.get_final_completion().choices[0].message
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert message.tool_calls
    assert len(done) == len(message.tool_calls)
    assert all(isinstance(event.parsed_arguments, GetWeather) for event in done)


def test_a_pydantic_function_tool(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(GetWeather, name="forecast")
    reply = client.chat.completions.parse(model="echo", messages=ASK, tools=[tool], tool_choice="required")
    calls = reply.choices[0].message.tool_calls
    assert calls
    for call in calls:
        assert isinstance(call, ParsedFunctionToolCall)
        assert call.function.name == "forecast"
        assert isinstance(call.function.parsed_arguments, GetWeather)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # of the client, for its own `parsed`
def test_a_loop_of_tools(client: openai.OpenAI) -> None:
    """The answer goes back whole, as the object that the client made of it."""
    messages: list[Any] = [{"role": "developer", "content": "Use the tools."}, *ASK]
    first = client.chat.completions.create(model="echo", messages=messages, tools=TOOLS, tool_choice=NAMED)
    message = first.choices[0].message
    assert isinstance(message, ChatCompletionMessage)
    assert message.tool_calls
    messages.append(message)
    for call in message.tool_calls:
        assert call.type == "function"
        told = json.dumps({"degrees": 21, "of": weather(call.function.arguments)})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": told + " <stop> t6"})
    second = client.chat.completions.create(model="echo", messages=messages, tools=TOOLS, tool_choice="none")
    assert second.choices[0].message.content
    assert second.choices[0].message.tool_calls is None
    messages += [second.choices[0].message.model_dump(), *ASK]
    third = client.chat.completions.parse(
        model="echo",
        messages=messages,
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="none",
        response_format=Event,
    )
    assert isinstance(third.choices[0].message.parsed, Event)
    messages += [third.choices[0].message, *ASK]
    fourth = client.chat.completions.create(model="echo", messages=messages)
    assert fourth.choices[0].message.role == "assistant"


def test_logprobs_beside_calls_and_forms(client: openai.OpenAI) -> None:
    called = client.chat.completions.create(
        model="echo", messages=ASK, tools=[CLOCK], tool_choice="required", logprobs=True, top_logprobs=2
    )
    formed = client.chat.completions.parse(model="echo", messages=ASK, response_format=Event, logprobs=True)
    for reply in (called, formed):
        told = reply.choices[0].logprobs
        assert told is not None
        assert told.content
        assert reply.usage is not None
        assert all(entry.logprob <= 0 for entry in told.content)
    assert formed.choices[0].logprobs is not None
    assert (
        "".join(entry.token for entry in formed.choices[0].logprobs.content or ()) == formed.choices[0].message.content
    )


def test_the_deprecated_functions(client: openai.OpenAI) -> None:
    functions = [WEATHER["function"] | {"name": "old_weather"}]
    functions[0].pop("strict")
    reply = client.chat.completions.create(
        model="echo", messages=ASK, functions=functions, function_call={"name": "old_weather"}
    )
    message = reply.choices[0].message
    assert message.function_call is not None
    assert (message.function_call.name, message.content, message.tool_calls) == ("old_weather", None, None)
    weather(message.function_call.arguments)
    result: Any = {"role": "function", "name": "old_weather", "content": "21 degrees <stop> t6"}
    after = client.chat.completions.create(
        model="echo", messages=[*ASK, message, result], functions=functions, function_call="auto"
    )
    assert after.choices[0].message.content
    assert after.choices[0].finish_reason == "stop"


def test_what_a_request_of_this_kind_gets_wrong(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strng"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=ASK, response_format=form)
    assert caught.value.param == "response_format.json_schema.schema.type"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=ASK, tool_choice="required")
    assert caught.value.param == "tool_choice"


def test_ids_and_usage(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="echo", messages=SHORT)
    reply = raw.parse()
    assert raw.headers["x-request-id"] == reply.id
    assert reply._request_id == reply.id
    assert reply.object == "chat.completion"
    assert reply.system_fingerprint
    assert reply.usage is not None
    assert reply.usage.completion_tokens_details is not None
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0

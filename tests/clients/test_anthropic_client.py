"""Anthropic's official Python client against /v1/messages: its documented calls and helpers, sync and async.

Guards against answers that curl can read and the client cannot: events in another order, blocks that do not add up to
the whole message, inputs of tools that are no objects, errors that become the wrong exception.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import anthropic
import pytest
from anthropic.types import Message, ToolUseBlock
from fences import URL, of_kind
from pydantic import BaseModel, Field

pytestmark = pytest.mark.slow

ASK: list[Any] = [{"role": "user", "content": "Alice and Bob are going to a science fair on Friday."}]
SHORT: list[Any] = [{"role": "user", "content": "say little <stop> t6"}]  # ends a text by itself
PLAIN: Any = {"model": "echo", "max_tokens": 40, "messages": SHORT}
LONG: Any = {"model": "echo", "max_tokens": 300, "messages": ASK}
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a place",
    "input_schema": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "minLength": 2},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["location", "unit"],
        "additionalProperties": False,
    },
    "cache_control": {"type": "ephemeral"},
}
CLOCK: Any = {"type": "custom", "name": "clock", "input_schema": {"type": "object", "properties": {}}}
TOOLS = [WEATHER, CLOCK]


class Person(BaseModel):
    name: str
    age: int = Field(ge=0, le=150)


class Event(BaseModel):
    name: str
    kind: Literal["fair", "party"]
    participants: list[Person] = Field(min_length=1, max_length=3)
    note: str | None


@pytest.fixture
def address(base_url: str) -> str:
    """Without the version, which this client puts into its paths."""
    return base_url.removesuffix("/v1")


@pytest.fixture
def client(address: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
async def other(address: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=address, api_key="none", max_retries=0) as made:
        yield made


def text_of(message: Message) -> str:
    """The one text of an answer."""
    (block,) = message.content
    assert block.type == "text"
    return block.text


def calls_of(message: Message) -> list[ToolUseBlock]:
    return [block for block in message.content if block.type == "tool_use"]


def check_weather(call: ToolUseBlock) -> None:
    assert call.name == "get_weather"
    assert call.input.keys() == {"location", "unit"}
    assert call.input["unit"] in ("celsius", "fahrenheit")


def test_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**PLAIN, system="Be short.", metadata={"user_id": "u"}, service_tier="auto")
    assert (message.type, message.role, message.model) == ("message", "assistant", "echo")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert text_of(message)
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) > 5
    assert message.usage.output_tokens > 0
    assert message._request_id == message.id


def test_a_prompt_said_again_is_found_in_the_cache(client: anthropic.Anthropic) -> None:
    ask = PLAIN | {"system": [{"type": "text", "text": "word " * 200, "cache_control": {"type": "ephemeral"}}]}
    first, second = (client.messages.create(**ask).usage for _ in range(2))
    assert (second.cache_read_input_tokens or 0) > 100
    sums = {use.input_tokens + (use.cache_read_input_tokens or 0) for use in (first, second)}
    assert len(sums) == 1


def test_a_stream_adds_up_to_the_message(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**PLAIN, extra_body={"temperature": 0})
    with client.messages.stream(**PLAIN, extra_body={"temperature": 0}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
        assert stream.request_id == final.id
    assert kinds[0] == "message_start"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert text_of(final) == text_of(whole)
    assert final.stop_reason == whole.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_raw_events_and_a_stream_of_text(client: anthropic.Anthropic) -> None:
    events = list(client.messages.create(**PLAIN, stream=True))
    assert [event.type for event in events if event.type.startswith("message")] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    with client.messages.stream(**PLAIN) as stream:
        texts = list(stream.text_stream)
        assert "".join(texts) == stream.get_final_text()


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    every = text_of(client.messages.create(**LONG, extra_body={"temperature": 0}))
    word = every.split()[3]
    stops = ["never said", f" {word}"]
    message = client.messages.create(**LONG, stop_sequences=stops, extra_body={"temperature": 0})
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", f" {word}")
    assert text_of(message) == every[: every.index(f" {word}")]


def test_the_most_tokens(client: anthropic.Anthropic) -> None:
    assert client.messages.create(**LONG | {"max_tokens": 7}).stop_reason == "max_tokens"
    nothing = client.messages.create(**LONG | {"max_tokens": 0})
    assert (nothing.content, nothing.stop_reason, nothing.usage.output_tokens) == ([], "max_tokens", 0)


def test_an_answer_that_the_request_begins(client: anthropic.Anthropic) -> None:
    begun = [*ASK, {"role": "assistant", "content": "They will see t1"}]
    message = client.messages.create(**LONG | {"messages": begun, "max_tokens": 5})
    assert message.usage.output_tokens == 5


@pytest.mark.parametrize("serial", [False, True])
def test_any_tool(client: anthropic.Anthropic, serial: bool) -> None:
    choice: Any = {"type": "any", "disable_parallel_tool_use": serial}
    message = client.messages.create(**LONG, tools=TOOLS, tool_choice=choice)
    assert message.stop_reason == "tool_use"
    calls = calls_of(message)
    assert calls
    assert all(call.name in ("get_weather", "clock") and call.id.startswith("toolu_") for call in calls)
    assert len(calls) == 1 or not serial


def test_one_tool_whole_and_streamed(client: anthropic.Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "get_weather"}
    (call,) = calls_of(client.messages.create(**LONG, tools=TOOLS, tool_choice=choice))
    check_weather(call)
    with client.messages.stream(**LONG, tools=TOOLS, tool_choice=choice) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    (call,) = calls_of(final)
    check_weather(call)
    assert json.loads("".join(pieces)) == call.input


def test_no_tool_and_the_models_choice(client: anthropic.Anthropic) -> None:
    choices: list[Any] = [{"type": "none"}, {"type": "auto"}]
    for choice in choices:
        message = client.messages.create(**PLAIN, tools=TOOLS, tool_choice=choice)
        assert message.stop_reason in ("end_turn", "tool_use", "max_tokens")
        assert choice["type"] == "auto" or not calls_of(message)


def test_results_of_tools_go_back(client: anthropic.Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "get_weather"}
    asked = client.messages.create(**LONG, tools=TOOLS, tool_choice=choice)
    (call,) = calls_of(asked)
    results: Any = [
        {
            "type": "tool_result",
            "tool_use_id": call.id,
            "content": [{"type": "text", "text": "rain"}],
            "is_error": True,
        },
        {"type": "text", "text": "And now? <stop> t4"},
    ]
    messages = [*ASK, {"role": "assistant", "content": asked.content}, {"role": "user", "content": results}]
    answer = client.messages.create(**LONG | {"messages": messages}, tools=TOOLS)
    assert answer.stop_reason in ("end_turn", "tool_use", "max_tokens")
    again = [*ASK, asked.to_param(), {"role": "user", "content": results}]
    assert client.messages.count_tokens(model="echo", messages=again, tools=TOOLS).input_tokens > 50


def test_the_tool_runner(client: anthropic.Anthropic) -> None:
    asked: list[str] = []

    @anthropic.beta_tool
    def get_weather(location: str) -> str:
        """The weather.

        Args:
            location: A place.
        """
        asked.append(location)
        return "rain"

    runner = client.beta.messages.tool_runner(
        **LONG,
        tools=[get_weather],
        tool_choice={"type": "any"},
        max_iterations=2,
        betas=["interleaved-thinking-2025-05-14"],
    )
    messages = list(runner)
    assert len(messages) == 2
    assert asked


def test_a_form_by_hand_and_by_class(client: anthropic.Anthropic) -> None:
    schema: Any = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    form: Any = {"format": {"type": "json_schema", "schema": schema | {"additionalProperties": False}}}
    message = client.messages.create(**LONG, output_config=form)
    assert isinstance(json.loads(text_of(message))["sure"], bool)
    parsed = client.messages.parse(**LONG, output_format=Event)
    assert isinstance(parsed.parsed_output, Event)
    with client.messages.stream(**LONG, output_format=Event) as stream:
        final = stream.get_final_message()
    assert isinstance(final.parsed_output, Event)


@pytest.mark.parametrize(
    "thinking",
    [
        {"type": "enabled", "budget_tokens": 20},
        {"type": "adaptive", "display": "omitted"},
        {"type": "disabled"},
    ],
)
def test_thinking_with_a_model_that_does_not_reason(client: anthropic.Anthropic, thinking: Any) -> None:
    message = client.messages.create(**PLAIN, thinking=thinking, output_config={"effort": "low"})
    assert text_of(message)


def test_counts_are_those_of_the_answers_usage(client: anthropic.Anthropic) -> None:
    ask: Any = {"model": "echo", "messages": SHORT, "system": "Be short.", "tools": TOOLS}
    counted = client.messages.count_tokens(**ask)
    use = client.messages.create(max_tokens=5, **ask).usage
    assert counted.input_tokens == use.input_tokens + use.cache_read_input_tokens


def test_models(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list(limit=1)] == ["echo"]
    assert [model.id for model in client.models.list(lifecycle=["retired"])] == []
    model = client.models.retrieve("echo")
    assert (model.type, model.display_name, model.lifecycle) == ("model", "echo", "active")
    assert isinstance(model.created_at, datetime.datetime)
    assert (model.max_input_tokens or 0) > 100
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("nobody")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"container": "c"}, "container"),
    ({"inference_geo": "eu"}, "inference_geo"),
    ({"speed": "fast"}, "speed"),
    ({"diagnostics": {"previous_message_id": "msg_1"}}, "diagnostics"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": 4000}}, "thinking.budget_tokens"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
    ({"tools": [CLOCK | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"extra_body": {"frobnicate": 1}}, "frobnicate"),
    ({"extra_body": {"mcp_servers": [{"type": "url"}]}}, "mcp_servers"),
    ({"extra_body": {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}}, "context_management"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://a/b"}}]}
            ]
        },
        "messages[0].content[0]",
    ),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_here_is_refused_by_name(client: anthropic.Anthropic, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**LONG | fields)
    body: Any = caught.value.body
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].removeprefix("unknown field ").startswith(named)
    assert body["request_id"] == caught.value.request_id


def test_errors_have_the_clients_classes(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**LONG | {"model": "nobody"})
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.list()
    with pytest.raises(anthropic.NotFoundError):
        client.beta.agents.list()
    with pytest.raises(anthropic.NotFoundError), client.messages.stream(**LONG | {"model": "nobody"}):
        pass


def test_the_pages_example(address: str) -> None:
    (example,) = of_kind("python anthropic")
    exec(compile(example.code.replace(URL, address), str(example), "exec"), {"__name__": "example"})


async def test_the_async_client(other: anthropic.AsyncAnthropic) -> None:
    message = await other.messages.create(**PLAIN)
    assert text_of(message)
    async with other.messages.stream(
        **LONG, tools=TOOLS, tool_choice={"type": "tool", "name": "get_weather"}
    ) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_message()
    assert kinds[-1] == "message_stop"
    (call,) = calls_of(final)
    check_weather(call)
    async with other.messages.stream(**PLAIN) as stream:
        texts = [text async for text in stream.text_stream]
    assert texts
    parsed = await other.messages.parse(**LONG, output_format=Event)
    assert isinstance(parsed.parsed_output, Event)
    counted = await other.messages.count_tokens(model="echo", messages=ASK)
    assert counted.input_tokens > 5
    assert [model.id async for model in other.models.list()] == ["echo"]
    raw = await other.messages.with_raw_response.create(**PLAIN)
    assert raw.request_id == (await raw.parse()).id
    with pytest.raises(anthropic.BadRequestError):
        await other.messages.create(**PLAIN, container="c")

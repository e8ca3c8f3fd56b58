"""The OpenAI Agents SDK as its documentation shows it: output types, function tools, streams; over its default API,
responses, and over chat completions.

Guards against a loop that does not end, or ends in a ModelBehaviorError, because an answer is not what was asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

pytestmark = pytest.mark.slow


def installed() -> Any:
    """Its package is named like a folder of ours, which `python -m pytest` finds first."""
    path = importlib.metadata.distribution("openai-agents").locate_file("agents/__init__.py")
    spec = importlib.util.spec_from_file_location("agents", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["agents"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sdk = installed()
sdk.set_tracing_disabled(True)
QUIET = sdk.RunConfig(tracing_disabled=True)


class Event(BaseModel):
    name: str = Field(min_length=1)
    participants: list[str] = Field(min_length=1)


@dataclass
class Member:
    age: int
    asked: int = 0


def is_new(context: sdk.RunContextWrapper[Member], agent: Any) -> bool:
    """Offered once: where a call and an answer are both possible, the echo model calls for ever."""
    return context.context.asked == 0


@sdk.function_tool(is_enabled=is_new)
def get_weather(context: sdk.RunContextWrapper[Member], city: str, days: int) -> str:
    """The weather of a city.

    Args:
        city: where
        days: how far ahead
    """
    assert isinstance(days, int)
    context.context.asked += 1
    return f"sunny in {city} <stop> t20"


Model = sdk.OpenAIChatCompletionsModel | sdk.OpenAIResponsesModel


@pytest.fixture(params=["responses", "chat"])
async def model(base_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Model]:
    kind = sdk.OpenAIResponsesModel if request.param == "responses" else sdk.OpenAIChatCompletionsModel
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield kind(model="echo", openai_client=client)


async def test_a_text(model: Model) -> None:
    agent = sdk.Agent(name="Assistant", instructions="You are brief.", model=model)
    result = await sdk.Runner.run(agent, "say little <stop> t6", run_config=QUIET)
    assert isinstance(result.final_output, str)
    assert result.final_output


@pytest.mark.parametrize("output", [Event, list[int], Member], ids=str)
async def test_an_output_type(model: Model, output: Any) -> None:
    agent = sdk.Agent(name="Extractor", instructions="Extract the event.", model=model, output_type=output)
    result = await sdk.Runner.run(agent, "Alice and Bob meet on Friday.", run_config=QUIET, max_turns=1)
    assert isinstance(result.final_output, getattr(output, "__origin__", output))
    assert result.context_wrapper.usage.output_tokens > 0


async def test_a_tool_and_then_an_answer(model: Model) -> None:
    """Once it was called, the tool is not offered any more, and the echo model answers a text."""
    for choice in ("required", "get_weather"):
        member = Member(age=30)
        agent = sdk.Agent[Member](
            name="Weather",
            instructions="Use the tool.",
            model=model,
            tools=[get_weather],
            model_settings=sdk.ModelSettings(tool_choice=choice, parallel_tool_calls=False),
        )
        result = await sdk.Runner.run(agent, "What is the weather in Tokyo?", context=member, run_config=QUIET)
        assert member.asked == 1
        assert isinstance(result.final_output, str)
        assert len(result.raw_responses) == 2


async def test_a_tool_and_then_an_output_type(model: Model) -> None:
    member = Member(age=30)
    agent = sdk.Agent[Member](
        name="Weather",
        instructions="Use the tool.",
        model=model,
        tools=[get_weather],
        output_type=Event,
        model_settings=sdk.ModelSettings(tool_choice="required"),
    )
    result = await sdk.Runner.run(agent, "What is the weather in Tokyo?", context=member, run_config=QUIET)
    assert member.asked >= 1
    assert isinstance(result.final_output, Event)


async def test_a_tool_whose_result_is_the_answer(model: Model) -> None:
    agent = sdk.Agent[Member](
        name="Weather",
        model=model,
        tools=[get_weather],
        tool_use_behavior="stop_on_first_tool",
        model_settings=sdk.ModelSettings(tool_choice="required"),
    )
    result = await sdk.Runner.run(agent, "What is the weather?", context=Member(age=1), run_config=QUIET)
    assert result.final_output.startswith("sunny in ")


async def test_a_streamed_run(model: Model) -> None:
    member = Member(age=30)
    agent = sdk.Agent[Member](
        name="Weather",
        model=model,
        tools=[get_weather],
        output_type=Event,
        model_settings=sdk.ModelSettings(tool_choice="required", include_usage=True),
    )
    result = sdk.Runner.run_streamed(agent, "What is the weather?", context=member, run_config=QUIET)
    deltas, items = [], []
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            deltas.append(event.data.delta)
        elif event.type == "run_item_stream_event":
            items.append(event.item.type)
    assert isinstance(result.final_output, Event)
    assert Event.model_validate_json("".join(deltas)) == result.final_output
    assert items[0] == "tool_call_item"
    assert items[-1] == "message_output_item"
    assert member.asked == items.count("tool_call_output_item")


async def test_a_handoff(model: Model) -> None:
    """A handoff is a tool without arguments."""
    other = sdk.Agent(name="Spanish", instructions="You speak Spanish. <stop> t40", model=model, output_type=Event)
    agent = sdk.Agent(
        name="Triage", model=model, handoffs=[other], model_settings=sdk.ModelSettings(tool_choice="required")
    )
    result = await sdk.Runner.run(agent, "Hola", run_config=QUIET)
    assert result.last_agent is other
    assert isinstance(result.final_output, Event)


@pytest.mark.parametrize("model", ["responses"], indirect=True)
async def test_runs_that_go_on(model: Model) -> None:
    """Remembered by the server, and by the client, whose list of items is what the SDK made of the answer."""
    agent = sdk.Agent(
        name="Assistant",
        instructions="You are brief.",
        model=model,
        model_settings=sdk.ModelSettings(metadata={"a": "b"}, truncation="auto", top_logprobs=1),
    )
    first = await sdk.Runner.run(agent, "say little <stop> t6", run_config=QUIET)
    by_server = await sdk.Runner.run(
        agent, "and less <stop> t6", run_config=QUIET, previous_response_id=first.last_response_id
    )
    assert by_server.context_wrapper.usage.input_tokens > first.context_wrapper.usage.input_tokens
    listed = [*first.to_input_list(), {"role": "user", "content": "and less <stop> t6"}]
    by_client = await sdk.Runner.run(agent, listed, run_config=QUIET)
    assert by_client.context_wrapper.usage.input_tokens == by_server.context_wrapper.usage.input_tokens

"""pydantic-ai as its documentation shows it: outputs by tool, natively and by prompt, tools, streams; no retries.

Guards against a forced call that is none, arguments outside their schema, and messages of its own loop that come back
in a form that the server refuses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, PromptedOutput, RunContext, ToolOutput
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

pytestmark = pytest.mark.slow


class City(BaseModel):
    city: str = Field(min_length=1)
    country: str
    people: int = Field(ge=1000)


class Loose(BaseModel):
    city: str = ""


class Failed(BaseModel):
    reason: Literal["unknown", "unclear"]


@dataclass
class Bank:
    balance: int
    asked: int = 0


@pytest.fixture
async def model(base_url: str) -> AsyncIterator[OpenAIChatModel]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield OpenAIChatModel("echo", provider=OpenAIProvider(openai_client=client))


@pytest.mark.parametrize(
    "output",
    [City, ToolOutput(City, name="place"), NativeOutput(City), NativeOutput(City, strict=True)],
    ids=str,
)
async def test_an_output_of_a_class(model: OpenAIChatModel, output: Any) -> None:
    agent = Agent(model, output_type=output, retries=0, instructions="Name the place.")
    result = await agent.run("Where were the Olympics of 2012?")
    assert isinstance(result.output, City)
    assert result.usage.output_tokens > 0


async def test_an_output_by_prompt(model: OpenAIChatModel) -> None:
    """The schema stands in words alone: an object is enforced, no more."""
    result = await Agent(model, output_type=PromptedOutput(Loose), retries=0).run("Where?")
    assert isinstance(result.output, Loose)


@pytest.mark.parametrize("output", [[City, Failed], NativeOutput([City, Failed])], ids=["tools", "native"])
async def test_an_output_of_one_of_several_classes(model: OpenAIChatModel, output: Any) -> None:
    result = await Agent(model, output_type=output, retries=0).run("Where?")
    assert isinstance(result.output, City | Failed)


@pytest.mark.parametrize("output", [int, bool, list[str], Literal["a", "b"], dict[str, int]], ids=str)
async def test_an_output_of_a_simple_type(model: OpenAIChatModel, output: Any) -> None:
    result = await Agent(model, output_type=output, retries=0).run("How many?")
    if output == Literal["a", "b"]:
        assert result.output in ("a", "b")
    else:
        assert type(result.output) is (getattr(output, "__origin__", None) or output)


async def test_a_text(model: OpenAIChatModel) -> None:
    result = await Agent(model, retries=0).run("say little <stop> t6")
    assert isinstance(result.output, str)
    assert result.output


async def test_tools_before_the_output(model: OpenAIChatModel) -> None:
    """The tool is forced once; then only the output's own tool is left."""
    bank = Bank(balance=100)

    def settings(context: RunContext[Bank]) -> Any:
        wanted = "balance" if context.run_step <= 1 else "final_result"
        return {"extra_body": {"tool_choice": {"type": "function", "function": {"name": wanted}}}}

    agent = Agent(model, output_type=City, deps_type=Bank, retries=0, model_settings=settings)

    @agent.tool
    async def balance(context: RunContext[Bank], currency: Literal["EUR", "USD"], cents: bool) -> str:
        """What the account holds.

        Args:
            currency: to tell it in
            cents: with two more digits
        """
        context.deps.asked += 1
        assert currency in ("EUR", "USD")
        assert isinstance(cents, bool)
        return f"{context.deps.balance} {currency}"

    result = await agent.run("What is my balance?", deps=bank)
    assert bank.asked >= 1
    assert isinstance(result.output, City)
    calls = [part for message in result.all_messages() for part in message.parts if isinstance(part, ToolCallPart)]
    assert [call.tool_name for call in calls][-1] == "final_result"
    again = await Agent(model, output_type=NativeOutput(City), retries=0).run(
        "And now?", message_history=result.all_messages()
    )
    assert isinstance(again.output, City)


@pytest.mark.parametrize("output", [City, NativeOutput(City)], ids=["tool", "native"])
async def test_a_streamed_output(model: OpenAIChatModel, output: Any) -> None:
    agent = Agent(model, output_type=output, retries=0)
    async with agent.run_stream("Where?") as result:
        seen = [part async for part in result.stream_output(debounce_by=None)]
    assert isinstance(seen[-1], City)


async def test_a_streamed_text(model: OpenAIChatModel) -> None:
    async with Agent(model, retries=0).run_stream("say little <stop> t6") as result:
        deltas = [text async for text in result.stream_text(delta=True, debounce_by=None)]
    assert "".join(deltas) == await result.get_output()


def test_a_run_that_blocks(base_url: str) -> None:
    """Without a client of ours: address and key are all that it is told."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        model = OpenAIChatModel("echo", provider=OpenAIProvider(base_url=base_url, api_key="none"))
        assert isinstance(Agent(model, output_type=City, retries=0).run_sync("Where?").output, City)
        loop.run_until_complete(model.client.close())
    finally:
        asyncio.set_event_loop(None)
        loop.close()

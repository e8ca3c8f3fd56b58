"""OpenAI's and Anthropic's own clients against routes, whose answers come from providers.

They guard against what a client's parser does not survive: comments amid a stream, fields that it adds up wrongly, and
a message that cannot be sent back as it came.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest

from diptych.cluster.api.testing import front_door
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import Script, ScriptedTarget, fails, says
from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Extras, Reasoning, Signature
from diptych.protos.failures import FailureKind
from diptych.protos.replies import Began, Ended, Usage

pytestmark = pytest.mark.slow

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
THEIRS: Any = {"name": "weather", "input_schema": {"type": "object", "properties": {}}}
CALLED: Script = [
    Began(),
    Reasoning("hm"),
    Signature("proof"),
    Content("wait"),
    CallBegin(0, "weather", "toolu_1"),
    CallArguments(0, '{"city": "Oslo"}'),
    CallEnd(0),
    Extras("fam", {"of": "the call"}),
    Usage(input_tokens=9, output_tokens=4, cache_read_tokens=3),
    Ended("tool_calls"),
]
BREAKS: Script = [Began(), Content("one "), fails(FailureKind.SERVER)]


@pytest.fixture
async def door() -> AsyncIterator[tuple[str, ScriptedTarget]]:
    calls = ScriptedTarget("p/calls", [CALLED])
    targets = [calls, ScriptedTarget("p/breaks", [BREAKS]), ScriptedTarget("q/on", [says("two")], continues="prefill")]
    routes = {
        "calls": {"targets": ["p/calls"]},
        "goes-on": {"targets": ["p/breaks", "q/on"], "strategy": "priority", "midstream": "continue"},
        "breaks": {"targets": ["p/breaks"]},
    }
    async with front_door(gateway=GatewaySettings.model_validate({"routes": routes}), targets=targets) as made:
        yield made.listener.url, calls


async def test_openai(door: tuple[str, ScriptedTarget]) -> None:
    url, calls = door
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        async with client.chat.completions.stream(model="goes-on", messages=HELLO) as stream:
            assert (await stream.get_final_completion()).choices[0].message.content == "one two"
        with pytest.raises(openai.APIError, match="broke off"):
            async with client.chat.completions.stream(model="breaks", messages=HELLO) as stream:
                await stream.until_done()
        async with client.chat.completions.stream(model="calls", messages=HELLO, tools=[TOOL]) as stream:
            streamed = (await stream.get_final_completion()).choices[0].message
        whole = await client.chat.completions.create(model="calls", messages=HELLO, tools=[TOOL])
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.choices[0].finish_reason) == (9, "tool_calls")
        result = {"role": "tool", "tool_call_id": "toolu_1", "content": "rain"}
        for message in (streamed, whole.choices[0].message):
            back: list[Any] = [*HELLO, message.model_dump(exclude_none=True), result]
            await client.chat.completions.create(model="calls", messages=back, tools=[TOOL])
            thought, _, call = calls.requests[-1].messages[1].parts
            assert (thought.signature, call.provider_data) == ("proof", {"fam": {"of": "the call"}})  # type: ignore[union-attr]
        response = await client.responses.create(model="calls", input="hello")
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
        cards = await client.models.list()
        assert {"calls", "goes-on"} <= {card.id for card in cards.data}


async def test_they_ask_again_where_that_can_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget is spent for a day: Anthropic's client slept so long, and older ones of OpenAI asked thrice in a second.
    A limit of requests is waited for, as long as its answer says.
    """
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("anyio.sleep", sleep)
    settings = {
        "routes": {name: {"targets": ["p/a"]} for name in ("dear", "slow")},
        "prices": {"p/a": {"input_per_mtok": 1, "output_per_mtok": 1}},
        "budgets": {"spent": {"amount_usd": 1e-6, "period": "total", "route": "dear"}},
        "limits": {"slow": {"requests_per_minute": 1, "route": "slow"}},
    }
    target = ScriptedTarget("p/a", [says("fine")])
    async with front_door(gateway=GatewaySettings.model_validate(settings), targets=[target]) as door:
        url, answers = door.listener.url, door.router.metrics.counters["http_answers"]
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as theirs,
            anthropic.AsyncAnthropic(base_url=url, api_key="x") as other,
        ):
            with pytest.raises(openai.RateLimitError, match="the budget spent"):
                await theirs.chat.completions.create(model="dear", messages=HELLO)
            with pytest.raises(anthropic.RateLimitError, match="the budget spent"):
                await other.messages.create(model="dear", messages=HELLO, max_tokens=5)
            paths = ("/v1/chat/completions", "/v1/messages")
            assert [answers.labels(path, "429")._value.get() for path in paths] == [1, 1]
            assert (slept, target.requests) == ([], [])
            await theirs.chat.completions.create(model="slow", messages=HELLO)
            with pytest.raises(openai.RateLimitError, match="requests a minute"):
                await theirs.chat.completions.create(model="slow", messages=HELLO)
            with pytest.raises(anthropic.RateLimitError, match="requests a minute"):
                await other.messages.create(model="slow", messages=HELLO, max_tokens=5)
            assert [answers.labels(path, "429")._value.get() for path in paths] == [4, 4]
            assert len(slept) == 4
            assert all(0 < seconds <= 60 for seconds in slept)


async def test_anthropic(door: tuple[str, ScriptedTarget]) -> None:
    url, calls = door
    async with anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0) as client:
        async with client.messages.stream(model="goes-on", max_tokens=50, messages=HELLO) as stream:
            assert (await stream.get_final_message()).content[0].text == "one two"  # type: ignore[union-attr]
        with pytest.raises(anthropic.APIError, match="broke off"):
            async with client.messages.stream(model="breaks", max_tokens=50, messages=HELLO) as stream:
                await stream.get_final_message()
        thinking: Any = {"type": "enabled", "budget_tokens": 1024}
        ask: Any = {"model": "calls", "max_tokens": 2000, "tools": [THEIRS], "thinking": thinking}
        async with client.messages.stream(messages=HELLO, **ask) as stream:
            streamed = await stream.get_final_message()
        whole = await client.messages.create(messages=HELLO, **ask)
        assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
        assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
        assert streamed.content[0].signature == whole.content[0].signature == "proof"  # type: ignore[union-attr]
        assert (whole.usage.input_tokens, whole.usage.cache_read_input_tokens) == (6, 3)
        assert (streamed.usage.output_tokens, whole.stop_reason) == (4, "tool_use")
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}]}
        await client.messages.create(messages=[*HELLO, {"role": "assistant", "content": whole.content}, result], **ask)
        thought = calls.requests[-1].messages[1].parts[0]
        assert (thought.text, thought.signature) == ("hm", "proof")  # type: ignore[union-attr]

"""One typed function over llm-katan, a server of other makers, in its formats of OpenAI and Anthropic: equal replies.

Its words were written from the same public specifications as ours and know nothing of ours. Guards against replies that
are equal over our own fixtures alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from katan_server import FORMATS, KEYS, OLDER, llm_katan

from diptych.agents import llm

pytestmark = pytest.mark.slow
SHAPES = ("openai", "anthropic")
_TIME = re.compile(r"time=\S+")  # its texts tell it


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with llm_katan(tmp_path_factory.mktemp("katan")) as found:
        yield found


def registry_at(address: str) -> llm.Registry:
    providers: dict[str, Any] = {}
    for name in SHAPES:
        path, codec, auth, key = FORMATS[name]
        providers[f"katan_{name}"] = {
            "base_url": address + path,
            "codec": codec,
            "auth": auth,
            "api_key": f"env:{key}",
            "quirks": OLDER.get(codec, {}),
        }
    return llm.Registry(providers=providers, environ=dict(KEYS))


@llm.tool
def weather(city: str, days: int) -> str:
    """Of a city."""
    return f"{days} days of rain in {city}"


def told(reply: llm.Reply[Any]) -> dict[str, Any]:
    return {
        "value": _TIME.sub("", reply.result) if isinstance(reply.result, str) else reply.result,
        "text": _TIME.sub("", reply.text),
        "finish": reply.finish,
        "calls": [(call.name, call.arguments) for call in reply.tool_calls],
        "output": reply.usage.output_tokens,
        "roles": [message.role for message in reply.messages],
        "attempts": [(attempt.number, attempt.why) for attempt in reply.attempts],
    }


async def answers(address: str, **settings: Any) -> list[dict[str, Any]]:
    """Of each shape: awaited, in a stream, and in a thread."""
    registry = registry_at(address)
    found = []
    for name in SHAPES:

        @llm.call(f"katan_{name}/echo-1", registry=registry, max_tokens=50, temperature=0.5, **settings)
        def count(to: int) -> list[Any]:
            return [llm.system("Be brief."), llm.user(f"Count to {to}.")]

        replies = [await count.aio(3), await count.stream(3).reply.aio(), await asyncio.to_thread(count, 3)]
        found += [told(reply) for reply in replies]
    await registry.close.aio()
    await asyncio.to_thread(registry.close)
    return found


async def test_texts_are_equal(address: str) -> None:
    first, *others = await answers(address)
    assert first["text"].endswith("\nUser: Count to 3.")
    assert others == [first] * len(others)


async def test_calls_of_tools_are_equal_and_gone_on_from(address: str) -> None:
    own = {"output": None, "text": None}  # as Anthropic, it says a text in front of its call
    first, *others = [{**one, **own} for one in await answers(address, tools=[weather])]
    assert first["calls"] == [("weather", {"city": "test_city", "days": 1})]
    assert others == [first] * len(others)
    registry = registry_at(address)
    for name in SHAPES:

        @llm.call(f"katan_{name}/echo-1", registry=registry, max_tokens=50, tools=[weather])
        def ask() -> str:
            return "How is the weather?"

        reply = await ask.aio()
        reply = await reply.resume.aio(await reply.run_tools.aio())
        assert [message.role for message in reply.messages] == ["user", "assistant", "tool", "assistant"]
    await registry.close.aio()


async def test_a_wrong_key_is_the_same_error_and_told_to_nobody(address: str) -> None:
    for name in SHAPES:
        path, codec, auth, _ = FORMATS[name]
        lab = {"base_url": address + path, "codec": codec, "auth": auth, "api_key": "env:WRONG"}
        registry = llm.Registry(providers={"lab": lab}, environ={"WRONG": "sk-wrong-0123456789abcdef"})

        @llm.call("lab/echo-1", registry=registry, max_tokens=50)
        def ask() -> str:
            return "x"

        with pytest.raises(llm.ProviderError) as caught:
            await ask.aio()
        assert caught.value.failure.kind == "auth"
        assert "0123456789abcdef" not in f"{caught.value!r} {caught.value} {caught.value.attempts!r}"
        await registry.close.aio()


async def test_a_limit_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    with llm_katan(tmp_path, "--rate-limit-after", "1") as failing:
        for name in SHAPES:
            registry = registry_at(failing)

            @llm.call(f"katan_{name}/echo-1", registry=registry, max_tokens=50, retries=llm.Retries(attempts=1))
            def ask() -> str:
                return "x"

            with contextlib.suppress(llm.ProviderError):
                await ask.aio()
            with pytest.raises(llm.ProviderError) as caught:
                await ask.aio()
            assert caught.value.failure.kind == "rate_limited"
            await registry.close.aio()

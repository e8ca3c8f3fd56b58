"""llm-katan, a server of other makers that speaks the formats of five providers, answers what `Gateway` asks.

It was written from the same public specifications and knows nothing of ours. It checks each format's key, in its
header, and refuses bodies that lack a field. Guards against an address, a header or a body that only our own fixtures
would take.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from katan_server import FORMATS, KEYS, OLDER, llm_katan

from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.errors import DiptychError, RateLimited
from diptych.protos.messages import Text
from diptych.protos.openai import parse_chat
from diptych.protos.replies import Reply

pytestmark = pytest.mark.slow

STREAMING = [name for name in FORMATS if name != "bedrock"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Count to three."},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "And now\u2026 the rest?"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with llm_katan(tmp_path_factory.mktemp("katan")) as found:
        yield found


def registry(addresses: dict[str, str]) -> Registry:
    """Providers by `NAME` or `NAME_WORD`, as each of the formats, at the given addresses."""
    providers = {}
    for name, found in addresses.items():
        path, codec, auth, key = FORMATS[name.partition("_")[0]]
        providers[name] = ProviderSettings.model_validate(
            {
                "base_url": found + path,
                "codec": codec,
                "auth": auth,
                "api_key": f"env:{key}_KEY",
                "quirks": OLDER.get(codec, {}),
            }
        )
    return Registry.load(providers, {f"{name}_KEY": key for name, key in KEYS.items()})


@pytest.fixture
async def gateway(address: str) -> AsyncIterator[Gateway]:
    async with Gateway(GatewaySettings(direct=True), registry(dict.fromkeys(FORMATS, address))) as made:
        yield made


def text_of(reply: Reply) -> str:
    return "".join(part.text for part in reply.message.parts if isinstance(part, Text))


def is_the_echo(reply: Reply) -> bool:
    """What it answers: how many messages it saw, the limit and the temperature, and the last message of the user."""
    words = text_of(reply)
    # Gemini, Anthropic and Bedrock have the system's words outside of the messages; it counts them as one again.
    return "messages=4 max_tokens=50 temperature=0.5" in words and words.endswith("\nUser: And now\u2026 the rest?")


@pytest.mark.parametrize("name", FORMATS)
async def test_a_whole_answer(gateway: Gateway, name: str) -> None:
    reply = await gateway.chat(f"{name}/echo-1", MESSAGES, max_tokens=50, temperature=0.5)
    assert is_the_echo(reply)
    assert reply.ended.finish == "stop"
    assert reply.usage.input_tokens == 10
    assert reply.usage.output_tokens == len(text_of(reply).split())


@pytest.mark.parametrize("name", STREAMING)
async def test_a_stream(gateway: Gateway, name: str) -> None:
    async with gateway.stream(f"{name}/echo-1", MESSAGES, max_tokens=50, temperature=0.5) as events:
        told = [event async for event in events]
    reply = events.reply()
    assert is_the_echo(reply)
    assert reply.ended.finish == "stop"
    assert reply.usage.input_tokens == 10
    assert len(told) > 10  # it sends four letters at a time


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
async def test_a_call_of_a_tool(gateway: Gateway, name: str, is_streamed: bool) -> None:
    """It calls the first tool with made up arguments. Asked for a stream, all but Anthropic's answer whole: so do
    some providers, and it is the same answer.
    """
    if is_streamed:
        async with gateway.stream(f"{name}/echo-1", MESSAGES, tools=[TOOL], max_tokens=50) as events:
            async for _ in events:
                pass
        reply = events.reply()
    else:
        reply = await gateway.chat(f"{name}/echo-1", MESSAGES, tools=[TOOL], max_tokens=50)
    (call,) = reply.message.tool_calls
    assert (call.name, call.arguments) == ("weather", {"city": "test_city", "days": 1})
    assert json.loads(call.text) == call.arguments
    # Without an id of its answer, which Gemini's have, there is nothing that one of a call could be made of.
    assert call.id or FORMATS[name][1] == "gemini.generate"
    assert reply.ended.finish == "tool_calls"


@pytest.mark.parametrize("name", FORMATS)
async def test_a_result_of_a_tool_goes_back(gateway: Gateway, name: str) -> None:
    """The second turn of a loop with tools is where formats differ most."""
    first = await gateway.chat(f"{name}/echo-1", MESSAGES, tools=[TOOL], max_tokens=50)
    (call,) = first.message.tool_calls
    call_id = call.id or "made_by_the_program"
    messages: list[Any] = [
        *MESSAGES,
        {
            "role": "assistant",
            "tool_calls": [
                {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
            ],
        },
        {"role": "tool", "tool_call_id": call_id, "content": "It rains."},
    ]
    reply = await gateway.chat(f"{name}/echo-1", messages, max_tokens=50, tools=[TOOL])
    assert len(reply.message.tool_calls) == 1
    assert (reply.usage.input_tokens or 0) >= 10


@pytest.mark.parametrize("name", FORMATS)
async def test_an_image_goes_along(gateway: Gateway, name: str) -> None:
    shown = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
    ]
    reply = await gateway.chat(f"{name}/echo-1", [{"role": "user", "content": shown}], max_tokens=50)
    assert "What is this?" in text_of(reply)
    assert "[image:" in text_of(reply)


async def test_bedrock_signed_as_amazon_does(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the credential and the service out of the signature's scope."""
    pytest.importorskip("botocore")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEYS["BEDROCK"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    settings = ProviderSettings(base_url=address, codec="bedrock.converse", auth="aws", region="eu-west-1")
    providers = Registry.load({"lab": settings}, dict(os.environ))
    async with Gateway(GatewaySettings(direct=True), providers) as made:
        reply = await made.chat("lab/amazon.nova-2-lite-v1:0", MESSAGES, max_tokens=50, temperature=0.5)
    assert is_the_echo(reply)


async def test_events_that_are_not_in_amazons_framing_are_a_failure_before_anything_was_shown(address: str) -> None:
    """Its stream of Bedrock has the content type and not the framing: nothing is guessed, and the next one answers."""
    routes = {"chat": {"targets": ["bedrock/echo-1"], "fallback": ["anthropic/echo-1"]}}
    settings = GatewaySettings.model_validate({"routes": routes})
    async with (
        Gateway(settings, registry(dict.fromkeys(FORMATS, address))) as made,
        made.stream("chat", MESSAGES, max_tokens=50, temperature=0.5) as events,
    ):
        async for _ in events:
            pass
    assert is_the_echo(events.reply())
    assert [attempt.target for attempt in events.record.attempts][-1] == "anthropic/echo-1"
    assert {attempt.target for attempt in events.record.attempts[:-1]} == {"bedrock/echo-1"}


@pytest.mark.parametrize("name", FORMATS)
async def test_a_wrong_key_is_told_in_our_words(address: str, name: str) -> None:
    """It repeats both keys, the given one and the right one, in its error: neither may reach a client or a log."""
    path, codec, auth, _ = FORMATS[name]
    settings = ProviderSettings.model_validate(
        {"base_url": address + path, "codec": codec, "auth": auth, "api_key": "env:WRONG"}
    )
    providers = Registry.load({"lab": settings}, {"WRONG": "sk-wrong-0123456789abcdef"})
    async with Gateway(GatewaySettings(direct=True), providers) as made:
        with pytest.raises(DiptychError) as caught:
            await made.chat("lab/echo-1", MESSAGES, max_tokens=50)
    assert caught.value.http_status == 502
    told = f"{caught.value} {caught.value.detail!r}"
    assert "sk-wrong" not in told
    assert "0123456789abcdef" not in told


@pytest.mark.parametrize("option", ["--rate-limit-after", "--timeout-after", "--error-rate"])
async def test_a_provider_that_fails_is_left_for_the_next(address: str, tmp_path: Path, option: str) -> None:
    """429, 504 and 500 of another maker's server, in each of the formats; by the first two one request is answered."""
    request = parse_chat(json.dumps({"model": "chat", "messages": MESSAGES, "max_tokens": 50}).encode())
    with llm_katan(tmp_path, option, "1") as failing:
        for name in FORMATS:
            routes = {"chat": {"targets": [f"{name}_bad/echo-1"], "fallback": [f"{name}/echo-1"], "retries": 1}}
            providers = registry({name: address, f"{name}_bad": failing})
            async with Gateway(GatewaySettings.model_validate({"routes": routes}), providers) as made:
                for _ in range(2):
                    reply, record = await made.answer(request)
                    assert text_of(reply)
            assert record.attempts[-1].target == f"{name}/echo-1"
            assert len(record.attempts) <= 3


async def test_a_limit_that_nobody_else_can_bear_is_told(tmp_path: Path) -> None:
    with llm_katan(tmp_path, "--rate-limit-after", "1") as failing:
        routes = {"chat": {"targets": ["openai/echo-1"], "retries": 0}}
        async with Gateway(GatewaySettings.model_validate({"routes": routes}), registry({"openai": failing})) as made:
            await made.chat("chat", MESSAGES)
            with pytest.raises(RateLimited):
                await made.chat("chat", MESSAGES)

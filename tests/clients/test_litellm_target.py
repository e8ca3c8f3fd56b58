"""The real litellm behind a target: its answers, streams, calls and errors, and its own idea of a request.

tests/cluster/providers has the same with a stand-in. Guards against the library's next version: arguments with other
names, chunks of another shape, a reason to end that it makes up.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.errors import DiptychError, RateLimited

# It is loaded where it is used; what it warns of while that happens is its own affair.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LITELLM = Path(__file__).resolve().parents[2] / "build" / "litellm"
MESSAGES = [{"role": "user", "content": "hi"}]
ERRORS = {401: 502, 404: 502, 429: 429, 500: 502, 503: 503}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


class Provider:
    """A server of OpenAI's format; the model's name says what it does."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []

    async def __aenter__(self) -> Provider:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
            body = json.loads(await reader.readexactly(int(fields["content-length"])))
            self.asked.append(body)
            self.keys.append(fields.get("authorization", ""))
            await self._answer(body, writer)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        model = body["model"]
        if model.startswith("status-"):
            error = json.dumps({"error": {"message": f"no, {self.keys[-1]}", "type": "t", "code": None}})
            more = "retry-after: 7\r\n" if model == "status-429" else ""
            _write(writer, model.removeprefix("status-"), "application/json", error, more)
        elif not body.get("stream"):
            message = {"role": "assistant", "content": "Hello", "reasoning_content": "Hm."}
            if "tools" in body:
                message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
            choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if "tools" in body else "stop"}
            told = {"id": "c", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]}
            _write(writer, "200", "application/json", json.dumps({**told, "usage": USAGE}))
        else:
            _write(writer, "200", "text/event-stream", "".join(self._events(body)))

    def _events(self, body: dict[str, Any]) -> list[str]:
        deltas: list[tuple[dict[str, Any], str | None]] = [
            ({"role": "assistant", "content": "", "reasoning_content": "Hm."}, None),
            ({"content": "Hel"}, None),
            ({"content": "lo"}, None),
        ]
        if "tools" in body:
            deltas.append(({"tool_calls": [CALL]}, None))
        if body["model"] != "cut":
            deltas.append(({}, "tool_calls" if "tools" in body else "stop"))
        base = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        chunks = [
            {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} for delta, finish in deltas
        ]
        if body["model"] == "cut":
            return [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        chunks.append({**base, "choices": [], "usage": USAGE})
        return [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]


def _write(writer: asyncio.StreamWriter, status: str, kind: str, body: str, more: str = "") -> None:
    head = f"HTTP/1.1 {status} x\r\ncontent-type: {kind}\r\n{more}connection: close\r\n"
    writer.write(f"{head}content-length: {len(body.encode())}\r\n\r\n{body}".encode())


@pytest.fixture(autouse=True)
def litellm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind what is installed: of packages that both need, both get the same."""
    if LITELLM.is_dir():
        monkeypatch.setattr(sys, "path", [*sys.path, str(LITELLM)])
    if find_spec("litellm") is None:
        pytest.skip("litellm is neither installed nor in build/litellm: make test-slow puts it there")


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with Provider() as made:
        yield made


@pytest.fixture
async def gateway(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    for name in ("LITELLM_LOCAL_MODEL_COST_MAP", "LITELLM_MODE"):
        monkeypatch.delenv(name, raising=False)
    settings = ProviderSettings(base_url=provider.url, codec="litellm", api_key="env:LAB_KEY")
    providers = Registry.load({"lab": settings}, {"LAB_KEY": "sk-lab-0123456789abcdef"})
    routes = {f"once-{status}": {"targets": [f"lab/openai/status-{status}"], "retries": 0} for status in ERRORS}
    async with Gateway(GatewaySettings.model_validate({"direct": True, "routes": routes}), providers) as made:
        yield made
    for name in ("LITELLM_LOCAL_MODEL_COST_MAP", "LITELLM_MODE"):
        os.environ.pop(name, None)


async def test_a_whole_answer(gateway: Gateway, provider: Provider) -> None:
    reply = await gateway.chat("lab/openai/m", MESSAGES, max_tokens=9, temperature=0.5)
    assert (reply.message.content, reply.message.reasoning_content) == ("Hello", "Hm.")
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.ended.finish) == (3, 2, "stop")
    (asked,) = provider.asked
    assert asked == {"model": "m", "messages": MESSAGES, "max_completion_tokens": 9, "temperature": 0.5}
    assert provider.keys == ["bearer sk-lab-0123456789abcdef"]


async def test_a_stream(gateway: Gateway) -> None:
    async with gateway.stream("lab/openai/m", MESSAGES) as events:
        async for _ in events:
            pass
    reply = events.reply()
    assert (reply.message.content, reply.message.reasoning_content) == ("Hello", "Hm.")
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.ended.finish) == (3, 2, "stop")


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_call_of_a_tool(gateway: Gateway, is_streamed: bool) -> None:
    if is_streamed:
        async with gateway.stream("lab/openai/m", MESSAGES, tools=[TOOL]) as events:
            async for _ in events:
                pass
        reply = events.reply()
    else:
        reply = await gateway.chat("lab/openai/m", MESSAGES, tools=[TOOL])
    (call,) = reply.message.tool_calls
    assert (call.id, call.name, call.arguments) == ("c1", "f", {"a": 1})
    assert reply.ended.finish == "tool_calls"


async def test_an_answer_that_broke_off_has_not_ended(gateway: Gateway) -> None:
    """The library itself says `stop` here."""
    async with gateway.stream("lab/openai/cut", MESSAGES) as events:
        with pytest.raises(DiptychError):
            async for _ in events:
                pass
    assert events.record.attempts[-1].failure is not None


@pytest.mark.parametrize(("status", "told"), ERRORS.items())
async def test_errors(gateway: Gateway, provider: Provider, status: int, told: int) -> None:
    """One request each time: the library makes none of its own. The key, which the provider repeats, is hidden."""
    with pytest.raises(DiptychError) as caught:
        await gateway.chat(f"once-{status}", MESSAGES)
    assert caught.value.http_status == told
    assert "0123456789" not in f"{caught.value} {caught.value.detail}"
    assert len(provider.asked) == 1
    if isinstance(caught.value, RateLimited):
        assert caught.value.retry_after_s is not None


async def test_a_provider_that_it_does_not_know(gateway: Gateway, provider: Provider) -> None:
    with pytest.raises(DiptychError) as caught:
        await gateway.chat("lab/nobody/m", MESSAGES)
    assert caught.value.http_status == 502
    assert not provider.asked

"""What neither a client nor a provider may do to the gateway: name an address, learn a key, fill its memory.

Every case over real connections; a canary listens where nothing may arrive.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from dialects import DIALECTS, Dialect, OpenAIChat, sse
from journeys import HELLO
from prometheus_client import CollectorRegistry, generate_latest
from scripted import HALF, Act, Wire
from test_relay_road import relayed, router

from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.metrics import GatewayMetrics
from diptych.cluster.gateway.ports import Ports
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.providers.clients import Clients
from diptych.cluster.providers.metrics import ProviderMetrics
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.anthropic_messages import parse_messages
from diptych.protos.errors import DiptychError, InvalidRequest, StartupError, UnknownModel
from diptych.protos.messages import Message, Reasoning, Text, ToolCall, ToolResult
from diptych.protos.openai import parse_chat
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.quirks import Quirks
from diptych.protos.responses import parse_responses

KEY = "sk-guard-9876543210zyxwvutsrq"
CHAT = OpenAIChat()
PLACES = ("base_url", "api_base", "api_key", "API-Key", "extra_headers", "proxy", "azure_endpoint", "organization")


@pytest.mark.parametrize("name", PLACES)
async def test_a_client_names_no_address_and_no_key(name: str) -> None:
    """S08: other routers took `api_base` of a request, and sent their keys there."""
    there = "http://127.0.0.1:1/v1"
    body: dict[str, Any] = {"model": "chat", "messages": HELLO}
    for read, more in (
        (parse_chat, {}),
        (parse_messages, {"max_tokens": 5}),
        (parse_responses, {"messages": None, "input": "hi"}),
    ):
        told = {key: value for key, value in (body | more | {name: there}).items() if value is not None}
        with pytest.raises(InvalidRequest) as caught:
            read(json.dumps(told).encode())
        assert caught.value.param == name
    for family in ("openai", "lab", "rig-openai.chat"):
        with pytest.raises(InvalidRequest, match="this server says") as caught:
            parse_chat(json.dumps(body | {"provider_options": {family: {name: there}}}).encode())
        assert caught.value.param == f"provider_options.{family}.{name}"
    async with router() as (gateway, rig):
        with pytest.raises(InvalidRequest):
            await gateway.chat("chat", HELLO, **{name: there})
        for model in (
            f"{there}/m",
            "rig-openai.chat@127.0.0.1:1/m",
            "rig-openai.chat/../x",
            "nobody/m",
            "chat\r\nx: y",
        ):
            with pytest.raises(UnknownModel):
                await gateway.chat(model, HELLO)
        assert rig.calls.total() == 0


@asynccontextmanager
async def server(act: Act, dialect: Dialect = CHAT) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A provider that does one thing; what it was sent."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            heads.append(head + json.dumps(body).encode())
            await act(Wire(dialect, bool(body.get("stream")), 0, reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield running.sockets[0].getsockname()[1], heads
    finally:
        running.close()


ECHO = {"error": {"message": f"wrong key {KEY}, Bearer {KEY}", "code": KEY[:14], "type": KEY, "param": KEY[-12:]}}


async def refused(wire: Wire) -> None:
    await wire.body(ECHO, "401 Unauthorized", x_request_id=KEY, x_ratelimit_remaining_requests=KEY)


async def redirected(wire: Wire) -> None:
    await wire.body(b"", "307 Temporary Redirect", location=f"http://127.0.0.1:1/?key={KEY}")


async def broken_amid(wire: Wire) -> None:
    if wire.is_stream:
        await wire.begin()
        await wire.chunks(*CHAT.opening(), CHAT.piece(HALF), sse(ECHO))
        return await wire.end()
    await wire.body(ECHO)


@pytest.mark.parametrize("act", [refused, redirected, broken_amid])
@pytest.mark.parametrize("road", ["whole", "stream", "relay"])
async def test_a_key_is_in_nothing_that_anybody_reads(
    act: Act, road: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the provider does with it: errors, records, dry runs, logs, metrics, reprs, tracebacks."""
    caplog.set_level(logging.DEBUG)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens: whoever goes there fails in another way
    registry = CollectorRegistry()
    async with server(act) as (port, heads):
        lab = ProviderSettings(base_url=f"http://127.0.0.1:{port}/v1", api_key="env:GUARD_KEY")
        clients = Clients(Registry.load({"lab": lab}, {"GUARD_KEY": KEY}), ProviderMetrics(registry))
        read = GatewaySettings.model_validate({"routes": {"chat": {"targets": ["lab/m"], "retries": 0}}})
        async with Gateway(read, clients, ports=Ports(metrics=GatewayMetrics(registry))) as gateway:
            error: Exception | None = None
            if road == "whole":
                with pytest.raises(DiptychError) as caught:
                    await gateway.chat("chat", HELLO)
                error, told = caught.value, ""
            elif road == "relay":
                _, error, record, reply = await relayed(gateway)
                told = f"{record.told()} {record} {reply}"
            else:
                async with gateway.stream("chat", HELLO) as events:
                    with pytest.raises(DiptychError) as caught:
                        _ = [item async for item in events]
                error, told = caught.value, f"{events.record.told()} {events.record} {events.reply()}"
            assert isinstance(error, DiptychError)
            shown = [
                told,
                error.message,
                error.detail,
                repr(error),
                "".join(traceback.format_exception(error)),
                str(gateway.explain("chat", HELLO)),
                repr(vars(gateway)),
                repr(vars(clients)),
                generate_latest(registry).decode(),
                caplog.text,
            ]
        assert [KEY.encode() in head for head in heads] == [True]
        for text in shown:
            assert not any(KEY[at : at + 8] in text for at in range(3, len(KEY) - 7)), text


async def gzip_bomb(wire: Wire) -> None:
    kind = CHAT.stream_type if wire.is_stream else "application/json"
    packed = gzip.compress(b"data: " + b" " * (40 << 20), 1)
    await wire.body(packed, content_type=kind, content_encoding="gzip")


async def endless_line(wire: Wire) -> None:
    if wire.is_stream:
        await wire.begin()
        while True:
            await wire.chunks(b"data: " + b"x" * (1 << 18))
    await wire.head(content_type="application/json", content_length=str(1 << 40))
    while True:
        await wire.send(b" " * (1 << 20))


async def deep_json(wire: Wire) -> None:
    deep = b'{"choices":' + b"[" * 200_000
    if wire.is_stream:
        return await wire.frames(*CHAT.opening(), *(b"data: " + deep + b"\n\n",) * 3)
    await wire.body(deep + b"]" * 200_000 + b"}")


async def endless_events(wire: Wire) -> None:
    if not wire.is_stream:
        return await wire.body(b"")
    await wire.begin()
    while True:
        await wire.chunks(*(sse({"id": "c1", "choices": [], "x": 1}),) * 64)


async def endless_tiny_pieces(wire: Wire) -> None:
    if not wire.is_stream:
        return await wire.body(b"")
    await wire.begin()
    while True:
        await wire.send(*(b"1\r\n:\r\n",) * 64)


BOMBS: dict[str, Act] = {
    act.__name__: act for act in (gzip_bomb, endless_line, deep_json, endless_events, endless_tiny_pieces)
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("road", ["whole", "stream", "relay"])
async def test_no_answer_fills_the_memory_or_keeps_a_request_for_ever(name: str, road: str) -> None:
    """S11, of a provider: the request fails there, in time, and the next target answers."""
    short = {"first_token_s": 0.4, "idle_s": 5, "answer_s": 5, "total_s": 15}
    async with router() as (whole, _), server(BOMBS[name]) as (port, _):
        lab = ProviderSettings(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        rig = whole._clients.registry.provider("rig-openai.chat")  # type: ignore[union-attr]
        well = ProviderSettings(base_url=rig.base_url, api_key="none")
        routes = {
            "chat": {"targets": ["lab/m"], "fallback": ["well"], "retries": 0, "timeouts": short},
            "well": {"targets": ["well/well"]},
        }
        read = GatewaySettings.model_validate({"routes": routes})
        async with Gateway(read, Registry.load({"lab": lab, "well": well}, {})) as gateway, asyncio.timeout(20):
            if road == "whole":
                assert (await gateway.chat("chat", HELLO)).message.content == "another answer"
            elif road == "stream":
                async with gateway.stream("chat", HELLO) as events:
                    assert [item async for item in events]
                assert events.reply().message.content == "another answer"
            else:
                _, error, record, reply = await relayed(gateway)
                assert (error, reply.message.content) == (None, "another answer")
                assert len(record.attempts) == 2


async def test_an_answer_of_more_events_than_there_are_tokens_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is small, and all are kept until the answer has ended."""
    monkeypatch.setattr("diptych.cluster.gateway.attempt.MAX_EVENTS", 1000)

    async def act(wire: Wire) -> None:
        await wire.begin()
        await wire.chunks(*CHAT.opening())
        while True:
            await wire.chunks(*(CHAT.piece("x"),) * 64)

    async with router(act) as (gateway, _):
        async with gateway.stream("chat", HELLO) as events:
            with pytest.raises(DiptychError, match="more than 1000 events"):
                async for _ in events:
                    pass
        assert len(events.reply().message.content) <= 1001


@pytest.mark.parametrize("codec", [dialect.codec for dialect in DIALECTS])
@pytest.mark.parametrize("family", ["", "mine"])
def test_what_one_provider_said_is_not_sent_to_another(codec: str, family: str) -> None:
    """Signatures and sealed reasoning of one account, in a conversation that goes on elsewhere."""
    other = {name: {"thoughtSignature": "S3CRET", "encrypted_content": "S3CRET", "id": "S3CRET"} for name in FAMILIES}
    theirs = {name: told for name, told in other.items() if name != (family or codec)}
    options = {name: {"x": "S3CRET"} for name in theirs}
    call = ToolCall(id="c1", name="lookup", arguments={}, text="{}", provider_data=theirs)
    messages = (
        Message(role="user", parts=(Text("hi", theirs),), provider_data=theirs),
        Message(
            role="assistant",
            parts=(Reasoning("hm", signature="", provider_data=theirs), Text("a", theirs), call),
            provider_data=theirs,
        ),
        Message(role="tool", parts=(ToolResult(call_id="c1", name="lookup", parts=(Text("b", theirs),)),)),
    )
    fields = {"model": "m", "messages": HELLO, "provider_options": options}
    request = parse_chat(json.dumps(fields).encode()).model_copy(update={"messages": messages})
    outgoing = by_name(codec).encode(request, model="m", stream=True, quirks=Quirks(family=family))
    assert "S3CRET" not in json.dumps([outgoing.body, outgoing.path, dict(outgoing.headers)])


FAMILIES = (
    *(dialect.codec for dialect in DIALECTS),
    "openai",
    "anthropic",
    "google",
    "amazon-bedrock",
    "mine",
    "theirs",
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("providers:\n  lab: {base_url: 'https://a.test/v1', api_key: none}\n  lab: {}\n", "lab appears twice"),
        ("providers:\n  lab: {base_url: 'https://a.test', api_key: none}\n  LAB: {}\n", "LAB"),
        ("providers:\n  grok1: {}\ngateway: {routes: {chat: {targets: [grok1/x]}}}\n", "is not a built-in provider"),
        ("providers:\n  lab: {base_url: 'https://a.test/v1'}\n", r"api_key is missing.*env:NAME"),
        ("providers:\n  lab: {base_url: 'https://u:p@a.test/v1', api_key: none}\n", "base_url"),
        ("providers:\n  groq: {base_url: 'https://a.test/v1'}\n", "which key goes there"),
        ("providers:\n  groq: {}\ngateway: {routes: {chat: {targets: [nobody/x]}}}\n", "there is no provider 'nobody'"),
    ],
)
def test_a_configuration_that_could_lead_a_key_astray_is_told_in_a_sentence(
    tmp_path: Any, text: str, words: str
) -> None:
    """Before anything starts, with the remedy."""
    file = tmp_path / "diptych.yaml"
    file.write_text(text)
    with pytest.raises(StartupError, match=words):
        Gateway.from_config(file, environ={})


async def test_a_missing_key_names_its_variable_and_what_needs_none() -> None:
    """And nothing is sent."""
    read = GatewaySettings.model_validate({"routes": {"chat": {"targets": ["groq/x"]}}})
    async with Gateway(read, Registry.load({"groq": ProviderSettings()}, {})) as gateway:
        with pytest.raises(DiptychError, match=r"\$GROQ_API_KEY.*ollama"):
            await gateway.chat("chat", HELLO)
        async with gateway.stream("chat", HELLO) as events:
            with pytest.raises(DiptychError, match=r"\$GROQ_API_KEY.*ollama"):
                _ = [item async for item in events]
